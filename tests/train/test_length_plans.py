"""The paper's second stage in small: masked chats at two lengths, 3:1 by sequences, a plan each."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config.yaml_file import read_tree
from megahybrid.data_prep.pack import pack
from megahybrid.data_prep.trace import audit
from megahybrid.errors import DataError
from tests.data.masked import write_chats
from tests.train.example import RUN, TOKENIZER, arithmetic_of, checkpoint_bytes, steps_of
from tests.train.forked import Nursery, Ranks

SHORT, LONG, BATCH, STEPS = 64, 512, 1024, 12
PAPER = Path(__file__).parents[2] / "configs/stages/paper.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    stage = read_tree(PAPER)["stages"][1]
    ratios, weights = list(stage["lengths"].values()), stage["weights"]
    assert list(stage["lengths"]) == [128 * SHORT, 128 * LONG] and ratios == [3, 1]
    draw = np.random.default_rng(2)
    sizes = [*draw.integers(9, SHORT, 90), *draw.integers(SHORT + 1, LONG, 20)]
    write_chats(folder / "chats", draw.permutation(sizes).tolist(), TOKENIZER)
    write_chats(folder / "held", [40] * 6, TOKENIZER, seed=1)
    pack(folder / "chats", folder / "short", SHORT, max_document_tokens=SHORT)
    pack(folder / "chats", folder / "long", LONG, min_document_tokens=SHORT + 1)
    before, _, rest = RUN.partition("stages:\n")
    before = before.replace(
        "{books: {path: books}, code: {path: code}}",
        f"{{chats: {{plans: {{{SHORT}: short, {LONG}: long}}}}}}",
    )
    lengths = f"{{{SHORT}: {ratios[0]}, {LONG}: {ratios[1]}}}"
    stages = (
        f"stages:\n  - {{name: long, tokens: {STEPS * BATCH}, lengths: {lengths}, "
        f"batch_tokens: {BATCH}, micro_batch_tokens: 512, weights: {weights}, "
        "learning_rate: {kind: linear, start: 3.0e-3, end: 3.0e-4}}\n"
    ).replace("'", "")
    (folder / "run.yaml").write_text(before + stages + rest[rest.index("checkpoint:") :])
    return folder


def train(nursery: Nursery, folder: Path, name: str, world: int, fault: str | None) -> int:
    ranks = Ranks(nursery, ["train", "run.yaml", f"directory={name}"], world, folder, fault=fault)
    (code,) = set(ranks.wait())
    assert code in (0, 75), ranks.text()
    return code


def test_two_lengths_of_chats_train_resume_on_other_ranks_and_are_audited(
    nursery: Nursery, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert train(nursery, folder, "whole", 1, None) == 0
    for name, world in (("again", 1), ("moved", 2)):
        assert train(nursery, folder, name, 1, "record_rows_and_stop") == 75
        assert train(nursery, folder, name, world, None) == 0
    steps = steps_of(folder / "whole")
    assert len(steps) == STEPS
    rows: Counter[int] = Counter()
    for step in steps:
        rows[step.length] += BATCH // step.length
    assert abs(rows[SHORT] - 3 * rows[LONG]) <= BATCH // SHORT, rows
    assert arithmetic_of(folder / "again") == arithmetic_of(folder / "whole")
    last = checkpoint_bytes(folder / "whole", STEPS)
    assert last and last == checkpoint_bytes(folder / "again", STEPS)
    found = audit(folder / "whole")
    for name in ("again", "moved"):
        other = audit(folder / name)
        assert (other.rows, other.targets) == (found.rows, found.targets)
        counts = [step.source_targets for step in steps_of(folder / name)]
        assert counts == [step.source_targets for step in steps]
    assert 0 < found.targets["chats"] < found.tokens["chats"] == STEPS * BATCH
    for moved, step in zip(steps_of(folder / "moved"), steps, strict=True):
        assert moved.loss == pytest.approx(step.loss, rel=1e-4)
    ledger = folder / "whole/ledger.jsonl"
    told = f'"source_targets":{{"chats":{found.targets["chats"]}}}'
    assert told in ledger.read_text()
    ledger.write_text(ledger.read_text().replace(told, told[:-2] + "1}"))
    with pytest.raises(DataError, match="source_targets=.* is not what this config and these"):
        audit(folder / "whole")
