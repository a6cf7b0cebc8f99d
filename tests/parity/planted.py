"""What is planted in a run to see it found: in its rates, decay, moments, clipping, counting,
accumulation and documents."""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BATCH_TOKENS, START = 512, 1e-3  # of the run's steps


def _patched(target: str, make: Callable[[Any], Any]) -> Callable[[], Any]:
    """`make` of what stands there now, in its place."""

    def patch() -> Any:
        module, name = target.rsplit(".", 1)
        owner = _named(module)
        return mock.patch.object(owner, name, make(getattr(owner, name)))

    return patch


def _named(path: str) -> Any:
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
