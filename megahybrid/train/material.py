"""What suites need of a trained model's run: its tokenizer and held-out sets, and a place to keep
results."""

import json
from pathlib import Path
from typing import Any

from megahybrid.config import RunConfig
from megahybrid.config.suite import HeldOutHaystack, NeedleTask, RulerTask, Suite, SyntheticTask
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.evaluate.haystack import Material
from megahybrid.heartbeat import write_whole
from megahybrid.train.held_out import open_held_out
from megahybrid.train.ledger import EVALUATIONS
from megahybrid.train.sample_command import tokenizer_of
from megahybrid.train.trained_model import TrainedModel


def material_of(run: RunConfig, suite: Suite, tokenizer: Path | None = None) -> Material:
    """The tokenizer and held-out sets that the suite's tasks ask for, and no other."""
    tasks = list(suite.tasks.values())
    words: Tokenizer | None = None
    if not all(isinstance(task, SyntheticTask) for task in tasks) and (
        tokenizer is not None or run.data.tokenizer is not None
    ):
        words = tokenizer_of(run, tokenizer)[0]
    hays = [task.haystack for task in tasks if isinstance(task, NeedleTask)]
    hays += [task.essay for task in tasks if isinstance(task, RulerTask)]
    needs_sets = any(isinstance(hay, HeldOutHaystack) for hay in hays)
    return Material(
        vocab_size=run.model.vocab_size if words is None else words.info.vocab_size,
        tokenizer=words,
        held_out=open_held_out(run) if needs_sets else {},
    )


def header(trained: TrainedModel) -> dict[str, Any]:
    """Which model a result is of."""
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "tokens": trained.tokens,
        "stage": trained.stage.name,
        "trained_length": trained.length,
        "device": trained.mesh.device.type,
        "precision": trained.precision,
        "changes": list(trained.changes),
    }


def keep(trained: TrainedModel, kind: str, name: str, result: dict[str, Any]) -> Path | None:
    """Writes a result into the run's `evaluations`, for its report: `step-….kind.name.json`.

    None where the checkpoint lies in no run, the run cannot be written to, or schemes were changed:
    the report is about the model as it was trained. Only rank 0 writes.
    """
    if trained.changes or trained.mesh.rank:
        return None
    checkpoints = trained.checkpoint.resolve().parent
    if checkpoints.name != "checkpoints":
        return None
    try:
        return write_result(checkpoints.parent, trained.step, kind, name, result)
    except OSError:
        return None


def result_path(run: Path, step: int, kind: str, name: str) -> Path:
    """Where a run keeps a result of one step."""
    return run / EVALUATIONS / f"step-{step:08d}.{kind}.{name}.json"


def write_result(run: Path, step: int, kind: str, name: str, result: dict[str, Any]) -> Path:
    """Puts a result into the run's `evaluations`, whole or not at all."""
    path = result_path(run, step, kind, name)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(result, indent=1))
    return path
