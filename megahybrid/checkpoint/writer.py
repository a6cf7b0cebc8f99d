"""Writing a checkpoint: every rank its own file, the manifest last, then one rename.

Until the rename the folder has a name that no reader looks at, so whatever stops a save (a kill, a
full disk) leaves the run with the checkpoints it had. A save that the machine refuses is a result,
not an exception: the run goes on without it.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.checkpoint import durable, folders
from megahybrid.checkpoint.fragments import STATES, Fragment, as_numpy
from megahybrid.checkpoint.manifest import (
    ELEMENT_BYTES,
    MANIFEST_NAME,
    FileRecord,
    FragmentRecord,
    Manifest,
    TensorRecord,
    parse,
)
from megahybrid.checkpoint.ranks import Ranks
from megahybrid.errors import CheckpointError

# The manifest, and what a file system needs for itself.
SPARE_BYTES = 32 * 2**20
# Network file systems may show a file to other nodes late.
VISIBLE_WITHIN_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What one rank gives to a save: its own fragments, and the facts that all ranks agree on.

    `tensors` maps every canonical name to its global shape, `states` says which states are kept of
    each. A replicated parameter is given by one rank only. `train_state` and `config` are of JSON.
    """

    step: int
    tokens: int
    optimizer_step: int
    model_fingerprint: str
    tensors: Mapping[str, Sequence[int]]
    fragments: Sequence[Fragment]
    train_state: Mapping[str, Any]
    config: Mapping[str, Any]
    states: Sequence[str] = STATES


@dataclass(frozen=True)
class SaveResult:
    """What became of a save; the same on every rank. `path` is None where it failed."""

    step: int
    path: Path | None
    bytes: int = 0
    seconds: float = 0.0
    error: str | None = None
    removed: tuple[str, ...] = ()
    warning: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the checkpoint was published."""
        return self.path is not None


def save(
    run_directory: Path | str, snapshot: Snapshot, *, keep_last: int, ranks: Ranks | None = None
) -> SaveResult:
    """Write, verify and publish `run_directory`/checkpoints/step-NNNNNNNN; collective over `ranks`.

    A full or failing disk gives a SaveResult with `error` on every rank and leaves the older
    checkpoints as they were. Fragments that do not hold every tensor exactly once raise
    CheckpointError on every rank: going on would only hide that the state cannot be saved.
    Afterwards all but the newest `keep_last` checkpoints are deleted.
    """
    ranks = ranks or Ranks()
    started = time.monotonic()
    run_directory = Path(run_directory)
    own = _OwnFile(snapshot.fragments, f"fragments-{ranks.rank:04d}.safetensors")
    temporary = folders.temporary_path(run_directory, snapshot.step)
    first = ranks.rank == 0
    try:
        total = sum(_agree(ranks, lambda: own.bytes))
        _agree(ranks, lambda: _prepare(run_directory, temporary, total) if first else None)
        written = _agree(ranks, lambda: own.write(temporary))
        outcomes = _agree(
            ranks, lambda: _finish(run_directory, snapshot, written, keep_last) if first else None
        )
    except (CheckpointError, _Refused) as refusal:
        if first:
            durable.remove(temporary)
        if isinstance(refusal, CheckpointError):
            raise
        seconds = time.monotonic() - started
        return SaveResult(snapshot.step, None, seconds=seconds, error=str(refusal))
    return SaveResult(
        step=snapshot.step,
        path=folders.published_path(run_directory, snapshot.step),
        bytes=total,
        seconds=time.monotonic() - started,
        removed=tuple(outcomes[0]["removed"]),
        warning=outcomes[0]["warning"],
    )


class _Refused(Exception):
    """Some rank's part of a save was refused by its machine; all ranks raise this together."""


def _agree(ranks: Ranks, action: Callable[[], Any]) -> list[Any]:
    """Every rank's result of its action, on every rank; or the same exception on every rank."""
    answer: dict[str, Any] = {"value": None, "refused": None, "wrong": None}
    try:
        answer["value"] = action()
    except CheckpointError as error:
        answer["wrong"] = str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        answer["refused"] = f"{error.strerror or error}{where}"
    answers = ranks.gather(answer)
    for rank, other in enumerate(answers):
        if other["wrong"]:
            raise CheckpointError(other["wrong"])
        if other["refused"]:
            raise _Refused(f"rank {rank}: {other['refused']}")
    return [other["value"] for other in answers]


class _OwnFile:
    """One rank's safetensors file: the header is known before the first byte is written."""

    def __init__(self, fragments: Sequence[Fragment], name: str) -> None:
        self.name = name
        self.fragments = [part for part in fragments if part.flat[0] < part.flat[1]]
        self.keys = [
            f"{part.state}/{part.tensor}/{index}" for index, part in enumerate(self.fragments)
        ]
        header: dict[str, Any] = {}
        offset = 0
        for key, part in zip(self.keys, self.fragments, strict=True):
            count = part.flat[1] - part.flat[0]
            end = offset + count * ELEMENT_BYTES
            header[key] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # The format lets a header end in spaces; the data then begins at a multiple of 8.
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.bytes = len(self.header) + offset if self.fragments else 0

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Write the file and read it back; returns its records, JSON-able, or None when empty."""
        if not self.fragments:
            return None
        path = folder / self.name
        record = durable.write(path, self._chunks())
        if bad := durable.damaged_blocks(path, record):
            raise OSError(errno.EIO, f"block {bad[0]} reads back differently", str(path))
        table = [
            {"tensor": part.tensor, "state": part.state, "box": part.box, "flat": part.flat,
             "file": self.name, "key": key}
            for key, part in zip(self.keys, self.fragments, strict=True)
        ]  # fmt: skip
        return {"name": self.name, "fragments": table, **asdict(record)}

    def _chunks(self) -> Any:
        yield memoryview(self.header)
        for part in self.fragments:
            yield as_numpy(part.data).view(np.uint8).data


def _prepare(run_directory: Path, temporary: Path, total: int) -> None:
    """Make an empty folder to write to, on a disk with enough room."""
    os.makedirs(temporary.parent, exist_ok=True)
    folders.reap(run_directory)
    free = shutil.disk_usage(temporary.parent).free
    if free < total + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{temporary.parent} has {free / 2**30:.2f} GiB free, less than the "
            f"{(total + SPARE_BYTES) / 2**30:.2f} GiB that the save needs. Free some, or lower "
            "checkpoint.keep_last",
        )
    os.mkdir(temporary)
    durable.sync_directory(temporary.parent)


def _finish(
    run_directory: Path, snapshot: Snapshot, written: list[dict[str, Any] | None], keep_last: int
) -> dict[str, Any]:
    """Rank 0's part: the manifest, the rename that publishes, and the retention."""
    temporary = folders.temporary_path(run_directory, snapshot.step)
    manifest = _manifest(snapshot, written)
    text = manifest.to_json()
    # What is written must be what a reader takes: the same checks, before it is published.
    faults = parse(json.loads(text), temporary / MANIFEST_NAME).coverage()
    if faults:
        raise CheckpointError(
            f"step {snapshot.step} cannot be saved: {faults[0]} "
            f"({len(faults)} such faults in {len(manifest.tensors)} tensors)."
        )
    _wait_until_visible(temporary, manifest.files)
    durable.write(temporary / MANIFEST_NAME, [memoryview(text.encode())])
    durable.sync_directory(temporary)
    published = folders.published_path(run_directory, snapshot.step)
    replaced = folders.replaced_path(run_directory, snapshot.step)
    if published.exists() and replaced.exists():
        # This one is damaged: `reap` would otherwise have deleted the one put aside.
        durable.remove(published)
    elif published.exists():
        durable.rename(published, replaced)
    durable.rename(temporary, published)
    durable.remove(replaced)
    try:
        removed = folders.retain(run_directory, keep_last, verified=[published])
    except OSError as error:
        return {"removed": [], "warning": f"old checkpoints stay: {error}"}
    return {"removed": removed, "warning": None}


def _manifest(snapshot: Snapshot, written: list[dict[str, Any] | None]) -> Manifest:
    parts = [part for part in written if part is not None]
    fragments = tuple(_fragment_record(row) for part in parts for row in part["fragments"])
    files = {
        part["name"]: FileRecord(part["bytes"], part["block_bytes"], tuple(part["crc32"]))
        for part in parts
    }
    states = tuple(snapshot.states)
    return Manifest(
        step=snapshot.step,
        tokens=snapshot.tokens,
        model_fingerprint=snapshot.model_fingerprint,
        optimizer_step=snapshot.optimizer_step,
        tensors={
            name: TensorRecord(tuple(int(size) for size in shape), states)
            for name, shape in snapshot.tensors.items()
        },
        fragments=fragments,
        files=files,
        train_state=snapshot.train_state,
        config=snapshot.config,
        written_by={"megahybrid": _version(), "ranks": len(written), "time_unix": time.time()},
    )


def _fragment_record(row: Mapping[str, Any]) -> FragmentRecord:
    """What a rank told of a fragment; on its way a tuple may have become a list."""
    box = tuple((start, stop) for start, stop in row["box"])
    start, stop = row["flat"]
    return FragmentRecord(row["tensor"], row["state"], box, (start, stop), row["file"], row["key"])


def _version() -> str:
    try:
        return version("megahybrid")
    except PackageNotFoundError:
        return "not installed"


def _wait_until_visible(folder: Path, files: Mapping[str, FileRecord]) -> None:
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    for name, record in files.items():
        while not (folder / name).exists() or (folder / name).stat().st_size != record.bytes:
            if time.monotonic() > deadline:
                raise OSError(
                    errno.ENOENT,
                    f"{folder / name} was written by its rank but rank 0 does not see it. Put the "
                    "run directory on a file system that all nodes share",
                )
            time.sleep(0.1)
