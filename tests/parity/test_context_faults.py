"""What must not pass on context ranks: faults of a whole step, and the one place that sees each.

Faults of exchanges are in tests/model/test_selftest_across_ranks.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.model.transformer import Transformer
from tests import distributed
from tests.model import broken_exchanges as broken
from tests.parity.cases import model
from tests.parity.test_context_layers import context_errors
from tests.parity.test_engine import (
    BOUND,
    STEPS,
    Case,
    MicroBatch,
    build,
    engine_runs,
    errors,
    plain_run,
)
from tests.plain_model import IGNORED

Patch = pytest.MonkeyPatch
HEADS = (("full", "heads"), ("windowed", "halo"))
CASE = Case(model("rnope_swa", kv_heads=2), context=2, exchange=HEADS, accumulation=2)


def counted_over_data(patch: Patch) -> None:
    """Valid targets are counted over data ranks, not over all replicas."""
    from megahybrid.train.engine import engine

    right = engine.all_reduce
    done: list[int] = []

    def all_reduce(x: Tensor, axis: Any, *how: Any) -> Tensor:
        first = not done  # of the step's sums that of the targets comes first
        done.append(1)
        return x if first and axis.name == "replica" else right(x, axis, *how)

    patch.setattr(engine, "all_reduce", all_reduce)


def averaged_over_data(patch: Patch) -> None:
    """The gradient is scaled by the number of data ranks where it is a mean over all replicas."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.backward
    patch.setattr(
        DeepSpeedEngine, "backward", lambda self, loss, **how: right(self, loss / 2, **how)
    )


def other_rows(patch: Patch) -> None:
    """The last context rank reads the next row."""
    from megahybrid.train.engine import engine

    right = engine.Engine.train_step

    def train_step(self: Any, batches: Any, *args: Any, **how: Any) -> Any:
        if self.mesh.context.rank == self.mesh.context.size - 1:
            batches = [replace(batch, tokens=batch.tokens.roll(1, 0)) for batch in batches]
        return right(self, batches, *args, **how)

    patch.setattr(engine.Engine, "train_step", train_step)


def other_documents(patch: Patch) -> None:
    """One context rank takes each row for one document."""
    from megahybrid.train.engine import engine

    right = engine.Engine.train_step

    def train_step(self: Any, batches: Any, *args: Any, **how: Any) -> Any:
        if self.mesh.context.rank == 1:
            batches = [replace(batch, starts=None) for batch in batches]
        return right(self, batches, *args, **how)

    patch.setattr(engine.Engine, "train_step", train_step)


def part_lost(patch: Patch) -> None:
    """The last rank's loss is left out of the sum."""
    right = Transformer.forward

    def forward(self: Any, *args: Any) -> Any:
        loss, per_token = right(self, *args)
        return loss * (self.context.mesh.context.rank == 0), per_token

    patch.setattr(Transformer, "forward", forward)


def weights_apart(patch: Patch) -> None:
    """A bit of the last context rank's weights is another one."""
    from megahybrid.train.engine import engine

    right = engine.Engine.__init__

    def init(self: Any, ours: Any, run: Any, mesh: Any) -> None:
        right(self, ours, run, mesh)
        if mesh.context.rank == mesh.context.size - 1:
            with torch.no_grad():
                ours.final_norm.weight[0] += 1e-3

    patch.setattr(engine.Engine, "__init__", init)


AUDITED: dict[str, tuple[Callable[[Patch], None], str]] = {
    "the-count-over-data": (counted_over_data, "the parts of rows on all data and context ranks"),
    "other-rows": (other_rows, "were not given the same tokens (micro batch 0)"),
    "other-documents": (other_documents, "were not given the same starts (micro batch 0)"),
    "a-part-lost": (part_lost, "is not the mean over whole rows"),
    "weights-apart": (weights_apart, "is not the same bits on all data and context ranks"),
}


def verdicts(ranks: distributed.Ranks, case: Case) -> dict[str, str]:
    """What the first audited step says with each fault planted; "" where it finds nothing."""
    from megahybrid.errors import AuditError
    from megahybrid.train.engine import Engine, engine
    from megahybrid.train.engine import MicroBatch as EngineMicroBatch

    found = {}
    plants = {"nothing": lambda patch: None} | {name: plant for name, (plant, _) in AUDITED.items()}
    for name, plant in plants.items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            built = build(ranks, case, Engine, engine)
            batches = [
                EngineMicroBatch(each.tokens, each.targets, each.starts)
                for each in case.micro_batches(0)[: case.accumulation]
            ]
            found[name] = ""
            try:
                built.train_step(batches, 1e-3, audit=True)
            except AuditError as error:
                found[name] = str(error)
            finally:
                built.close()
    return found


def test_the_audit_sees_what_context_ranks_do_not_share() -> None:
    first, second = distributed.run(2, verdicts, CASE)
    assert first == second  # on every rank alike
    assert first.pop("nothing") == ""
    for name, (_, words) in AUDITED.items():
        assert first[name].startswith("audit: ") and words in first[name], (name, first[name])
    assert "ranks 0, 1 share rows" in first["other-rows"]


def gradient_errors(ranks: distributed.Ranks, plant: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        globals()[plant](patch)
        return engine_runs(ranks, [CASE])[0]


def test_a_gradient_averaged_over_data_ranks_is_another_norm() -> None:
    """Loss, count and the audit's own norm agree: the plain loop alone tells."""
    found = errors(CASE, distributed.run(2, gradient_errors, "averaged_over_data"), plain_run(CASE))
    assert found["loss 0"] <= BOUND and found["norm 0"] > 0.4


@dataclass(frozen=True)
class HalfMasked(Case):
    """No target of the second half of any row counts: one rank has nothing to learn."""

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The case's own, masked."""
        masked = []
        for batch in super().micro_batches(step):
            targets = batch.targets.clone()
            targets[:, self.seq // 2 :] = IGNORED
            masked.append(replace(batch, targets=targets))
        return masked


def test_a_rank_without_valid_targets_adds_zero() -> None:
    cases = [
        HalfMasked(model("rnope_swa"), context=2, exchange=HEADS, seed=7),
        HalfMasked(model("ssmax"), context=2, exchange=HEADS, zero_stage=2, seed=8),
    ]
    runs = distributed.run(2, engine_runs, list(cases))
    for index, case in enumerate(cases):
        of_case = [of_rank[index] for of_rank in runs]
        assert all(len(run.losses) == STEPS for run in of_case)
        found = errors(case, of_case, plain_run(case))
        assert {what: e for what, e in found.items() if not e <= BOUND} == {}


def labels_cut_before_the_shift(patch: Patch) -> None:
    """Each rank shifts the labels of its own tokens: the last has that of its first."""
    right = Transformer.forward

    def forward(self: Any, tokens: Tensor, targets: Tensor, starts: Any = None) -> Any:
        shards = self.shards(tokens.shape[1])
        labels = shards.cut(targets.roll(1, 1), 1)
        places = torch.cat([torch.arange(*segment) for segment in shards.segments])
        moved = targets.index_copy(1, places, labels.roll(-1, 1))
        return right(self, tokens, torch.where(targets == IGNORED, IGNORED, moved), starts)

    patch.setattr(Transformer, "forward", forward)


PARITY: dict[str, Callable[[Patch], None]] = {
    "labels-cut-before-the-shift": labels_cut_before_the_shift,
    "no-halo": broken.no_halo,
    "halo-gradients-dropped": broken.halo_gradients_dropped,
    "layouts-mixed": broken.mixed_layouts,
    "keys-at-local-positions": broken.local_keys,
    "heads-out-of-order": broken.heads_out_of_order,
}


def parity_errors(ranks: distributed.Ranks) -> dict[str, float]:
    """The worst error of one model in float64 with each fault planted."""
    exchange = {"full": "heads", "windowed": "halo", "layout": "contiguous"}
    cases = {"one": {"config": model("rnope_swa", kv_heads=2), "exchange": exchange}}
    found = {}
    for name, plant in {"nothing": lambda patch: None, **PARITY}.items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            found[name] = max(context_errors(ranks, 1, 2, cases)["one"].values())
    return found


def test_layer_parity_sees_faults_of_the_step() -> None:
    for found in distributed.run(2, parity_errors):
        assert found.pop("nothing") <= 1e-10
        assert {name: error for name, error in found.items() if not error > 1e-3} == {}
