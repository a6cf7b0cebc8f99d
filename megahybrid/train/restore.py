"""Where a run begins: its own newest checkpoint, another run's, or nothing."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, assert_never

from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.directory import check_model
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.folders import candidates
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megahybrid.checkpoint.names import checkpoints_of
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.config import RunConfig, parse_json
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.base import did_you_mean, dump
from megahybrid.config.counting import parameters
from megahybrid.config.explain import show
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import first_fault
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import Mixture, carried_state
from megahybrid.errors import CheckpointError, ConfigError, first_line
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.printable import shortened
from megahybrid.train.state import TrainState

# What may change while a run goes on: how fast, how often, and what is written beside it.
FREE = ("parallel", "checkpoint", "evaluate", "log", "kernels", "device", "directory", "start")
FREE_IN_DATA = ("tokenizer", "held_out", "sources")
FREE_IN_STAGES = ("micro_batch_tokens", "recompute", "gates")


@dataclass(frozen=True)
class ResumePoint:
    """The state and the checkpoint from which the next engine goes on."""

    state: TrainState
    checkpoint: Path | None = None
    # weights: moments and counters begin anew; state: counters alone
    take: Literal["weights", "state", "all"] = "all"
    kernels: ChosenKernels | None = None
    # Where the run branched off another one: {checkpoint, step, tokens, take}, for ever.
    parent: dict[str, Any] | None = None
    resumes: bool = False  # from a checkpoint of its own
    # (dotted field, what the checkpoint was written with, what it is now)
    changes: tuple[tuple[str, Any, Any], ...] = ()


def check_resume_point(run: RunConfig, directory: Path, allow: Sequence[str] = ()) -> None:
    """Raise CheckpointError where what `directory` or `run.start` holds is plainly not this run's.

    Reads manifests alone and writes nothing; `locate` verifies every byte.
    """
    _check_allowed(allow, run)
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
    _check_same_run(run, directory, manifest, allow)


def locate(
    run: RunConfig, directory: Path, report: Callable[[str], None], ranks: Ranks
) -> Path | None:
    """Return the checkpoint to begin from, every byte of it verified: the newest whole one of
    `directory`, else run.start's, else None. Collective; each rank reads its part.

    Raises CheckpointError where one is wanted and none is whole; `report` hears of those passed
    over.
    """
    own = latest(directory, report, ranks)
    if own is not None or run.start is None:
        return own
    folder = Path(run.start.checkpoint)
    if (folder / MANIFEST_NAME).exists():
        verify(folder, ranks)
        return folder
    return _named(folder, latest(folder, report, ranks))


def find_resume_point(
    run: RunConfig, directory: Path, located: Path | None, allow: Sequence[str] = ()
) -> ResumePoint:
    """Return how this attempt begins from what `locate` found.

    Raises CheckpointError where the checkpoint is of another model or of a run that was changed in
    a way that would not continue it, unless `allow` names the changed field.
    """
    if located is None:
        return ResumePoint(TrainState())
    manifest = read_manifest(located)
    saved = dict(manifest.train_state)
    if missing := [name for name in TrainState.KEPT if name not in saved]:
        raise CheckpointError(
            f"{located}: train_state lacks {', '.join(missing)}, so training cannot go on from it. "
            "Start from its weights alone (start.take=weights), or use another step's folder."
        )
    state = TrainState.from_json(saved)
    kernels, parent = ChosenKernels.from_json(saved.get("kernels")), saved.get("parent")
    if checkpoints_of(directory) == located.parent:
        changes = _check_same_run(run, directory, manifest, allow)
        if any(_named_in(path, allow) for path, *_ in changes):
            state = replace(state, data=_carried(run, state.data))
        return ResumePoint(state, located, "all", kernels, parent, True, tuple(changes))
    assert run.start is not None
    _check_parent(run, manifest)
    take = run.start.take
    parent = {
        "checkpoint": str(located.resolve()),
        "step": manifest.step,
        "tokens": manifest.tokens,
        "take": take,
    }
    match take:
        case "all":
            state = replace(state, data=_carried(run, state.data))
        case "state" | "weights":
            state = TrainState()
        case _:
            assert_never(take)
    return ResumePoint(state, located, take, kernels, parent)


def positioned(mixture: Mixture, data: dict[str, Any]) -> dict[str, Any]:
    """Return the position in the data that a checkpoint holds, or their beginning.

    Raises DataError where it does not fit the data, CheckpointError where it is none.
    """
    try:
        found = mixture.restore(data) if data else mixture.start()
        for name in ("weights", "since", "longest"):
            _ = found[name]  # asked for by the first row
        return found
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _no_position(error) from error


def _no_position(error: Exception) -> CheckpointError:
    what = shortened(f"{type(error).__name__}: {first_line(error)}")
    return CheckpointError(
        f"train_state.data of the checkpoint is no position in the data ({what}). "
        "Use another step's folder."
    )


def _carried(run: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    numbers = {"seed": run.seed, "block_tokens": run.data.block_tokens, "lanes": run.data.lanes}
    files = {name: TokenDataset(it.path).fingerprint for name, it in run.data.sources.items()}
    try:
        return carried_state(data, numbers, files)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _no_position(error) from error


def _check_parent(run: RunConfig, manifest: Manifest) -> None:
    assert run.start is not None
    found, expected = manifest.model_fingerprint, model_fingerprint(run.model)
    if found != expected:
        raise CheckpointError(
            f"start.checkpoint={run.start.checkpoint} holds another model ({found}; this run's "
            f"is {expected}). Use a checkpoint of the same model."
        )


def _checkpoint_folder(path: Path) -> Path:
    if (path / MANIFEST_NAME).exists():
        return path
    return _named(path, latest(path))


def _named(path: Path, newest: Path | None) -> Path:
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


def plan_of(run: RunConfig, manifest: Manifest, path: Path) -> LayerPlan:
    """The layer plan of the step that wrote a checkpoint: the stage's, and where it anneals, that
    of its last token. Raises CheckpointError where the checkpoint says another."""
    plan = run.plan_after(manifest.tokens)
    for name, kept in (manifest.train_state.get("schemes") or {}).items():
        found = plan.schemes.get(name)
        if not _means(kept, found):
            made = None if found is None else dump(found)
            raise CheckpointError(
                f"{path}: scheme '{name}' was {show(kept)} when it was written, and this version "
                f"makes {show(made)} of its config. Use the version that wrote it "
                f"({manifest.written_by.get('megahybrid', 'unknown')})."
            )
    return plan


def _means(kept: Any, found: AttentionScheme | None) -> bool:
    """Return whether what a checkpoint says of a scheme is read as `found`: words and fields that
    came later do not part them."""
    try:
        return AttentionScheme.model_validate_json(json.dumps(kept)) == found
    except ValueError:
        return False


def _config_of(manifest: Manifest, path: Path) -> RunConfig:
    """The resolved run file in a manifest. Raises CheckpointError where its model is not the one
    whose tensors the checkpoint holds: nothing is built or counted of another."""
    layers = _inner(_inner(_inner(manifest.config, "model"), "layer_plan"), "num_layers")
    if isinstance(layers, int) and layers > len(manifest.tensors):  # a billion would be written out
        raise _another_model(path, f"{layers} layers", manifest)
    try:
        run = parse_json(RunConfig, json.dumps(manifest.config))
    except (ValueError, ConfigError) as error:
        wrong = first_line(error)
        if isinstance(error, ValueError):
            wrong = first_fault(error, RunConfig, manifest.config)
        raise CheckpointError(
            f"{path}: its config cannot be read by this version ({wrong}). Use the version that "
            f"wrote it ({manifest.written_by.get('megahybrid', 'unknown')})."
        ) from error
    if not _describes(run.model, manifest):
        size = f"{run.model.layer_plan.num_layers} layers of {run.model.hidden_size}"
        raise _another_model(path, size, manifest)
    return run


def _another_model(path: Path, described: str, manifest: Manifest) -> CheckpointError:
    return CheckpointError(
        f"{path}: its config describes another model ({described}) than the one it holds "
        f"({manifest.model_fingerprint}). Use another step's folder."
    )


def _describes(model: ModelConfig, manifest: Manifest) -> bool:
    """Return whether a checkpoint's tensors, bounded by its bytes, are of this model."""
    held = sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
    return model_fingerprint(model) == manifest.model_fingerprint and parameters(model) == held


def _check_same_run(
    run: RunConfig, directory: Path, manifest: Manifest, allow: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """The fields that differ from those the checkpoint was written with, all of them harmless or
    named in `allow`; else CheckpointError."""
    from megahybrid.config.compare import compare

    saved = _config_of(manifest, directory)
    if manifest.model_fingerprint != model_fingerprint(run.model):
        raise CheckpointError(
            f"directory={directory} holds a run of another model ({manifest.model_fingerprint}; "
            f"this one is {model_fingerprint(run.model)}). "
            "Use another directory, or the model it had."
        )
    begun = sum(end < manifest.tokens for end in saved.stage_plan.stage_ends) + 1
    _check_allowed(allow, run, saved)
    changes = [
        row for row in compare(saved, run) if not row[0].startswith("(") and row[0] != "directory"
    ]
    for path, old, new in changes:
        if not (_may_change(path, begun) or _named_in(path, allow)):
            raise CheckpointError(
                f"{path}={show(new)} is not what the run in {directory} was started with "
                f"({show(old)}; it is at step {manifest.step}). Set it back, use another "
                f"directory, or say that it is meant: --allow {path}."
            )
    return changes


def _check_allowed(allow: Sequence[str], *runs: RunConfig) -> None:
    """Raise ConfigError for a name in `allow` that is no field, now or in the checkpoint."""
    from megahybrid.config.explain import fields_at

    for name in allow:
        parts = name.split(".")
        for run in runs:
            plain = dump(run)
            here, known = plain, True
            for at, part in enumerate(parts):
                names = fields_at(RunConfig, parts[:at], plain)
                if isinstance(here, dict):
                    names += [str(key) for key in here]
                elif isinstance(here, list):
                    names += [str(index) for index in range(len(here))]
                if part not in names:
                    known = False
                    break
                here = _inner(here, part)
            if known:
                break
        else:
            shown = f" Fields here: {', '.join(dict.fromkeys(names[:8]))}." if names else ""
            nearest = did_you_mean(part, names) or shown or " Leave it out."
            raise ConfigError(
                f"--allow={name} names no field of this run ('{part}' is none).{nearest}"
            )


def _inner(plain: Any, part: str) -> Any:
    if isinstance(plain, dict):
        return plain.get(part)
    return plain[int(part)] if isinstance(plain, list) and part.isdecimal() else None


def _named_in(path: str, allow: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in allow)


def _may_change(path: str, stages_begun: int) -> bool:
    parts = path.split(".")
    # Sources may move or be added: the order checks by fingerprint what it has begun to read.
    if parts[0] in FREE or (parts[0] == "data" and parts[1] in FREE_IN_DATA):
        return True
    if parts[0] == "stages" and len(parts) > 1:
        return int(parts[1]) >= stages_begun or (len(parts) > 2 and parts[2] in FREE_IN_STAGES)
    return parts[0] == "max_skipped_in_a_row"
