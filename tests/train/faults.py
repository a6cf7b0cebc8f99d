"""What goes wrong on purpose: each function prepares one rank of a run before it starts."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.example import STEPS


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Call `action` with the arguments of each call of owner.name, before it."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _announce(file: str) -> Callable[..., None]:
    def announce(attempt: Any, *_: Any, **__: Any) -> None:
        (Path(attempt.directory) / file).touch()
        time.sleep(0.5)

    return announce


def slow_validation(rank: int) -> None:
    from megahybrid.train.run import Attempt

    _before(Attempt, "evaluate", _announce("validating"))


def slow_save(rank: int) -> None:
    from megahybrid.train.run import Attempt

    _before(Attempt, "save", _announce("saving"))


def stop_in_last_step(rank: int) -> None:
    _at_step(STEPS, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def _at_step(step: int, action: Callable[..., None]) -> None:
    """Call `action` with the engine before training step number `step`, counted from 1."""
    from megahybrid.train.engine import Engine

    done = [0]

    def count(engine: Any, *_: Any, **__: Any) -> None:
        done[0] += 1
        if done[0] == step:
            action(engine)

    _before(Engine, "train_step", count)


def raises_on_one_rank(rank: int) -> None:
    def divide(_engine: Any) -> None:
        raise ZeroDivisionError("on purpose")

    if rank == 1:
        _at_step(3, divide)


def user_mistake_on_one_rank(rank: int) -> None:
    from megahybrid.errors import DataError

    def refuse(_engine: Any) -> None:
        raise DataError("books/shard-00000.bin: on purpose.")

    if rank == 1:
        _at_step(3, refuse)
