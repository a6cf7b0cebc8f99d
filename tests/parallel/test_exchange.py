"""The exchanges of context ranks: adjoints of one another, and plans that follow the dense rule."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megahybrid.config.context import Layout, segments
from megahybrid.model.row_shards import RowShards
from megahybrid.parallel.collectives import gather_objects
from megahybrid.parallel.exchange import (
    Halo,
    HaloPlan,
    all_to_all,
    return_gradients,
    start_gather_keys,
)
from megahybrid.parallel.mesh import Axis
from tests.distributed import Ranks, run
from tests.parallel.compare import draw

EXACT = 1e-13  # relative, of float64


def adjoint_error(x: Tensor, y: Tensor, result: Tensor, grad: Tensor, axis: Axis) -> float:
    """Of <E x, y> against <x, E^T y>, summed over ranks."""
    mine = (float((result * y).sum()), float((x * grad).sum()), float((result * y).abs().sum()))
    there, back, size = (sum(each) for each in zip(*gather_objects(mine, axis), strict=True))
    return abs(there - back) / max(size, 1e-30)


def split_errors(axis: Axis, seed: int) -> dict[str, float]:
    """`all_to_all` with splits that every rank draws alike, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    splits = torch.randint(0, 4, (axis.size, axis.size), generator=generator)
    if seed == 1:
        splits[:, axis.size - 1] = 0  # the last rank receives nothing
    if seed == 2:
        splits.zero_()
    send, receive = splits[axis.rank].tolist(), splits[:, axis.rank].tolist()
    x = draw(f"x{seed}{axis.rank}", sum(send), 2, 3).requires_grad_()
    y = draw(f"y{seed}{axis.rank}", sum(receive), 2, 3)
    if axis.size == 1:
        send = receive = [len(x)]
        y = draw("y", len(x), 2, 3)
    result = all_to_all(x, send, receive, axis)
    (grad,) = torch.autograd.grad((result * y).sum(), x)
    # By rank r: what came is the piece that it drew for this rank.
    wanted = []
    for rank in range(axis.size if axis.size > 1 else 0):
        before = int(splits[rank, : axis.rank].sum())
        whole = draw(f"x{seed}{rank}", int(splits[rank].sum()), 2, 3)
        wanted.append(whole[before : before + int(splits[rank, axis.rank])])
    there = torch.cat(wanted) if wanted else x.detach()
    return {
        "forward": float((result.detach() - there).abs().max()) if len(there) else 0.0,
        "adjoint": adjoint_error(x.detach(), y, result.detach(), grad, axis),
    }


def halo_errors(axis: Axis, layout: Layout, window: int) -> dict[str, float]:
    """`Halo` of random keys: the keys before each segment, and their gradients' way back."""
    length = 24 * axis.size
    shards = RowShards(axis, layout, length, ())
    whole = draw("keys", length, 2, 1, 3), draw("values", length, 2, 1, 3)
    k, v = (shards.cut(x, 0).clone().requires_grad_() for x in whole)
    halo = Halo(k, v, shards.halo(window), axis)
    found, forward = [], 0.0
    for index, (start, _) in enumerate(shards.segments):
        first = max(0, start - window + 1)
        for pieces, of_row in zip(halo.before(index), whole, strict=True):
            joined = torch.cat(pieces) if pieces else k.new_zeros((0, 2, 1, 3))
            assert joined.shape[0] == start - first
            found.append(joined)
            forward = max([forward, *(joined - of_row[first:start]).abs().flatten().tolist()])
    halo.finish()
    result = torch.cat([*found, halo.key, halo.value])
    y = draw(f"y{axis.rank}", *result.shape)
    by_k, by_v = torch.autograd.grad((result * y).sum(), (k, v))
    x, grad = torch.cat((k, v)).detach(), torch.cat((by_k, by_v))
    return {"forward": forward, "adjoint": adjoint_error(x, y, result.detach(), grad, axis)}


def gather_errors(axis: Axis) -> dict[str, float]:
    """Keys gathered, and gradients returned."""
    k, v = (draw(f"{name}{axis.rank}", 5, 2, 1, 3) for name in "kv")
    both = start_gather_keys(k, v, axis).wait()
    wanted = [
        torch.cat([draw(f"{name}{rank}", 5, 2, 1, 3) for rank in range(axis.size)]) for name in "kv"
    ]
    y = draw(f"gathered{axis.rank}", *both.shape)
    grads = torch.cat(return_gradients(y, axis))
    return {
        "forward": float((both - torch.cat(wanted, dim=2)).abs().max()),
        "adjoint": adjoint_error(torch.cat((k, v)), y, both, grads, axis),
    }


def shard_errors(axis: Axis) -> dict[str, float]:
    """`cut`, `join`, `part` and `gather` undo one another."""
    errors: dict[str, float] = {}
    layouts: tuple[Layout, ...] = ("contiguous", "zigzag")
    for layout in layouts:
        shards = RowShards(axis, layout, 12 * axis.size, ())
        whole = draw("row", 12 * axis.size, 2, 3)
        mine = shards.cut(whole, 0)
        by_rank = torch.cat(gather_objects(mine, axis))
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            "join": (shards.join(by_rank), whole),
            "part": (shards.part(whole), by_rank),
            "join of part": (shards.join(shards.part(whole)), whole),
            "part of join": (shards.part(shards.join(whole)), whole),
            "gather": (shards.gather(mine, 0), whole),
            "gather along 1": (shards.gather(mine.transpose(0, 1), 1), whole.transpose(0, 1)),
            "one for all": (shards.cut(whole[:1], 0), whole[:1]),
        }
        for name, (got, right) in pairs.items():
            errors[f"{layout} {name}"] = float((got - right).abs().max())
    return errors


def all_errors(ranks: Ranks) -> dict[str, float]:
    """Every law on this rank."""
    mesh = ranks.mesh(1, ranks.world_size)
    named: dict[str, Any] = {"gather": gather_errors(mesh.context)}
    for axis in (mesh.context, Axis.single("context", ranks.rank)):
        named |= {f"splits {seed} {axis.size}": split_errors(axis, seed) for seed in range(6)}
    for layout in ("contiguous", "zigzag"):
        size = 24 if layout == "contiguous" else 12
        for reach in (0, 1, size - 1, size, size + 1, 3 * size):
            named[f"halo {layout} {reach}"] = halo_errors(mesh.context, layout, reach + 1)
    found = {f"{name}: {what}": e for name, errors in named.items() for what, e in errors.items()}
    return found | shard_errors(mesh.context)


@pytest.mark.parametrize("degree", [2, 4])
def test_every_exchange_is_exact_and_its_backward_the_adjoint(degree: int) -> None:
    for errors in run(degree, all_errors):
        assert len(errors) > 50
        assert {name: error for name, error in errors.items() if not error <= EXACT} == {}


@st.composite
def rows(draw_from: Any) -> tuple[Layout, int, int, int]:
    """(layout, degree, tokens of a segment, keys before each segment)."""
    layout = draw_from(st.sampled_from(["contiguous", "zigzag"]))
    degree = draw_from(st.sampled_from([1, 2, 3, 4]))
    size = draw_from(st.integers(1, 9))
    usual = st.sampled_from([0, 1, size - 1, size, size + 1, 3 * size])
    return layout, degree, size, draw_from(usual | st.integers(0, 80))


def received_positions(plans: list[HaloPlan], own: list[list[int]], rank: int) -> list[int]:
    """The positions that a rank receives: what the others send it, in rank order."""
    came: list[int] = []
    for other, plan in enumerate(plans):
        sent = [p for start, stop in plan.sends[rank] for p in own[other][start:stop]]
        assert len(sent) == plans[rank].receives[other]
        came += sent
    return came


@settings(max_examples=200, deadline=None)
@given(rows())
def test_a_halo_plan_is_the_dense_rule(case: tuple[Layout, int, int, int]) -> None:
    """One process plays every rank: a number stands for each key."""
    layout, degree, size, reach = case
    length = size * degree * (1 if layout == "contiguous" else 2)
    held = [segments(layout, length, degree, rank) for rank in range(degree)]
    own = [[p for start, stop in each for p in range(start, stop)] for each in held]
    plans = [HaloPlan.of(held, rank, reach) for rank in range(degree)]
    for rank, plan in enumerate(plans):
        came = received_positions(plans, own, rank)
        assert plan.send_counts[rank] == plan.receives[rank] == 0
        wanted = [list(range(max(0, start - reach), start)) for start, _ in held[rank]]
        for sources, right in zip(plan.before, wanted, strict=True):
            found = [
                position
                for source in sources
                for position in (came if source.received else own[rank])[source.start : source.stop]
            ]
            assert found == right
        # Nothing is sent that a segment does not want, and no byte twice for the same one.
        others = [p for each in wanted for p in each if p not in own[rank]]
        assert sorted(came) == sorted(others)
