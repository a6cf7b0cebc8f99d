"""Whatever happens to a checkpoint's files is found, named in one line, and stepped over."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahybrid.checkpoint import durable, fragment_file
from megahybrid.checkpoint import manifest as manifest_module
from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.fragments import STATES, whole
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.manifest import _digest, read_manifest
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.errors import CheckpointError
from tests.checkpoint.examples import (
    SHAPES,
    save_plain,
    save_together,
    snapshot,
    together,
    values,
)

FILE = "fragments-0000.safetensors"


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Change a manifest; signed, so that only the checks of its content can object."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    change(values)
    values["sha256"] = _digest(values) if sign else "0" * 64
    path.write_text(json.dumps(values))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def stand_in(path: Path, make: Callable[[Path], object]) -> None:
    """Something else where a file was."""
    path.unlink()
    make(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "data_bit": (
        lambda folder: flip(folder / FILE, -3),
        rf"{FILE} is damaged in 1 of 1 blocks \(the first is bytes 0 to \d+\)",
    ),
    "header_bit": (lambda folder: flip(folder / FILE, 12), f"{FILE} is damaged in 1 of 1 blocks"),
    "truncated": (
        lambda folder: truncate(folder / FILE),
        rf"{FILE} has \d+ bytes, not the \d+ of the manifest",
    ),
    "missing_file": (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing"),
    "extra_file": (
        lambda folder: shutil.copy(folder / FILE, folder / "fragments-0007.safetensors"),
        "fragments-0007.safetensors is not listed in the manifest",
    ),
    "missing_manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "manifest.json is missing",
    ),
    "empty_manifest": (
        lambda folder: (folder / "manifest.json").write_text(""),
        "manifest.json is damaged: it is not JSON",
    ),
    "truncated_manifest": (
        lambda folder: truncate(folder / "manifest.json"),
        "manifest.json is damaged: it is not JSON",
    ),
    "no_text": (
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"),
        "manifest.json is damaged",
    ),
    "changed_manifest": (
        lambda folder: rewrite(folder, lambda values: values.update(step=3), sign=False),
        "sha256='0000",
    ),
    "not_a_number": (
        lambda folder: (folder / "manifest.json").write_text('{"step": NaN}'),
        "NaN is not JSON",
    ),
    "list": (lambda folder: (folder / "manifest.json").write_text("[]"), "not a JSON object"),
    "another_format": (
        lambda folder: rewrite(folder, lambda values: values.update(format="zip")),
        "format='zip' is not 'megahybrid-checkpoint'",
    ),
    "future_version": (
        lambda folder: rewrite(folder, lambda values: values.update(version=99)),
        r"version=99 is none that this megahybrid reads \(1\). Update megahybrid.",
    ),
    "version_of_no_kind": (
        lambda folder: rewrite(folder, lambda values: values.update(version=[1])),
        r"version=\[1\] is none that this megahybrid reads",
    ),
    "pipe_for_a_manifest": (
        lambda folder: stand_in(folder / "manifest.json", os.mkfifo),
        r"manifest.json cannot be read \(it is not a plain file\)",
    ),
    "device_for_a_manifest": (
        lambda folder: stand_in(folder / "manifest.json", lambda at: at.symlink_to("/dev/zero")),
        r"manifest.json cannot be read \(it is not a plain file\)",
    ),
    "folder_for_a_file": (
        lambda folder: stand_in(folder / FILE, Path.mkdir),
        f"{FILE} is not a plain file",
    ),
    "link_to_itself": (
        lambda folder: stand_in(folder / FILE, lambda at: at.symlink_to(at.name)),
        f"{FILE} is missing",
    ),
    "unknown_field": (
        lambda folder: rewrite(folder, lambda values: values.update(extra=1)),
        "manifest.json: extra is not a field",
    ),
    "lost_field": (
        lambda folder: rewrite(folder, lambda values: values.pop("tokens")),
        "manifest.json: tokens is missing",
    ),
    "wrong_type": (
        lambda folder: rewrite(folder, lambda values: values.update(step=True)),
        "manifest.json: step=true is not an integer",
    ),
    "negative": (
        lambda folder: rewrite(folder, lambda values: values.update(step=-1)),
        "manifest.json: step=-1 must be at least 0",
    ),
    "path_outside": (
        lambda folder: rewrite(
            folder, lambda values: values["files"].update({"../x": values["files"][FILE]})
        ),
        "files names '../x'",
    ),
    "box_outside": (
        lambda folder: rewrite(
            folder, lambda values: values["fragments"][0].update(box=[[0, 8], [0, 4]])
        ),
        r"fragments\[0\].box=\[\[0, 8\], \[0, 4\]\] leaves embedding.weight's shape \[7, 4\]",
    ),
    "flat_outside": (
        lambda folder: rewrite(folder, lambda values: values["fragments"][0].update(flat=[0, 29])),
        r"flat=\[0, 29\] leaves its box of 28 elements",
    ),
    "another_shape": (
        lambda folder: rewrite(
            folder, lambda values: values["tensors"]["head.weight"].update(shape=[8, 4])
        ),
        r"head.weight \(weight\): 4 of 32 elements are missing",
    ),
    "unknown_tensor": (
        lambda folder: rewrite(folder, lambda values: values["tensors"].pop("head.weight")),
        "tensor='head.weight' is not listed",
    ),
    "gap": (
        lambda folder: rewrite(folder, lambda values: values["fragments"].pop()),
        r"head.weight \(exp_avg_sq\): 28 of 28 elements are missing",
    ),
    "lost_key": (
        lambda folder: rewrite(folder, lambda values: values["fragments"][0].update(key="other")),
        "has no 'other', which the manifest lists",
    ),
    "swapped_key": (
        lambda folder: rewrite(
            folder,
            lambda values: values["fragments"][0].update(key=values["fragments"].pop(3)["key"]),
        ),
        r"is F32 \[4\], not the F32 \[28\]",
    ),
    "few_checksums": (
        lambda folder: rewrite(folder, lambda values: values["files"][FILE].update(crc32=[])),
        "lists 0 checksums for 1 blocks",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str) -> None:
    before, newest = save_plain(tmp_path, 1), save_plain(tmp_path, 2)
    damage, message = DAMAGES[name]
    damage(newest)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(newest)
    assert "\n" not in str(caught.value) and str(newest) in str(caught.value)
    lines: list[str] = []
    assert latest(tmp_path, lines.append) == before
    assert lines == [f"Passing over {caught.value}"]


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    folder = save_plain(tmp_path, 1)
    path = folder / "manifest.json"
    good, read = path.read_bytes(), read_manifest(folder)
    for at in range(0, len(good), 7):
        flip(path, at, bit=at % 8)
        # White space may change into other white space; nothing else may pass.
        with suppress(CheckpointError):
            assert read_manifest(folder) == read, at
        path.write_bytes(good)


def test_the_damaged_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "BLOCK_BYTES", 64)
    folder = save_plain(tmp_path, 1)
    record = read_manifest(folder).files[FILE]
    assert record.block_bytes == 64 and len(record.crc32) == -(-record.bytes // 64) > 3
    flip(folder / FILE, 64 * 2 + 5)
    with pytest.raises(CheckpointError, match=r"in 1 of \d+ blocks \(the first is bytes 128 to 19"):
        verify(folder)


def test_several_ranks_damaged_files_are_all_listed(tmp_path: Path) -> None:
    parts = snapshot(1).fragments
    (result, *_) = save_together(tmp_path, [snapshot(1, parts[rank::3]) for rank in range(3)])
    assert result.path is not None
    (result.path / "fragments-0000.safetensors").unlink()
    flip(result.path / "fragments-0002.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"fragments-0000.* is missing .*; fragments-0002"):
        verify(result.path)


def test_ranks_that_verify_together_read_each_block_once_and_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "BLOCK_BYTES", 64)
    parts = snapshot(1).fragments
    (result, *_) = save_together(tmp_path, [snapshot(1, parts[rank::3]) for rank in range(3)])
    assert result.path is not None
    folder, read = result.path, []
    real = durable.damaged_blocks

    def counted(path: Path, record: Any, blocks: range) -> list[int]:
        read.extend((path.name, block) for block in blocks)
        return real(path, record, blocks)

    monkeypatch.setattr(durable, "damaged_blocks", counted)
    for count in (1, 2, 4, 50):
        read.clear()
        manifests = together(count, lambda ranks: verify(folder, ranks))
        assert all(manifest == manifests[0] for manifest in manifests)
        blocks = [(n, b) for n, f in manifests[0].files.items() for b in range(len(f.crc32))]
        assert sorted(read) == sorted(blocks) and len(blocks) > 20
    flip(folder / "fragments-0001.safetensors", -1)
    (folder / "fragments-0002.safetensors").unlink()

    def told(ranks: Ranks) -> str:
        with pytest.raises(CheckpointError) as caught:
            verify(folder, ranks)
        return str(caught.value)

    (one,) = set(together(4, told))
    assert "fragments-0002.safetensors is missing" in one
    assert "fragments-0001.safetensors is damaged in 1 of" in one
    (folder / "manifest.json").write_text("{")
    (one,) = set(together(4, told))
    assert "manifest.json is damaged: it is not JSON" in one


def test_with_every_checkpoint_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save_plain(tmp_path, step) / FILE)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be read \(step-0000"):
        latest(tmp_path)


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "never made") is None


def test_a_large_fragment_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragment_file, "CHUNK_BYTES", 12)
    with Reader(save_plain(tmp_path, 1)) as reader:
        for name, shape in SHAPES.items():
            for state in STATES:
                found = reader.read(name, state, whole(shape))
                assert np.array_equal(found, values(name, state, shape))
        with (reader.path / FILE).open("r+b") as file:
            file.truncate(file.seek(0, 2) - 200)  # while it is open
        with pytest.raises(CheckpointError, match="ends within"):
            for name, shape in SHAPES.items():
                for state in STATES:
                    reader.read(name, state, whole(shape))


def test_reading_does_not_trust_a_file_that_shrank_after_verification(tmp_path: Path) -> None:
    folder = save_plain(tmp_path, 1)
    truncate(folder / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE} has"):
        Reader(folder)


class Canary:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", [FILE, "manifest.json", "optimizer.pkl", "fragments-0009.pt"])
def test_a_pickle_is_never_run(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    folder = save_plain(tmp_path, 1)
    (folder / place).write_bytes(pickle.dumps(Canary(canary)))
    if place == "optimizer.pkl":
        verify(folder)
        Reader(folder).read("final_norm.weight", "weight", ((0, 4),))
        assert latest(tmp_path) == folder
    else:
        for entry in (verify, Reader, read_manifest if place == "manifest.json" else verify):
            with pytest.raises(CheckpointError):
                entry(folder)
        with pytest.raises(CheckpointError):
            latest(tmp_path)
    save_plain(tmp_path, 2, keep_last=1)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary itself must work"


def test_a_numpy_object_array_in_a_fragment_file_is_refused(tmp_path: Path) -> None:
    folder = save_plain(tmp_path, 1)
    with (folder / FILE).open("wb") as file:
        np.save(file, np.array([Canary(tmp_path / "canary")], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError):
        verify(folder)
    assert not (tmp_path / "canary").exists()


def test_every_version_there_was_has_a_reader() -> None:
    assert sorted(manifest_module.READERS) == list(range(1, manifest_module.VERSION + 1))
