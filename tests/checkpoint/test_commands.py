"""`megahybrid checkpoint …` on checkpoints of three small tensors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megahybrid import cli
from megahybrid.checkpoint.average import average
from megahybrid.checkpoint.diff import difference, row_boxes
from megahybrid.checkpoint.fragments import STATES, volume, whole
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.checkpoint.writer import save
from megahybrid.errors import CheckpointError
from tests.checkpoint.examples import SHAPES, plain_fragments, save_plain, snapshot, values
from tests.checkpoint.test_damage import FILE, flip, truncate


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """What a command prints; errors, one line each, where it must fail."""
    assert cli.main(["checkpoint", *map(str, words)]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_list_tells_of_each_checkpoint_and_of_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 30):
        save_plain(tmp_path, step)
    truncate(tmp_path / "checkpoints" / "step-00000002" / FILE)
    lines = call(capsys, "list", tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "step-00000030", "step-00000002", "step-00000001",
    ]  # fmt: skip
    assert "30,000" in lines[1] and "1.5 kB" in lines[1]
    assert f"{FILE} has 1467 bytes, not the 1472 of the manifest" in lines[2]
    rows = json.loads(call(capsys, "list", tmp_path, "--json"))
    assert [row.get("step") for row in rows] == [30, None, 1]
    assert "holds no checkpoint" in call(capsys, "list", tmp_path / "checkpoints", code=2)


def test_show_tells_what_one_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = save_plain(tmp_path, 7)
    text = call(capsys, "show", tmp_path)
    assert f"checkpoint:  {newest}\n" in text
    assert "step:        7 (7 updates)" in text
    assert "parameters:  60\n" in text
    assert "embedding.weight   7 × 4  weight exp_avg exp_avg_sq          3" in text
    found = json.loads(call(capsys, "show", newest, "--json"))
    assert found["config"] == {"seed": 1} and found["tensors"][1]["shape"] == [4]


def test_verify_reads_one_or_all_and_fails_with_every_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (save_plain(tmp_path, step) for step in (1, 2))
    assert call(capsys, "verify", tmp_path).count("is as written") == 2
    flip(second / FILE, -1)
    assert "is as written" in call(capsys, "verify", first)
    told = call(capsys, "verify", tmp_path, code=2)
    assert told.startswith("megahybrid: ") and f"{second}: {FILE} is damaged" in told
    told = call(capsys, "verify", tmp_path / "nothing", code=2)
    assert "is no checkpoint and holds none" in told


def test_diff_finds_the_one_element_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = save_plain(tmp_path / "a", 1)
    parts = [
        replace(part, data=part.data.copy()) if part.state == "weight" else part
        for part in plain_fragments(1)
    ]
    weight = next(part for part in parts if part.tensor == "head.weight")
    weight.data[5] += 0.25
    changed = replace(snapshot(1, parts), config={"seed": 2})
    new = save(tmp_path / "b", changed, keep_last=1).path
    assert new is not None
    with Reader(old) as a, Reader(new) as b:
        found = difference(a, b, STATES)
        assert found.facts == (("seed", 1, 2),)
        first, *rest = found.changes
        assert (first.tensor, first.state, first.changed) == ("head.weight", "weight", 1)
        assert first.largest == pytest.approx(0.25, rel=1e-5)
        size = np.linalg.norm(values("head.weight", "weight", (7, 4)).astype(np.float64))
        assert first.relative == pytest.approx(0.25 / size, rel=1e-5)
        assert all(change.changed == 0 and change.relative == 0 for change in rest)
        assert len(found.changes) == 9 and not found.only_a and not found.only_b
    text = call(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert "seed: 1 → 2\n1 of 3 tensors differ\n" in text
    assert "head.weight  weight    3.6 %" in text
    assert json.loads(call(capsys, "diff", old, new, "--json"))["changes"][0]["changed"] == 1


def test_average_is_the_weighted_mean_of_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [save_plain(tmp_path / "run", step) for step in (1, 2, 4)]
    told = call(capsys, "average", *paths, "--out", tmp_path / "out", "--shares", 1, 1, 2)
    made = tmp_path / "out" / "checkpoints" / "step-00000004"
    assert told == f"{made}: the mean of 3 checkpoints' weights\n"
    manifest = verify(made)
    assert (manifest.step, manifest.tokens) == (4, 4000)
    assert [item["share"] for item in manifest.train_state["averaged"]] == [0.25, 0.25, 0.5]
    with Reader(made) as reader:
        for name, shape in SHAPES.items():
            one, two, four = (values(name, "weight", shape, s).astype(float) for s in (1, 2, 4))
            mean = (0.25 * one + 0.25 * two + 0.5 * four).astype(np.float32)
            assert reader.read(name, "weight", whole(shape)).tobytes() == mean.tobytes()
            with pytest.raises(CheckpointError, match="start.take=weights"):
                reader.read(name, "exp_avg", whole(shape))
    assert "mean of:     0.25 × " in call(capsys, "show", made)


def test_what_cannot_be_averaged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_plain(tmp_path / "a", 1)
    other = replace(snapshot(2), model_fingerprint="another")
    two = save(tmp_path / "b", other, keep_last=1).path
    assert two is not None
    out = tmp_path / "out"
    told = call(capsys, "average", one, two, "--out", out, code=2)
    assert "is of another model" in told and "the newest is another" in told
    told = call(capsys, "average", one, one, "--out", out, "--shares", 1, code=2)
    assert "--shares gives 1 numbers (1) for 2 checkpoints" in told
    told = call(capsys, "average", one, one, "--out", out, "--shares", 1e308, 1e308, code=2)
    assert "--shares gives 2 numbers (1e+308, 1e+308)" in told
    before = verify(one)
    for place in (tmp_path / "a", one):
        told = call(capsys, "average", one, one, "--out", place, code=2)
        assert f"--out={place} holds checkpoints already" in told
    assert verify(one) == before
    (tmp_path / "file").touch()
    told = call(capsys, "average", one, "--out", tmp_path / "file", code=2)
    assert "file cannot be written (File exists)" in told
    flip(one / FILE, -1)
    with pytest.raises(CheckpointError, match="is damaged"):
        average([one], out)
    assert not out.exists()


def test_chunks_of_rows_hold_every_element_once() -> None:
    for shape, elements in (((7, 4), 9), ((7, 4), 1), ((5,), 2), ((), 3), ((2, 3, 4), 12)):
        boxes = list(row_boxes(shape, elements))
        assert sum(map(volume, boxes)) == volume(whole(shape))
        assert all(volume(box) <= max(elements, volume(whole(shape[1:]))) for box in boxes)
        if shape:
            assert [box[0][0] for box in boxes[1:]] == [box[0][1] for box in boxes[:-1]]


def test_a_chunked_average_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save_plain(tmp_path / "run", step) for step in (1, 2)]
    first = average(paths, tmp_path / "whole").path
    monkeypatch.setattr("megahybrid.checkpoint.average.CHUNK_ELEMENTS", 8)
    second = average(paths, tmp_path / "cut").path
    assert first is not None and second is not None
    with Reader(first) as a, Reader(second) as b:
        assert len(b.manifest.fragments) > len(a.manifest.fragments)
        assert not any(change.changed for change in difference(a, b).changes)
