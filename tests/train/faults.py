"""What goes wrong on purpose: each function prepares one rank of a run before it starts."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.train.example import STEPS

KILLED_AT = 60  # exchanges of a rank: after the first checkpoint with context ranks


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Call `action` with the arguments of each call of owner.name, before it."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _announce(file: str, seconds: float) -> Callable[..., None]:
    def announce(loop: Any, *_: Any, **__: Any) -> None:
        (loop.parts.directory / file).touch()
        time.sleep(seconds)

    return announce


def slow_validation(rank: int) -> None:
    """Half a second for each batch of it, and it says when it begins."""
    from megahybrid.evaluate import loss
    from megahybrid.train.stage_loop import StageLoop

    _before(StageLoop, "evaluate", _announce("begun", 0))
    _before(loss.torch, "bucketize", lambda *_, **__: time.sleep(0.5))


def slow_save(rank: int) -> None:
    from megahybrid.train.stage_loop import StageLoop

    _before(StageLoop, "save", _announce("begun", 0.5))


def no_data_on_one_rank(rank: int) -> None:
    """From the third step on a disk does not answer."""
    from megahybrid.data import loader

    read, done = loader.read_step, [0]

    def stalled(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        if done[0] > 3 and rank == 1:
            Path("run/begun").touch()
            time.sleep(3600)
        return read(*args, **kwargs)

    loader.read_step = stalled


def slow_first_step(rank: int) -> None:
    """As when kernels are compiled, before each micro-batch."""
    from megahybrid.model.transformer import Transformer

    def wait(model: Any, *_: Any) -> None:
        if model.training:
            Path("run/begun").touch()
            time.sleep(1.0)

    _before(Transformer, "forward", wait)


def slow_start(rank: int) -> None:
    from megahybrid.train.stage_loop import StageLoop

    _before(StageLoop, "_engine", _announce("begun", 1.0))


def stop_in_last_step(rank: int) -> None:
    _at_step(STEPS, _stop)


def slow_steps(rank: int) -> None:
    """No fault: time enough to send signals between the steps that a test waits for."""
    from megahybrid.train.engine import Engine

    _before(Engine, "train_step", lambda *_, **__: time.sleep(0.1))


def _stop(_engine: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


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


def killed_in_third_step(rank: int) -> None:
    _at_step(3, lambda _engine: os.kill(os.getpid(), signal.SIGKILL))


def killed_in_seventh_step(rank: int) -> None:
    _at_step(7, lambda _engine: os.kill(os.getpid(), signal.SIGKILL))


def killed_in_thirteenth_step(rank: int) -> None:
    _at_step(13, lambda _engine: os.kill(os.getpid(), signal.SIGKILL))


def user_mistake_on_one_rank(rank: int) -> None:
    from megahybrid.errors import DataError

    def refuse(_engine: Any) -> None:
        raise DataError("books/shard-00000.bin: on purpose.")

    if rank == 1:
        _at_step(3, refuse)


def record_rows_and_stop(rank: int) -> None:
    record_rows(rank)
    _at_step(7, _stop)


def record_rows(rank: int) -> None:
    """No fault: every row that is trained on, into rows-ATTEMPT-RANK.jsonl of the run's folder."""
    import megahybrid.train.stage_loop as module
    from megahybrid.data.loader import BatchLoader, StepData

    directory = [Path()]
    _before(module.StageLoop, "run", lambda loop, *_: directory.append(loop.parts.directory))

    class Recorder(BatchLoader):
        def __next__(self) -> StepData:
            step = super().__next__()
            rows = [
                {"tokens": tokens, "targets": targets, "starts": starts}
                for batch in step.micro_batches
                for tokens, targets, starts in zip(
                    batch.tokens.tolist(), batch.targets.tolist(), batch.starts.tolist(),
                    strict=True,
                )
            ]  # fmt: skip
            plans = [[plan.source, [list(span) for span in plan.spans]] for plan in step.plans]
            with open(directory[-1] / f"rows-{rank}.jsonl", "a") as file:
                file.write(json.dumps({"plans": plans, "rows": rows}) + "\n")
            return step

    module.BatchLoader = Recorder  # type: ignore[misc]


def no_wrap_of_norms(rank: int) -> None:
    from megahybrid.model import norm

    norm.copy_to_tensor = lambda weight, axis: weight  # type: ignore[assignment]


def no_wrap_of_shared_heads(rank: int) -> None:
    from megahybrid.parallel import linear

    linear.all_reduce = lambda gradient, axis: gradient  # type: ignore[assignment]


def _marks(value: bool | None) -> None:
    """Marks that say the same of every parameter, or none."""
    from megahybrid.model.transformer import Transformer

    original = Transformer.__init__

    def build(model: Any, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        for parameter in model.parameters():
            if value is None:
                del parameter.tensor_model_parallel
            else:
                parameter.tensor_model_parallel = value

    Transformer.__init__ = build  # type: ignore[method-assign]


def marks_on_all(rank: int) -> None:
    _marks(True)


def marks_on_none(rank: int) -> None:
    _marks(False)


def marks_forgotten(rank: int) -> None:
    _marks(None)


def another_replica(rank: int) -> None:
    """From step 6 on, one rank's final norm has other weights than its peer's."""

    def change(engine: Any) -> None:
        for piece in engine.state.pieces:
            if piece.name == "final_norm.weight":
                piece.view("weight", engine.optimizer).add_(0.01)

    if rank == 1:
        _at_step(6, change)


def no_number_in_third_step(rank: int) -> None:
    if rank == 1:
        _poison(lambda step: step == 3)


def no_numbers(rank: int) -> None:
    if rank == 1:
        _poison(lambda step: True)


def spike_in_ninth_step(rank: int) -> None:
    """A gradient and a loss that are finite and far too large, once."""
    _poison(lambda step: step == 9, 1e4)


def spikes_from_the_ninth_step(rank: int) -> None:
    _poison(lambda step: step >= 9, 1e4)


def spike_and_kill(rank: int) -> None:
    """The same, and one rank killed two steps later."""
    spike_in_ninth_step(rank)
    if rank == 1:
        _at_step(11, lambda _engine: os.kill(os.getpid(), signal.SIGKILL))


def flipped_bit_after_fifth_step(rank: int) -> None:
    """A weight of one rank that is not what it was, by its lowest bit."""
    import torch

    def flip(engine: Any) -> None:
        with torch.no_grad():
            bits = next(engine.model.parameters()).view(-1).view(torch.int32)
            bits[7] ^= 1

    if rank == 1:
        _at_step(6, flip)


def _poison(when: Callable[[int], bool], factor: float = float("nan")) -> None:
    """A loss, and so a gradient, that is no number, or far too large."""
    from megahybrid.model.transformer import Transformer
    from megahybrid.train.engine import Engine

    step = [0]
    original = Transformer.forward

    def count(*_: Any, **__: Any) -> None:
        step[0] += 1

    def forward(model: Any, *args: Any) -> Any:
        loss, per_token = original(model, *args)
        return (loss * factor if model.training and when(step[0]) else loss), per_token

    _before(Engine, "train_step", count)
    Transformer.forward = forward  # type: ignore[method-assign]


def slow_steps_on_a_small_disk(rank: int) -> None:
    """No fault: a save that asks for no more room than it takes."""
    from megahybrid.checkpoint import writer

    slow_steps(rank)
    writer.SPARE_BYTES = 0


def a_data_file_that_fails(rank: int) -> None:
    """From step 6 on the disk under the data gives nothing."""
    from megahybrid.data import shard_files

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    broken = SimpleNamespace(open=os.open, close=os.close, O_RDONLY=os.O_RDONLY, preadv=refuse)
    _at_step(6, lambda _engine: setattr(shard_files, "os", broken))


def a_data_file_that_vanishes(rank: int) -> None:
    """From step 6 on; a file is opened anew for each read, as of a dataset with many."""
    from megahybrid.data.shard_files import ShardFiles

    def delete(_engine: Any) -> None:
        for path in Path().glob("*/shard-*.bin"):
            path.unlink(missing_ok=True)

    _before(ShardFiles, "read_into", lambda files, *_: files._open.clear())
    _at_step(6, delete)


def a_run_folder_that_vanishes(rank: int) -> None:
    if rank == 0:
        _at_step(6, lambda _engine: shutil.rmtree("run"))


def a_cursor_too_far(rank: int) -> None:
    """The data begin some rows after where the checkpoint says."""
    from megahybrid.data.mixture import Mixture

    restore = Mixture.restore

    def elsewhere(mixture: Any, plain: Any) -> Any:
        return mixture.plan_step(restore(mixture, plain), 64, 4)[1]

    Mixture.restore = elsewhere  # type: ignore[method-assign]


def a_moment_lost(rank: int) -> None:
    """The first moments come back as zeros."""
    from megahybrid.train.engine import Engine

    load = Engine.load

    def lossy(engine: Any, read: Any, step: Any) -> None:
        def without(name: str, state: str, *rest: Any, **more: Any) -> Any:
            found = read(name, state, *rest, **more)
            if state == "exp_avg":
                found[:] = 0
            return found

        load(engine, without, step)

    Engine.load = lossy  # type: ignore[method-assign]


def a_rate_a_hundredth_higher(rank: int) -> None:
    from megahybrid.train.engine import Engine

    step = Engine.train_step
    Engine.train_step = (  # type: ignore[method-assign]
        lambda engine, batches, rate, **more: step(engine, batches, rate * 1.01, **more)
    )


def killed_in_an_exchange(rank: int) -> None:
    """Rank 1, between what it sends and what comes, in the run's second stage."""
    if rank != 1:
        return
    from megahybrid.parallel import exchange

    start, done = exchange.start_all_to_all, [0]

    def killed(*args: Any, **kwargs: Any) -> Any:
        pending = start(*args, **kwargs)
        done[0] += 1
        if done[0] > KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return pending

    exchange.start_all_to_all = killed
