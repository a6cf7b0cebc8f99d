"""Sums of gradients in bf16: DeepSpeed's bits in fewer passes, and all of their digits."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megahybrid.checkpoint.fragments import volume
from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import LEARNING_RATE, Case, build

CASE = Case(model("rms-shared"), zero_stage=1, accumulation=3, precision="bf16")


def trained(
    ranks: distributed.Ranks, case: Case, direct: bool, overlaps: bool = False
) -> dict[str, Any]:
    """Losses and norms of steps of some micro-batches without clipping, then all masters and
    moments. The second has a loss that is no number, and the last two a micro-batch that reaches
    one parameter alone, once on every data rank and once on the first only; `direct` or as
    DeepSpeed sums by itself, and reduced while the last backward pass runs where it `overlaps`."""
    from megahybrid.train.engine import (
        Engine,
        MicroBatch,
        buckets,
        engine,
        gradient_accumulation,
        settings,
    )

    def by_itself(*args: Any) -> dict[str, Any]:
        found = settings.engine_settings(*args)
        found["bf16"]["immediate_grad_update"] = False
        found["communication_data_type"] = "fp32"  # else it rounds the sums to bf16 to reduce them
        return found

    with (
        mock.patch.object(
            gradient_accumulation,
            "patch_gradient_sums",
            gradient_accumulation.patch_gradient_sums if direct else lambda *_: None,
        ),
        mock.patch.object(buckets, "BUCKET", 4000 if direct else 2**26),
        mock.patch.object(engine, "run_overlaps", lambda *_: overlaps),
        mock.patch.object(
            engine, "engine_settings", settings.engine_settings if direct else by_itself
        ),
    ):
        built = build(ranks, case, Engine, engine)
    built.clip_norm = built.deepspeed.optimizer.clip_grad = 0.0
    zero = built.deepspeed.optimizer
    assert isinstance(zero, gradient_accumulation.PatchedBf16Optimizer) == direct
    forward = built.model.forward

    def poisoned(*args: Any) -> Any:
        loss, per_token = forward(*args)
        return loss * float("nan"), per_token

    def sparse(*_: Any) -> Any:
        return built.model.final_norm.weight.float().square().sum(), None

    todo: list[Any] = []
    built.model.forward = lambda *args: todo.pop(0)(*args)
    found: dict[str, Any] = {}
    data_rank = ranks.mesh(case.tensor).data.rank
    first = data_rank * case.accumulation
    reduced = len(zero.fp32_groups_gradients_flat) if case.data > 1 else 0
    for step, count in enumerate((3, 2, 1, 2, 1, 2)):
        batches = [
            MicroBatch(each.tokens, each.targets, each.starts)
            for each in case.micro_batches(step)[first : first + count]
        ]
        ways = [poisoned if step == 1 else forward] * count
        if step == 4 or (step == 5 and data_rank == 0):
            ways[-1] = sparse
        todo[:] = ways
        with mock.patch.object(
            gradient_accumulation,
            "start_sum_of_slices",
            wraps=gradient_accumulation.start_sum_of_slices,
        ) as started:
            before_ends = counted_before_ends(zero, started) if direct else []
            result = built.train_step(batches, LEARNING_RATE, audit=direct and step != 1)
        if direct:
            # Buckets of matrices, and of vectors; none before the last micro-batch.
            assert started.call_count == reduced
            whole = overlaps and sparse not in ways
            assert before_ends == [0] * (count - 1) + [reduced if whole else 0]
            on_the_way = reduced if overlaps and not result.skipped else 0
            assert len(zero.gathering) == on_the_way
        assert result.skipped == (step == 1)
        if not result.skipped:
            # Of the last step's norm DeepSpeed leaves out what a rank has no gradient for.
            norm = result.gradient_norm if direct or step < 5 else math.nan
            found[f"step {step}"] = (result.loss, norm, result.gradient_norm_by_kind)
        gradients = [p.grad for p in built.model.parameters() if p.grad is not None]
        assert not gradients
    found["state"] = [
        (each.tensor, each.state, each.box, each.flat, each.data.copy())
        for each in built.fragments()
    ]
    built.close()
    return found


def counted_before_ends(zero: Any, started: mock.Mock) -> list[int]:
    """How often something was `started` when each backward pass had made its last gradient."""
    counts: list[int] = []

    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        counts.append(started.call_count)
        type(zero).update_hp_grads(zero)

    zero.update_hp_grads = update_hp_grads
    return counts


def all_ways(ranks: distributed.Ranks, case: Case) -> list[dict[str, Any]]:
    return [trained(ranks, case, *way) for way in ((False,), (True,), (True, True))]


def whole_state(runs: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Masters and moments put together from what each rank has of them."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for tensor, state, box, (start, stop), data in (each for run in runs for each in run["state"]):
        whole = found.setdefault((tensor, state), np.full(volume(box), np.nan, np.float32))
        whole[start:stop] = data.reshape(-1)
    return {f"{tensor} {state}": whole.tobytes() for (tensor, state), whole in found.items()}


def test_direct_sums_are_deepspeeds_to_the_bit() -> None:
    (theirs, ours, overlapping) = distributed.run(1, all_ways, CASE)[0]
    norm = "step 5"
    assert math.isnan(theirs[norm][1]) and theirs.pop(norm)[0] == ours.pop(norm)[0]
    overlapping.pop(norm)
    for each in (theirs, ours, overlapping):
        each["state"] = whole_state([each])
    assert ours == theirs
    assert overlapping == theirs


def test_parts_sum_to_what_deepspeed_gives_every_rank() -> None:
    """Over two replicas a sum has one order; without clipping it alone decides the update, so that
    masters and moments after five of them hold the bits of every gradient."""
    runs = distributed.run(2, all_ways, replace(CASE, data=2))
    theirs, ours, overlapping = zip(*runs, strict=True)
    assert whole_state(ours) == whole_state(theirs)
    assert whole_state(overlapping) == whole_state(theirs)
    for rank in (0, 1):
        assert ours[rank].keys() == theirs[rank].keys()
        for step in sorted(ours[rank].keys() - {"state"}):
            assert overlapping[rank][step] == ours[rank][step] == ours[0][step]
            (loss, norm, kinds), (their_loss, their_norm, their_kinds) = (
                run[rank][step] for run in (ours, theirs)
            )
            assert loss == their_loss
            assert kinds == pytest.approx(their_kinds, rel=1e-6)
            assert math.isnan(their_norm) or norm == pytest.approx(their_norm, rel=1e-6)


def rounded(ranks: distributed.Ranks, case: Case) -> float:
    """The share of a step's gradient that are numbers of bf16."""
    from megahybrid.train.engine import Engine, MicroBatch, engine

    built = build(ranks, case, Engine, engine)
    seen: list[torch.Tensor] = []
    built.clip_norm = built.deepspeed.optimizer.clip_grad = 0.0
    built.optimizer.observe = lambda flat, gradient: seen.append(gradient.reshape(-1).clone())
    share = case.micro_batches(0)
    built.train_step([MicroBatch(b.tokens, b.targets, b.starts) for b in share], LEARNING_RATE)
    built.close()
    whole = torch.cat(seen)
    return (whole.bfloat16() == whole)[whole != 0].float().mean().item()


def test_sums_are_not_rounded_on_their_way() -> None:
    assert distributed.run(1, rounded, CASE)[0] < 0.5
    assert distributed.run(1, rounded, replace(CASE, accumulation=1))[0] == 1.0
