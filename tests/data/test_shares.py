"""What describe says of the data of each stage: shares, epochs, and targets of what has a mask."""

from pathlib import Path

import numpy as np
import pytest

from megahybrid.config import RunConfig
from megahybrid.config.describe import describe, render
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.shares import data_shares
from megahybrid.data_prep.pack import pack
from tests.config.example import example
from tests.data.corpus import tokenizer_info, write_corpus
from tests.data.masked import write_chats


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    draw = np.random.default_rng(1)
    write_chats(tmp_path / "chats", draw.integers(5, 900, 60).tolist(), tokenizer_info())
    write_corpus(tmp_path / "web", draw.integers(2, 60, 200).tolist(), shard_tokens=2000)
    for length in (1024, 4096):
        pack(tmp_path / "chats", tmp_path / f"rows{length}", length, max_document_tokens=length)
    plans = "{" + ", ".join(f"{n}: {tmp_path}/rows{n}" for n in (1024, 4096)) + "}"
    return example(
        f"data.sources.stdlib.path={tmp_path}/web",
        f"data.sources.gone={{path: {tmp_path}/gone}}",
        f"data.sources.chats={{plans: {plans}}}",
        "stages.0.weights={stdlib: 3, gone: 1}",
        "stages.1.weights={chats: 1, stdlib: 0}",
    )


def test_each_stage_tells_shares_epochs_and_about_how_many_targets(
    run: RunConfig, tmp_path: Path
) -> None:
    web, gone, chats = data_shares(run)
    stage_tokens = run.stage_plan.stage_tokens
    assert (web["stage"], web["source"], web["share"]) == ("short", "stdlib", 0.75)
    assert web["tokens"] == round(0.75 * stage_tokens[0]) and web["targets"] is None
    assert web["epochs"] == pytest.approx(web["tokens"] / TokenDataset(tmp_path / "web").tokens)
    assert (gone["share"], gone["epochs"], gone["targets"]) == (0.25, None, None)
    dataset = TokenDataset(tmp_path / "chats")
    counted = sum(dataset.counts(0, dataset.tokens).tolist())  # bit by bit
    assert 0 < counted < dataset.tokens
    assert chats["targets"] == round(stage_tokens[1] * counted / dataset.tokens)


def test_the_table_stands_where_data_are_here_and_nowhere_else(run: RunConfig) -> None:
    told = describe(run)
    text = render(told | {"data": data_shares(run)})
    assert "Data on this machine" in text and "targets, about" in text
    nowhere = [row | {"epochs": None} for row in data_shares(run)]
    assert "Data on this machine" not in render(told | {"data": nowhere})
    assert "Data on this machine" not in render(told)
