"""The results of evaluations that commands and training left in a run's folder, as JSON files."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.errors import MegahybridError, first_line, from_os_error
from megahybrid.report.shapes import wrong_result
from megahybrid.run_folder import EVALUATIONS

KINDS = ("attention", "context_gain", "lm_eval", "loss", "suite")


@dataclass(frozen=True)
class EvaluationFile:
    """A file of a run's `evaluations`: what kind of evaluation it is, of which step, and its
    result."""

    kind: str  # one of KINDS
    name: str
    step: int
    result: dict[str, Any]


def read_evaluations(directory: Path) -> list[EvaluationFile]:
    """Read every result of the run, by step. Raises MegahybridError where a file is damaged."""
    found = []
    for path in sorted((directory / EVALUATIONS).glob("step-*.json")):
        parts = re.fullmatch(
            rf"step-([0-9]{{1,15}})\.({'|'.join(KINDS)})\.(.+)\.json", path.name, re.S
        )
        if parts is None:
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise MegahybridError(f"{path} is damaged ({first_line(error)}). Remove it.") from None
        except FileNotFoundError:
            continue  # removed since it was listed
        except OSError as error:
            raise from_os_error(error) or error from None
        wrong = wrong_result(parts[2], result)
        if wrong is not None:
            raise MegahybridError(f"{path} is damaged ({wrong}). Remove it.")
        found.append(EvaluationFile(parts[2], parts[3], int(parts[1]), result))
    return sorted(found, key=lambda one: one.step)


def analyses_to_draw(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Choose one analysis of each task: of the longest texts not beyond the trained length (else
    the shortest) the one whose needle lies nearest to the middle."""
    found = []
    results, trained = result["results"], result.get("trained_length", math.inf)
    for task in dict.fromkeys(one["task"] for one in results):
        mine = [one for one in results if one["task"] == task]
        lengths = sorted({one["length"] for one in mine})
        length = max((n for n in lengths if n <= trained), default=lengths[0])
        fitting = [one for one in mine if one["length"] == length]
        found.append(min(fitting, key=lambda one: abs(one.get("depth", 0.5) - 0.5)))
    return found


def newest_evaluations(directory: Path) -> list[EvaluationFile]:
    """Read the newest result of each kind and name, ordered by these."""
    found = {(one.kind, one.name): one for one in read_evaluations(directory)}
    return [found[key] for key in sorted(found)]
