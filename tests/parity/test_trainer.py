"""A run through `Trainer`, its rate changing at every step, is the plain training loop: what the
ledger says was applied is what was applied. And each of many faults planted in it is seen.

The plain side has the rule of rates, decay and multipliers written out by hand.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor

from megahybrid.config.run import RunConfig
from megahybrid.data.loader import BatchLoader
from megahybrid.heartbeat import Heartbeat
from tests import distributed
from tests.parity.planted import BATCH_TOKENS, MUP_PLANTS, PLANTS, START
from tests.parity.test_engine import RankRun, joined_weights
from tests.plain_model import random_tensors, relative_error
from tests.plain_training import (
    MicroBatch,
    PlainRun,
    plain_adamw_run,
    plain_decay,
    plain_multiplier,
)
from tests.train.example import RUN, write_data

BOUND = 1e-5
SEEN = 5 * BOUND
MICRO_TOKENS, LENGTH = 128, 64
END, WARMUP = 2e-4, 700
STEPS = 6  # two of each stage
OPTIMIZER = {"weight_decay": 0.5, "eps": 1e-5, "clip_norm": 0.5, "betas": [0.8, 0.95]}


@dataclass(frozen=True)
class Layout:
    """How a run is spread, and its parametrisation."""

    tensor: int = 1
    data: int = 1
    zero_stage: int = 1
    base_hidden_size: int | None = None  # of muP; the model's is 32


LAYOUTS = {
    "single-zero0": Layout(zero_stage=0),
    "single": Layout(),
    "single-mup": Layout(base_hidden_size=8),
    "tensor2-zero3": Layout(tensor=2, zero_stage=3),
    "data2-zero2-mup": Layout(data=2, zero_stage=2, base_hidden_size=16),
}


def rates() -> list[float]:
    """Of each step: a straight line behind a warm-up, half a cosine, a plateau with a descent."""
    return [
        START * BATCH_TOKENS / WARMUP,
        END,
        END + (START - END) * 0.5 * (1 + math.cos(math.pi / 2)),
        END,
        START,
        END,
    ]


def config_of(layout: Layout, folder: Path) -> RunConfig:
    """Three stages of two steps on two sources of documents."""
    said = yaml.safe_load(RUN)
    kinds: list[dict[str, Any]] = [
        {"kind": "linear", "warmup_tokens": WARMUP},
        {"kind": "cosine"},
        {"kind": "wsd", "decay_tokens": BATCH_TOKENS},
    ]
    said["stages"] = [
        {
            "name": f"stage{index}",
            "tokens": 2 * BATCH_TOKENS,
            "lengths": {LENGTH: 1},
            "batch_tokens": BATCH_TOKENS,
            "micro_batch_tokens": MICRO_TOKENS,
            "weights": {"books": 1, "code": 1},
            "learning_rate": {"start": START, "end": END} | kind,
        }
        for index, kind in enumerate(kinds)
    ]
    sources = {name: {"path": str(folder / name)} for name in ("books", "code")}
    said["data"] |= {"sources": sources, "held_out": {}}
    said["optimizer"] = dict(OPTIMIZER)
    if layout.base_hidden_size is not None:
        said["optimizer"] |= {
            "parametrisation": "mup",
            "base_hidden_size": layout.base_hidden_size,
        }
    said["parallel"] = {"tensor": layout.tensor, "zero_stage": layout.zero_stage}
    said["evaluate"], said["log"] = {"every_steps": None}, {"audit_every_steps": 1}
    return RunConfig.model_validate(said)


@dataclass
class Trained:
    """What a rank's run gave, and the rows that it was given."""

    rank: RankRun
    learning_rates: list[float]
    batches: list[list[MicroBatch]]
    said: str = ""  # by the audit, where it stopped the run


class Recorded(BatchLoader):
    """A loader that keeps what it gives."""

    batches: list[list[MicroBatch]]

    def __next__(self) -> Any:
        data = super().__next__()
        rows = [batch.tensors() for batch in data.micro_batches]
        self.batches.append([MicroBatch(row.tokens, row.targets, row.starts) for row in rows])
        return data


def trained(ranks: distributed.Ranks, layout: Layout, plant: str = "nothing") -> Trained:
    """The run on this rank, through the trainer, with something planted in it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_data(Path(folder))
        run = config_of(layout, Path(folder))
        for patch in PLANTS[plant]:
            stack.enter_context(patch())
        # Its seconds go to a mock. And nothing that is planted is in what a self-test looks at.
        stack.enter_context(mock.patch("megahybrid.train.trainer.probe_seconds", lambda _: 0.0))
        if plant != "nothing":
            no_test: Callable[..., Any] = lambda *_, **__: []  # noqa: E731
            stack.enter_context(mock.patch("megahybrid.train.stage_model.run_self_test", no_test))
        return _trained(ranks.mesh(layout.tensor), run, Path(folder))


def _trained(mesh: Any, run: RunConfig, folder: Path) -> Trained:
    from megahybrid.data.mixture import open_mixture
    from megahybrid.errors import AuditError
    from megahybrid.model.kernels.chosen import ChosenKernels
    from megahybrid.train.engine import Engine
    from megahybrid.train.metrics import StepClock
    from megahybrid.train.profile import Profiler
    from megahybrid.train.stage_model import StageModel
    from megahybrid.train.state import TrainState
    from megahybrid.train.stop import StopRequest
    from megahybrid.train.trainer import Intervals, Trainer, TrainerHooks, step_shapes

    listener, plan, mixture = mock.Mock(essential=True), run.stage_plan, open_mixture(run)
    stage_model = StageModel(
        run, mesh, ChosenKernels(device="cpu", full="sdpa", windowed="blocked"), lambda *_: None
    )
    model = stage_model.build(0, 0)
    tensors = random_tensors(run.model, 5, torch.float32)
    if run.parallel.zero_stage < 3:
        model.load_canonical(tensors)
    engine = Engine(model, run, mesh)
    engine.load(lambda *place, out=None: _read(tensors, *place, out=out), None)
    shapes = step_shapes(plan, 0, plan.total_tokens)
    where = {"rank": mesh.data.rank, "world_size": mesh.data.size, "prefetch": 0}
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    with Recorded(mixture, mixture.start(), shapes, **where) as loader:
        loader.batches = []
        trainer = Trainer(
            engine=engine,
            loader=loader,
            plan=plan,
            mesh=mesh,
            stage_model=stage_model,
            peak=None,
            intervals=Intervals(10**6, None, 1, 3),
            hooks=TrainerHooks(nothing, nothing, nothing, nothing, listener.on_step, nothing),
            stop=StopRequest(),
            profiler=Profiler(None, folder, mesh),
            clock=StepClock(),
            heartbeat=mock.MagicMock(spec=Heartbeat),
        )
        said = ""
        try:
            _, outcome = trainer.run(TrainState(), plan.total_tokens)
            assert outcome.kind == "complete"
        except AuditError as error:
            said = str(error)
    lines = [call.args[0] for call in listener.on_step.call_args_list]
    rank = RankRun(
        [line.loss for line in lines], [line.gradient_norm for line in lines], [], [], []
    )
    for each in engine.fragments():
        if each.state == "weight":
            values = torch.from_numpy(each.data.copy())
            rank.weights.append((each.tensor, each.box, each.flat, values))
    engine.close()
    return Trained(rank, [line.learning_rate for line in lines], loader.batches, said)


def _read(
    tensors: dict[str, Tensor], name: str, state: str, box: Any, flat: Any, *, out: Any = None
) -> Any:
    """First weights, as a checkpoint would hold them."""
    assert state == "weight"
    part = tensors[name].detach()[tuple(slice(*bounds) for bounds in box)].reshape(-1)
    values = part[slice(*flat)].numpy()
    if out is not None:
        out[...] = values
    return values


def truth_of(layout: Layout, runs: list[Trained]) -> PlainRun:
    """The plain loop, in float64, over the rows of all ranks."""
    config = config_of(layout, Path("unused")).model
    tensors = {
        name: value.detach().double()
        for name, value in random_tensors(config, 5, torch.float32).items()
    }
    of_data_ranks = runs[:: layout.tensor]
    width = config.hidden_size / (layout.base_hidden_size or config.hidden_size)
    return plain_adamw_run(
        config,
        tensors,
        [[each for run in of_data_ranks for each in run.batches[step]] for step in range(STEPS)],
        rates(),
        betas=(0.8, 0.95),
        eps=1e-5,
        weight_decay=0.5,
        clip_norm=0.5,
        decay=lambda name: plain_decay(name, width),
        multiplier=lambda name: plain_multiplier(name, width),
    )


def errors(runs: list[Trained], truth: PlainRun) -> dict[str, float]:
    """Relative errors of what the ledger says and of the last weights."""
    found = {}
    for step, rate in enumerate(rates()):
        for run in runs:
            for what, told, right in (
                ("learning rate", run.learning_rates, rate),
                ("loss", run.rank.losses, truth.losses[step]),
                ("gradient norm", run.rank.norms, truth.norms[step]),
            ):
                name = f"{what} of step {step}"
                found[name] = max(found.get(name, 0.0), abs(told[step] / right - 1))
    weights = joined_weights([run.rank for run in runs], truth.weights)
    return found | {
        f"weight {name}": relative_error(weight, truth.weights[name])
        for name, weight in weights.items()
    }


def all_trained(ranks: distributed.Ranks, asked: list[tuple[Layout, str]]) -> list[Trained]:
    """Several runs in the same processes."""
    return [trained(ranks, *one) for one in asked]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_changing_rates_equals_the_plain_training_loop(world_size: int) -> None:
    layouts = {n: one for n, one in LAYOUTS.items() if one.tensor * one.data == world_size}
    asked = [(layout, "nothing") for layout in layouts.values()]
    of_ranks = distributed.run(world_size, all_trained, asked, timeout_seconds=400)
    for index, (name, layout) in enumerate(layouts.items()):
        runs = [of_rank[index] for of_rank in of_ranks]
        rows = [each for run in runs for step in run.batches for each in step]
        assert any(each.starts.any() for each in rows)  # several documents in a row
        assert len({int((each.targets != -100).sum()) for each in rows}) > 2
        truth = truth_of(layout, runs)
        assert min(truth.norms) > OPTIMIZER["clip_norm"]
        wrong = {what: e for what, e in errors(runs, truth).items() if not e <= BOUND}
        assert not wrong, f"{name}: {wrong}"


def test_what_is_planted_in_a_run_is_seen() -> None:
    """By the numbers above, five bounds and more off, or by the audit before."""
    asked = [(LAYOUTS["single-mup" if name in MUP_PLANTS else "single"], name) for name in PLANTS]
    (found,) = distributed.run(1, all_trained, asked, timeout_seconds=500)
    honest = [of for of, (_, name) in zip(found, asked, strict=True) if name == "nothing"]
    truths = {layout: truth_of(layout, honest) for layout, _ in asked}
    missed = []
    for run, (layout, name) in zip(found, asked, strict=True):
        worst = math.inf if run.said else max(errors([run], truths[layout]).values())
        if name == "nothing":
            assert worst <= BOUND
        elif not worst > SEEN:
            missed.append(f"{name}: {worst:.1e}")
    assert not missed
