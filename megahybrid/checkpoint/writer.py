"""Writing a checkpoint: every rank its own file, the manifest last, then one rename.

Until the rename the folder has a name that no reader looks at, so whatever stops a save (a kill, a
full disk) leaves the run with the checkpoints it had. Then every rank reads its file back, and only
when all bytes came back as they were written are older checkpoints deleted. A save that the machine
refuses is a result, not an exception: the run goes on without it.

`save_phases` gives the order of things; `save` goes through them at once, `saver.py` beside the
training.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from megahybrid import __version__
from megahybrid.checkpoint import durable, folders, names
from megahybrid.checkpoint.collective import Ranks, Refused, agree
from megahybrid.checkpoint.folders import Retention
from megahybrid.checkpoint.fragments import STATES, Fragment, State
from megahybrid.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    FragmentRecord,
    Manifest,
    TensorRecord,
    parse,
)
from megahybrid.checkpoint.rank_file import RankFile
from megahybrid.errors import CheckpointError

# The manifest, and what a file system needs for itself.
SPARE_BYTES = 32 * 2**20
# Network file systems may show a file to other nodes late.
VISIBLE_WITHIN_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One rank's part of a save: its own fragments, and the facts that all ranks agree on.

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
    """The outcome of a save; the same on every rank but for the seconds.

    `path` is None where it failed. `seconds` go until the checkpoint is published and on the disk,
    `checked_seconds` until it was read back and older ones are deleted, `stall_seconds` are those
    that training waited.
    """

    step: int
    path: Path | None
    bytes: int = 0
    seconds: float = 0.0
    checked_seconds: float = 0.0
    stall_seconds: float = 0.0
    error: str | None = None
    removed: tuple[str, ...] = ()
    warning: str | None = None

    @property
    def ok(self) -> bool:
        """True where the checkpoint was published."""
        return self.path is not None


# So many phases come before the writing; they take no time.
SHORT_PHASES = 2
# What every rank is to do next; it is sent the results of all ranks in order of rank.
Phases = Generator[Callable[[], Any], list[Any], SaveResult]


def save(
    run_directory: Path | str, snapshot: Snapshot, *, keep_last: int, ranks: Ranks | None = None
) -> SaveResult:
    """Write, publish and verify `run_directory`/checkpoints/step-NNNNNNNN; collective over `ranks`.

    A full or failing disk gives a SaveResult with `error` on every rank and leaves the older
    checkpoints as they were. Fragments that do not hold every tensor exactly once raise
    CheckpointError on every rank: going on would only hide that the state cannot be saved.
    Afterwards all but the newest `keep_last` checkpoints are deleted.
    """
    ranks = ranks or Ranks()
    return run_phases(
        save_phases(Path(run_directory), snapshot, ranks, Retention(keep_last)), ranks
    )


def run_phases(steps: Phases, ranks: Ranks) -> SaveResult:
    """Go through all phases of a save while the caller waits. Collective."""
    started = time.monotonic()
    action = next(steps)
    while True:
        try:
            action = advance(steps, partial(agree, ranks, action))
        except StopIteration as end:
            result: SaveResult = end.value
            return replace(result, stall_seconds=time.monotonic() - started)


def advance(steps: Phases, outcome: Callable[[], list[Any]]) -> Callable[[], Any]:
    """Send a phase's outcome, results or exception, and return the next action.

    Raises StopIteration with the SaveResult at the end.
    """
    try:
        results = outcome()
    except (CheckpointError, Refused, RuntimeError) as error:
        return steps.throw(error)
    return steps.send(results)


def save_phases(
    run_directory: Path,
    snapshot: Snapshot,
    ranks: Ranks,
    retention: Retention,
    check: Callable[[], None] | None = None,
) -> Phases:
    """The actions of a save in their order."""
    started = time.monotonic()
    own = RankFile(snapshot.fragments, ranks.rank)
    temporary = names.temporary_path(run_directory, snapshot.step)
    published = names.published_path(run_directory, snapshot.step)
    first = ranks.rank == 0

    def prepare() -> None:
        if check is not None:
            check()
        _prepare(run_directory, temporary, total)

    def publish() -> None:
        if check is not None:
            check()
        _publish(run_directory, snapshot, written)

    def nothing() -> None:
        return None

    def conclude() -> dict[str, Any]:
        return _conclude(run_directory, snapshot.step, damaged, retention)

    try:
        total = sum((yield lambda: own.bytes))
        yield prepare if first else nothing
        written = yield lambda: own.write(temporary)
        yield publish if first else nothing
        seconds = time.monotonic() - started
    except (CheckpointError, Refused, RuntimeError) as refusal:
        if first:
            durable.remove(temporary)
        if not isinstance(refusal, Refused):
            raise
        seconds = time.monotonic() - started
        return SaveResult(snapshot.step, None, seconds=seconds, error=str(refusal))
    damaged: list[str] = []
    try:
        damaged = [fault for fault in (yield lambda: own.damage(published)) if fault]
        outcome = (yield conclude if first else nothing)[0]
    except Refused as refusal:
        outcome = {"removed": [], "warning": f"it could not be read back ({refusal})"}
    return SaveResult(
        step=snapshot.step,
        path=None if damaged else published,
        bytes=total,
        seconds=seconds,
        checked_seconds=time.monotonic() - started,
        error="; ".join(damaged) or None,
        removed=tuple(outcome["removed"]),
        warning=outcome["warning"],
    )


def _prepare(run_directory: Path, temporary: Path, total: int) -> None:
    """Make an empty folder to write to, on a disk with enough room."""
    os.makedirs(temporary.parent, exist_ok=True)
    folders.remove_leftovers(run_directory)
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


def _publish(run_directory: Path, snapshot: Snapshot, written: list[dict[str, Any] | None]) -> None:
    """Rank 0's part: the manifest, and the rename that makes the folder a checkpoint."""
    temporary = names.temporary_path(run_directory, snapshot.step)
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
    published = names.published_path(run_directory, snapshot.step)
    replaced = names.replaced_path(run_directory, snapshot.step)
    if published.is_dir() and not replaced.exists():
        durable.rename(published, replaced)
    else:
        # Nothing, a file, or damaged: `remove_leftovers` would otherwise have deleted the one put
        # aside.
        durable.remove(published)
    durable.rename(temporary, published)


def _conclude(
    run_directory: Path, step: int, damaged: list[str], retention: Retention
) -> dict[str, Any]:
    """Rank 0's last part: delete what the new checkpoint makes needless, or take that back."""
    published = names.published_path(run_directory, step)
    if damaged:
        folders.withdraw(run_directory, step)
        return {"removed": [], "warning": None}
    try:
        durable.remove(names.replaced_path(run_directory, step))
        removed = folders.apply_retention(run_directory, retention, verified=[published])
    except OSError as error:
        return {"removed": [], "warning": f"old checkpoints stay: {error}"}
    return {"removed": removed, "warning": None}


def _manifest(snapshot: Snapshot, written: list[dict[str, Any] | None]) -> Manifest:
    parts = [part for part in written if part is not None]
    fragments = tuple(_fragment_record(row) for part in parts for row in part["fragments"])
    files = {
        part["name"]: FileRecord(
            bytes=part["bytes"], block_bytes=part["block_bytes"], crc32=tuple(part["crc32"])
        )
        for part in parts
    }
    states = cast(tuple[State, ...], tuple(snapshot.states))
    return Manifest(
        step=snapshot.step,
        tokens=snapshot.tokens,
        model_fingerprint=snapshot.model_fingerprint,
        optimizer_step=snapshot.optimizer_step,
        tensors={
            name: TensorRecord(shape=tuple(int(size) for size in shape), states=states)
            for name, shape in snapshot.tensors.items()
        },
        fragments=fragments,
        files=files,
        train_state=dict(snapshot.train_state),
        config=dict(snapshot.config),
        written_by={"megahybrid": __version__, "ranks": len(written), "time_unix": time.time()},
    )


def _fragment_record(row: Mapping[str, Any]) -> FragmentRecord:
    """Return the record of a fragment as a rank sent it.

    On its way a tuple may have become a list.
    """
    box = tuple((start, stop) for start, stop in row["box"])
    start, stop = row["flat"]
    return FragmentRecord(**{**row, "box": box, "flat": (start, stop)})


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
