"""Results of evaluations, kept in the run's folder for its report."""

import json
from pathlib import Path
from typing import Any

from megahybrid.heartbeat import write_whole
from megahybrid.run_folder import EVALUATIONS


def result_path(run: Path, step: int, kind: str, name: str) -> Path:
    """Return the file in which a run keeps a result of one step."""
    return run / EVALUATIONS / f"step-{step:08d}.{kind}.{name}.json"


def write_result(run: Path, step: int, kind: str, name: str, result: dict[str, Any]) -> Path:
    """Write a result into the run's `evaluations`, whole or not at all."""
    path = result_path(run, step, kind, name)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(result, indent=1))
    return path
