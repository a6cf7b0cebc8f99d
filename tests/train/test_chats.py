"""A stage of conversations, in packed rows of which only answers are learnt, killed and gone on."""

import signal
from pathlib import Path

import numpy as np

from megahybrid.data.token_writer import TokenWriter
from megahybrid.data_prep.pack import pack
from tests.train.example import RUN, TOKENIZER, arithmetic_of, checkpoint_bytes, steps_of
from tests.train.forked import Nursery, Ranks

LAST = """
  - name: chats
    tokens: 8192
    lengths: {128: 1}
    batch_tokens: 1024
    micro_batch_tokens: 512
    weights: {chats: 1}
    learning_rate: {kind: linear, start: 1.0e-3, end: 1.0e-4}
"""
STEPS = 12  # 4 of text and 8 of conversations


def write_run(folder: Path) -> None:
    """A stage of text, then one of conversations, whose rows a plan says."""
    draw = np.random.default_rng(1)
    with TokenWriter(folder / "chats", TOKENIZER) as writer:
        for length in draw.integers(8, 60, 60):
            writer.add(draw.integers(2, 97, length), np.arange(length) > length // 2)
    pack(folder / "chats", folder / "rows", length=128)
    text, rest = RUN.split("  - name: middle")
    text = text.replace("code: {path: code}", "chats: {path: rows}")
    text = text.replace("held: {path: held}", "held: {path: held}, chats: {path: chats}")
    settings = rest[rest.index("checkpoint:") :]
    (folder / "run.yaml").write_text(text.rstrip() + LAST + settings)


def test_killed_in_the_stage_of_chats_it_ends_with_the_same_bits(
    nursery: Nursery, example: Path
) -> None:
    write_run(example)
    for directory, fault, code in (
        ("whole", None, 0),
        ("killed", "killed_in_seventh_step", -signal.SIGKILL),
        ("killed", None, 0),
    ):
        words = ["train", "run.yaml", f"directory={directory}"]
        ranks = Ranks(nursery, words, 1, example, fault=fault)
        assert ranks.wait() == [code], ranks.text()[-2000:]
    run, whole = example / "killed", example / "whole"
    steps = steps_of(run)
    assert [step.stage for step in steps] == ["short"] * 4 + ["chats"] * 8
    assert steps[-1].attempt > 1
    assert arithmetic_of(run) == arithmetic_of(whole)
    assert checkpoint_bytes(run, STEPS) == checkpoint_bytes(whole, STEPS) != {}
