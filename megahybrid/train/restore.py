"""Where a run begins: its own newest checkpoint, another run's, or nothing."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from megahybrid.checkpoint.directory import check_model
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.folders import candidates
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.manifest import Manifest, read_manifest
from megahybrid.checkpoint.reader import Reader
from megahybrid.config import RunConfig, parse_json
from megahybrid.config.explain import show
from megahybrid.errors import CheckpointError
from megahybrid.train.state import TrainState

# What may change while a run goes on: how fast, how often, and what is written beside it.
FREE = ("parallel", "checkpoint", "evaluate", "log", "kernels", "device", "directory", "start")
FREE_IN_DATA = ("tokenizer", "held_out", "sources")
FREE_IN_STAGES = ("micro_batch_tokens", "recompute")


@dataclass(frozen=True)
class Beginning:
    """What the first engine of an attempt is filled from."""

    state: TrainState
    checkpoint: Path | None = None
    take: str = "all"  # weights: moments and counters begin anew
    kernels: dict[str, str] | None = None
    parent: str | None = None  # the checkpoint of another run that this one branched off


def check_beginning(run: RunConfig, directory: Path) -> None:
    """Raise CheckpointError where what `directory` or `run.start` holds is plainly not this run's.

    Reads manifests alone and writes nothing; `find_beginning` verifies every byte.
    """
    check_model(directory, model_fingerprint(run.model), claim=False)
    for path in candidates(directory):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(path)
            break
    else:
        if run.start is not None:
            parent = checkpoint_of(Path(run.start.checkpoint))
            _check_parent(run, read_manifest(parent))
        return
    _check_same_run(run, directory, manifest)


def find_beginning(run: RunConfig, directory: Path, warnings: list[str]) -> Beginning:
    """The newest checkpoint of `directory` whose bytes are whole, else run.start, else nothing.

    Raises CheckpointError where the checkpoint is of another model or of a run that was changed in
    a way that would not continue it.
    """
    own = latest(directory, report=warnings.append)
    if own is not None:
        manifest = read_manifest(own)
        _check_same_run(run, directory, manifest)
        saved = dict(manifest.train_state)
        return Beginning(TrainState.from_json(saved), own, "all", saved.get("kernels"))
    if run.start is None:
        return Beginning(TrainState())
    parent = checkpoint_of(Path(run.start.checkpoint))
    manifest = read_manifest(parent)
    _check_parent(run, manifest)
    saved = dict(manifest.train_state)
    state = TrainState.from_json(saved) if run.start.take == "all" else TrainState()
    return Beginning(state, parent, run.start.take, saved.get("kernels"), str(parent))


def _check_parent(run: RunConfig, manifest: Manifest) -> None:
    assert run.start is not None
    found, expected = manifest.model_fingerprint, model_fingerprint(run.model)
    if found != expected:
        raise CheckpointError(
            f"start.checkpoint={run.start.checkpoint} holds another model ({found}; this run's "
            f"is {expected}). Use a checkpoint of the same model."
        )


def _checkpoint_folder(path: Path) -> Path:
    if (path / "manifest.json").exists():
        return path
    newest = latest(path)
    if newest is None:
        raise CheckpointError(
            f"{path} is no checkpoint and holds none (looked for manifest.json and checkpoints/). "
            "Name a checkpoint's folder or a run's."
        )
    return newest


def checkpoint_of(path: Path) -> Path:
    """A checkpoint's own folder, or the newest one of a run's folder."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Name a checkpoint's folder or a run's.")
    return _checkpoint_folder(path)


def run_of(reader: Reader) -> RunConfig:
    """The resolved run file that a checkpoint was written under."""
    return _config_of(reader.manifest, reader.path)


def _config_of(manifest: Manifest, path: Path) -> RunConfig:
    try:
        return parse_json(RunConfig, json.dumps(manifest.config))
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: its config cannot be read by this version ({first})."
        ) from error


def _check_same_run(run: RunConfig, directory: Path, manifest: Manifest) -> None:
    from megahybrid.config.compare import compare

    saved = _config_of(manifest, directory)
    if manifest.model_fingerprint != model_fingerprint(run.model):
        raise CheckpointError(
            f"directory={directory} holds a run of another model ({manifest.model_fingerprint}; "
            f"this one is {model_fingerprint(run.model)}). "
            "Use another directory, or the model it had."
        )
    begun = sum(end < manifest.tokens for end in saved.stage_plan.stage_ends) + 1
    for path, old, new in compare(saved, run):
        if path.startswith("(") or _may_change(path, begun):
            continue
        raise CheckpointError(
            f"{path}={show(new)} is not what the run in {directory} was started with "
            f"({show(old)}; it is at step {manifest.step}). Set it back, or use another directory."
        )


def _may_change(path: str, stages_begun: int) -> bool:
    parts = path.split(".")
    # Sources may move or be added: the order checks by fingerprint what it has begun to read.
    if parts[0] in FREE or (parts[0] == "data" and parts[1] in FREE_IN_DATA):
        return True
    if parts[0] == "stages" and len(parts) > 1:
        return int(parts[1]) >= stages_begun or (len(parts) > 2 and parts[2] in FREE_IN_STAGES)
    return parts[0] == "max_skipped_in_a_row"
