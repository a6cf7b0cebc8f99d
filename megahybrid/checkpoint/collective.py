"""One action on every rank, and one outcome for all: a failure of one is every rank's failure.

The ranks that save together, as two numbers and one function: no process group is known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megahybrid.errors import CheckpointError, MegahybridError


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `count`.

    `gather(value)` is collective: every rank gives a JSON-able value and every rank receives the
    list of all, in order of rank. It is the only communication, and so also the barrier.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone


ActionOutcome = dict[str, Any]


class Refused(Exception):
    """Some rank's machine refused its part (a full disk); all ranks raise this together."""


def perform(action: Callable[[], Any]) -> ActionOutcome:
    """The result of an action or what it failed with, JSON-able, to be told to the other ranks."""
    answer: ActionOutcome = {
        "value": None,
        "refused": None,
        "wrong": None,
        "code": 0,
        "broken": None,
    }
    try:
        answer["value"] = action()
    except MegahybridError as error:
        answer["wrong"], answer["code"] = str(error), error.exit_code
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        answer["refused"] = f"{error.strerror or error}{where}"
    except Exception as error:
        # A mistake of ours: without an answer the other ranks would wait for ever.
        answer["broken"] = f"{type(error).__name__}: {error}"
    return answer


def exchange(ranks: Ranks, answer: ActionOutcome) -> list[Any]:
    """Every rank's result, on every rank; or the same exception on every rank. Collective."""
    answers = ranks.gather(answer)
    for rank, other in enumerate(answers):
        if other["broken"]:
            raise RuntimeError(f"rank {rank} could not save: {other['broken']}")
        if other["wrong"]:
            wrong = CheckpointError(other["wrong"])
            wrong.exit_code = other["code"]
            raise wrong
    for rank, other in enumerate(answers):
        if other["refused"]:
            raise Refused(f"rank {rank}: {other['refused']}")
    return [other["value"] for other in answers]


def agree(ranks: Ranks, action: Callable[[], Any]) -> list[Any]:
    """`perform` and `exchange` at once. Collective."""
    return exchange(ranks, perform(action))
