"""Where a run begins: its own newest checkpoint, another run's, or nothing."""

import json
from dataclasses import dataclass
from pathlib import Path

from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.reader import Reader
from megahybrid.config import RunConfig, parse_json
from megahybrid.errors import CheckpointError
from megahybrid.train.state import TrainState

# What may change while a run goes on: how fast, how often, and what is written beside it.
FREE = ("parallel", "checkpoint", "evaluate", "log", "kernels", "device", "directory", "start")
FREE_IN_STAGES = ("micro_batch_tokens", "recompute")


@dataclass(frozen=True)
class Beginning:
    """What the first engine of an attempt is filled from."""

    state: TrainState
    checkpoint: Path | None = None
    take: str = "all"  # weights: moments and counters begin anew
    kernels: dict[str, str] | None = None
    parent: str | None = None  # the checkpoint of another run that this one branched off


def find_beginning(run: RunConfig, directory: Path, warnings: list[str]) -> Beginning:
    """The newest checkpoint of `directory` whose bytes are whole, else run.start, else nothing.

    Raises CheckpointError where the checkpoint is of another model or of a run that was changed in
    a way that would not continue it.
    """
    own = latest(directory, report=warnings.append)
    if own is not None:
        with Reader(own) as reader:
            _check_same_run(run, reader)
            saved = dict(reader.manifest.train_state)
        return Beginning(TrainState.from_json(saved), own, "all", saved.get("kernels"))
    if run.start is None:
        return Beginning(TrainState())
    parent = _checkpoint_folder(Path(run.start.checkpoint))
    with Reader(parent) as reader:
        found, expected = reader.manifest.model_fingerprint, model_fingerprint(run.model)
        if found != expected:
            raise CheckpointError(
                f"start.checkpoint={run.start.checkpoint} holds another model ({found}; this run's "
                f"is {expected}). Use a checkpoint of the same model."
            )
        saved = dict(reader.manifest.train_state)
    state = TrainState.from_json(saved) if run.start.take == "all" else TrainState()
    return Beginning(state, parent, run.start.take, saved.get("kernels"), str(parent))


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
    try:
        return parse_json(RunConfig, json.dumps(reader.manifest.config))
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{reader.path}: its config cannot be read by this version ({first})."
        ) from error


def _check_same_run(run: RunConfig, reader: Reader) -> None:
    from megahybrid.config.compare import compare

    saved = run_of(reader)
    if model_fingerprint(saved.model) != model_fingerprint(run.model):
        raise CheckpointError(
            f"directory={reader.path.parent.parent} holds a run of another model "
            f"({model_fingerprint(saved.model)}; this one is {model_fingerprint(run.model)}). "
            "Use another directory, or the model it had."
        )
    tokens = reader.manifest.tokens
    begun = sum(end < tokens for end in saved.stage_plan.stage_ends) + 1
    for path, old, new in compare(saved, run):
        if path.startswith("(") or _may_change(path, begun):
            continue
        raise CheckpointError(
            f"{path}={new} is not what this run was started with ({old}; step "
            f"{reader.manifest.step} in {reader.path.parent.parent}). Restore it, or start a "
            "new run in another directory."
        )


def _may_change(path: str, stages_begun: int) -> bool:
    parts = path.split(".")
    if parts[0] in FREE or path == "data.tokenizer" or parts[:2] == ["data", "held_out"]:
        return True
    if parts[0] == "stages" and len(parts) > 1:
        return int(parts[1]) >= stages_begun or (len(parts) > 2 and parts[2] in FREE_IN_STAGES)
    return parts[0] == "max_skipped_in_a_row"
