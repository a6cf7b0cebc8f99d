"""Every version of the format there ever was is read today."""

import json
from pathlib import Path

import numpy as np
import pytest

from megahybrid.checkpoint import manifest as manifest_module
from megahybrid.checkpoint.fragments import STATES, whole
from megahybrid.checkpoint.manifest import READERS, VERSION
from megahybrid.checkpoint.reader import Reader, verify
from tests.checkpoint.examples import SHAPES, snapshot, values

FORMATS = Path(__file__).parent / "formats"


def test_every_version_has_a_reader_and_a_checkpoint_kept_here() -> None:
    kept = {int(path.name.removeprefix("version-")) for path in FORMATS.glob("version-*")}
    assert kept == set(READERS) == set(range(1, VERSION + 1))


@pytest.mark.parametrize("version", sorted(READERS))
def test_a_checkpoint_of_each_version_holds_what_was_written(version: int) -> None:
    """Two ranks' files of step 3 of tests/checkpoint/examples.py."""
    folder = FORMATS / f"version-{version}"
    manifest = verify(folder)
    expected = snapshot(3)
    assert (manifest.version, manifest.step, manifest.tokens) == (version, 3, 3000)
    assert manifest.optimizer_step == 3
    assert manifest.model_fingerprint == expected.model_fingerprint
    assert manifest.config == expected.config
    assert manifest.train_state == json.loads(json.dumps(expected.train_state))
    with Reader(folder) as reader:
        for name, shape in SHAPES.items():
            for state in STATES:
                found = reader.read(name, state, whole(shape))
                assert found.dtype == np.float32
                assert found.tobytes() == values(name, state, shape, 3).tobytes()


def test_the_files_are_plain_safetensors_and_json() -> None:
    """What another program needs to read one: no code of ours."""
    from safetensors.numpy import load_file

    folder = FORMATS / "version-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: load_file(folder / name) for name in manifest["files"]}
    whole_tensor = np.full((7, 4), np.nan, dtype=np.float32)
    for part in manifest["fragments"]:
        if (part["tensor"], part["state"]) == ("head.weight", "weight"):
            rows, columns = part["box"]
            box = whole_tensor[slice(*rows), slice(*columns)].reshape(-1)
            box[slice(*part["flat"])] = files[part["file"]][part["key"]]
            whole_tensor[slice(*rows), slice(*columns)] = box.reshape(
                rows[1] - rows[0], columns[1] - columns[0]
            )
    assert np.array_equal(whole_tensor, values("head.weight", "weight", (7, 4), 3))


def test_a_version_of_the_future_says_to_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "READERS", {})
    with pytest.raises(Exception, match="version=1 is none that this megahybrid reads"):
        verify(FORMATS / "version-1")
