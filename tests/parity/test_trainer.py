"""A run through `Trainer`, its rate changing at every step, is the plain training loop: what the
ledger says was applied is what was applied. And each of many faults planted in it is seen.

The plain side has the rule of rates, decay and multipliers written out by hand.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
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
BATCH_TOKENS, MICRO_TOKENS, LENGTH = 512, 128, 64
START, END, WARMUP = 1e-3, 2e-4, 700
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
        return _trained(ranks.mesh(layout.tensor), run, Path(folder))


def _trained(mesh: Any, run: RunConfig, folder: Path) -> Trained:
    from megahybrid.data.mixture import open_mixture
    from megahybrid.errors import AuditError
    from megahybrid.train.engine import Engine
    from megahybrid.train.layers import Layers
    from megahybrid.train.listeners import Listeners
    from megahybrid.train.metrics import StepClock
    from megahybrid.train.profile import Profiler
    from megahybrid.train.state import TrainState
    from megahybrid.train.stop import StopRequest
    from megahybrid.train.trainer import Habits, Trainer, step_shapes

    listener, plan, mixture = mock.Mock(essential=True), run.stage_plan, open_mixture(run)
    layers = Layers(run, mesh, {"full": "sdpa", "windowed": "blocked"}, lambda *_: None)
    model = layers.build(0, 0)
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
            layers=layers,
            peak=None,
            habits=Habits(10**6, None, 1, 3),
            listeners=Listeners([listener]),
            stop=StopRequest(),
            profiler=Profiler(None, folder, mesh),
            save=nothing,
            poll_save=nothing,
            evaluate=nothing,
            examine=nothing,
            clock=StepClock(),
            heartbeat=mock.MagicMock(spec=Heartbeat),
        )
        said = ""
        try:
            _, ending = trainer.run(TrainState(), plan.total_tokens)
            assert ending.kind == "complete"
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


def _patched(target: str, make: Callable[[Any], Any]) -> Callable[[], Any]:
    """`make` of what stands there now, in its place."""

    def patch() -> Any:
        module, name = target.rsplit(".", 1)
        owner = _named(module)
        return mock.patch.object(owner, name, make(getattr(owner, name)))

    return patch


def _named(path: str) -> Any:
    import importlib

    with contextlib.suppress(ImportError):
        return importlib.import_module(path)
    owner, name = path.rsplit(".", 1)
    return getattr(_named(owner), name)


def _late(right: Any) -> Any:
    """The rate of the step before."""
    before = [0.0]

    def set_rate(self: Any, rate: float) -> None:
        right(self, before[0])
        before[0] = rate

    return set_rate


def _rule(**change: Any) -> Any:
    """The table with another column, for the names that `where` takes."""
    where = change.pop("where", lambda name: True)

    def make(right: Any) -> Any:
        def rule(name: str, *args: Any) -> Any:
            found = right(name, *args)
            return replace(found, **change) if where(name) else found

        return rule

    return make


def _coupled(right: Any) -> Any:
    """Adam with L2 in place of decoupled decay."""

    def update(self: Any, closure: Any) -> Any:
        for group in self.param_groups:
            for flat in group["params"]:
                flat.grad.add_(flat, alpha=group["weight_decay"])
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        right(self, closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    return update


def _engine_with(**optimizer: Any) -> Any:
    """The engine is given other fields of `optimizer` than the run has."""

    def make(right: Any) -> Any:
        def init(self: Any, model: Any, run: Any, mesh: Any) -> None:
            other = run.optimizer.model_copy(update=optimizer)
            right(self, model, run.model_copy(update={"optimizer": other}), mesh)

        return init

    return make


def _step_with(change: Callable[[list[Any]], list[Any]]) -> Any:
    """The trainer hands over other micro-batches than it was given."""

    def make(right: Any) -> Any:
        return lambda self, batches, *args, **named: right(self, change(batches), *args, **named)

    return make


def _without_documents(batches: list[Any]) -> list[Any]:
    return [replace(batch, starts=None) for batch in batches]


def _counted_targets(batches: list[Any]) -> list[Any]:
    """Targets behind the end of a document count."""
    return [
        replace(batch, targets=torch.where(batch.targets == -100, 1, batch.targets))
        for batch in batches
    ]


def _per_micro_batch(right: Any) -> Any:
    """Each micro-batch's mean counts alike: its loss is weighed by the step's mean count."""

    def forward(self: Any, tokens: Tensor, targets: Tensor, starts: Any = None) -> Any:
        loss, per_token = right(self, tokens, targets, starts)
        return loss * (tokens.numel() / (targets != -100).sum()), per_token

    return forward


def _counts_on(right: Any) -> Any:
    """The first update is counted as the second: its moments are corrected for too little."""

    def create(self: Any, flat: Tensor) -> Any:
        state = right(self, flat)
        state["step"].fill_(1.0)
        return state

    return create


def _sums_forgotten(right: Any) -> Any:
    """Only the last micro-batch's gradient is in the sum."""

    def backward(self: Any, loss: Tensor, **named: Any) -> Any:
        last = self.is_gradient_accumulation_boundary()
        return right(self, loss if last else loss * 0, **named)

    return backward


ADAMW = "megahybrid.train.engine.adamw.ObservedAdamW"
ENGINE = "megahybrid.train.engine.engine"
POINT = "megahybrid.config.stages.StagePlan.at"
PLANTS: dict[str, list[Callable[[], Any]]] = {
    "nothing": [],
    "half the rate": [
        _patched(f"{ADAMW}.set_learning_rate", lambda right: lambda self, r: right(self, r / 2))
    ],
    "the rate of the step before": [_patched(f"{ADAMW}.set_learning_rate", _late)],
    "a rate that never changes": [
        _patched(f"{ADAMW}.set_learning_rate", lambda right: lambda self, r: right(self, START))
    ],
    "a rate told one step ahead": [
        _patched(
            POINT,
            lambda right: (
                lambda self, t: replace(
                    right(self, t),
                    learning_rate=right(
                        self, min(t + BATCH_TOKENS, 5 * BATCH_TOKENS)
                    ).learning_rate,
                )
            ),
        )
    ],
    "decay of norms": [_patched(f"{ENGINE}.parameter_rule", _rule(weight_decay=1.0))],
    "no decay of the embedding": [
        _patched(
            f"{ENGINE}.parameter_rule",
            _rule(weight_decay=0.0, where=lambda name: name.startswith("embedding")),
        )
    ],
    "no decay": [_patched(f"{ENGINE}.Engine.__init__", _engine_with(weight_decay=0.0))],
    "decay in the gradient": [_patched(f"{ADAMW}._update", _coupled)],
    "other betas": [_patched(f"{ENGINE}.Engine.__init__", _engine_with(betas=(0.9, 0.95)))],
    "another second beta": [
        _patched(f"{ENGINE}.Engine.__init__", _engine_with(betas=(0.8, 0.999)))
    ],
    "another eps": [_patched(f"{ENGINE}.Engine.__init__", _engine_with(eps=1e-8))],
    "another clip": [_patched(f"{ENGINE}.Engine.__init__", _engine_with(clip_norm=0.6))],
    "no clip": [_patched(f"{ENGINE}.Engine.__init__", _engine_with(clip_norm=None))],
    "updates counted from one": [_patched(f"{ADAMW}.create_state", _counts_on)],
    "means of micro-batches": [
        _patched("megahybrid.model.transformer.Transformer.forward", _per_micro_batch)
    ],
    "the first micro-batch twice": [
        _patched(
            f"{ENGINE}.Engine.train_step", _step_with(lambda batches: [batches[0], *batches[:-1]])
        )
    ],
    "a micro-batch left out": [
        _patched(f"{ENGINE}.Engine.train_step", _step_with(lambda batches: batches[:-1]))
    ],
    "the last gradient alone": [
        _patched("deepspeed.runtime.engine.DeepSpeedEngine.backward", _sums_forgotten)
    ],
    "no documents": [_patched(f"{ENGINE}.Engine.train_step", _step_with(_without_documents))],
    "targets that do not count": [
        _patched(f"{ENGINE}.Engine.train_step", _step_with(_counted_targets))
    ],
}
MUP_PLANTS = {
    "no multiplier": [_patched(f"{ENGINE}.parameter_rule", _rule(learning_rate=1.0))],
    "decay without the width": [
        _patched(
            f"{ENGINE}.parameter_rule",
            _rule(weight_decay=1.0, where=lambda name: "mlp" in name and "norm" not in name),
        )
    ],
}
PLANTS |= MUP_PLANTS


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
