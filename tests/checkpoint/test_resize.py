"""`checkpoint resize-vocab`: rows for new tokens, and all else to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahybrid import cli
from megahybrid.checkpoint import resize
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.fragments import STATES, Array, Fragment, whole
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.checkpoint.writer import Snapshot, save
from megahybrid.commands.trained_model import load_trained_model
from megahybrid.config import RunConfig, dump, load
from megahybrid.config.counting import parameter_shapes
from megahybrid.data.chat.template_file import SHIPPED
from megahybrid.data.tokenizer import load_tokenizer, train_sentencepiece
from megahybrid.data_prep.tokenizer_report import adopt
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.restore import run_of
from tests.checkpoint.examples import values
from tests.train.example import RUN

VOCAB = 300


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[tuple[str, str], Array], RunConfig]:
    """A checkpoint of a small model, its values, and a tokenizer of all but four of its rows."""
    texts = ["the cat runs to the dog and " * 5, "a blue one is what it sees " * 5] * 9
    (tmp_path / "old.model").write_bytes(train_sentencepiece(texts, vocab_size=VOCAB - 4))
    (tmp_path / "run.yaml").write_text(RUN)
    changes = [f"model.vocab_size={VOCAB}", f"data.tokenizer={tmp_path / 'old.model'}"]
    run = load(tmp_path / "run.yaml", changes)
    shapes = parameter_shapes(run.model)
    held = {(n, s): values(n, s, shape) for n, shape in shapes.items() for s in STATES}
    snapshot = Snapshot(
        step=3,
        tokens=3072,
        optimizer_step=3,
        model_fingerprint=model_fingerprint(run.model),
        tensors=shapes,
        fragments=[
            Fragment(name, state, whole(value.shape), (0, value.size), value.reshape(-1))
            for (name, state), value in held.items()
        ],
        train_state={"step": 3, "tokens": 3072},
        config=dump(run),
    )
    path = save(tmp_path / "run", snapshot, keep_last=1).path
    assert path is not None
    return path, held, run


def resized(path: Path, new: Path, out: Path, *more: object, code: int = 0) -> None:
    words = ["checkpoint", "resize-vocab", path, "--tokenizer", new, "--out", out, *more]
    assert cli.main([str(word) for word in words]) == code


def test_new_rows_are_the_mean_and_all_else_is_as_it_was(
    made: tuple[Path, dict[tuple[str, str], Array], RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    path, held, run = made
    monkeypatch.setattr(resize, "CHUNK_ELEMENTS", 500)  # of a few rows at a time
    new = tmp_path / "new.model"
    adopt(str(tmp_path / "old.model"), str(new), None, SHIPPED["cohere"])
    resized(path, new, tmp_path / "out")
    grown = tmp_path / "out" / "checkpoints" / "step-00000003"
    # Of the six tokens four had rows that nothing was learnt in.
    assert "rows 296 to 301 are new, the mean of those before. model.vocab_size=302 (was 300)" in (
        capsys.readouterr().out
    )
    manifest = verify(grown)
    assert manifest.train_state["resized"]["checkpoint"] == str(path.resolve())
    with Reader(grown) as reader:
        after = run_of(reader)
        assert after.model.vocab_size == 302 and after.data.tokenizer == str(new)
        assert manifest.model_fingerprint == model_fingerprint(after.model)
        assert manifest.model_fingerprint != model_fingerprint(run.model)
        for (name, state), value in held.items():
            found = reader.read(name, state, whole(manifest.tensors[name].shape))
            if name not in ("embedding.weight", "head.weight"):
                assert found.tobytes() == value.tobytes()
                continue
            assert found.shape == (302, value.shape[1])
            assert found[:296].tobytes() == value[:296].tobytes()
            mean = value[:296].astype(np.float64).mean(axis=0) * (state == "weight")
            np.testing.assert_allclose(found[296:], np.tile(mean, (6, 1)), rtol=1e-6, atol=1e-9)
        assert cli.main(["checkpoint", "show", str(grown)]) == 0
        assert "resized:     from 300 tokens, of " in capsys.readouterr().out
    # What reads checkpoints takes it, and holds its config to its fingerprint and tensors.
    assert len(load_trained_model(grown, ParallelMesh.single()).model.embedding.weight) >= 302


def test_what_would_make_rows_mean_other_tokens_is_refused(
    made: tuple[Path, dict[tuple[str, str], Array], RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _, _ = made
    old, out, other = tmp_path / "old.model", tmp_path / "out", tmp_path / "other.model"
    texts = ["quite another text, with its own words " * 9] * 9
    other.write_bytes(train_sentencepiece(texts, vocab_size=VOCAB + 2 - 12))
    new = tmp_path / "new.model"
    adopt(str(old), str(new), None, SHIPPED["chatml"])
    for given, more, told in (
        (old, (), "has the 296 tokens of"),
        (other, (), "the model's rows would mean other tokens"),
        (old, ("--old-tokenizer", new), "has 296 tokens and eod_id=1, and"),
        (tmp_path / "none.model", (), "cannot be read (No such file"),
    ):
        resized(path, given, out, *more, code=2)
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1
    resized(path, new, path.parent.parent, code=2)
    assert "holds checkpoints already" in capsys.readouterr().err
    assert not out.exists()
    assert load_tokenizer(new).info.vocab_size == VOCAB - 2
