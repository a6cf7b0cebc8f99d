"""The exchanges and layouts of context ranks, and the places that must know each of them.

`python -m tests.unions.exchanges` asks every place of a member that is in no code, as a user's
process does, without annotations being checked: {union: {place: error or null}}.
"""

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.context import (
    Exchange,
    HeadShape,
    Layout,
    choose_exchange,
    choose_layout,
    exchange_bytes,
    segments,
    segments_per_rank,
    work_max_over_mean,
)
from megahybrid.config.context_memory import context_memory
from megahybrid.config.describe import describe, render
from megahybrid.config.parallel import ExchangeConfig
from megahybrid.config.reference import reference
from megahybrid.config.run import RunConfig
from megahybrid.model import selftest
from megahybrid.model.context_attention import ShardedCall, attend_sharded
from megahybrid.model.core_attention import core_attention
from megahybrid.model.kernels import AttentionSpec
from megahybrid.model.row_shards import RowShards
from megahybrid.parallel.mesh import Axis
from tests.config.example import example
from tests.parallel.compare import draw, error

WINDOW, LENGTH = 5, 24
ALONE = Axis.single("context")  # every exchange is code for one rank as well
Place = Callable[[Any], None]


def run_of(**exchange: str) -> RunConfig:
    """A run on two context ranks, whose exchange was never checked."""
    run = example("parallel.tensor=1", "parallel.context=2")
    told = ExchangeConfig().model_copy(update=exchange)
    return run.model_copy(update={"parallel": run.parallel.model_copy(update={"exchange": told})})


def _row_of_page(field: str) -> str:
    section = reference().split("\n## ExchangeConfig", 1)[1].split("\n## ", 1)[0]
    return next(line for line in section.splitlines() if line.startswith(f"| `{field}` |"))


def attended(layout: Any, exchange: Any) -> None:
    """Attention over the ranks' exchange is that of whole rows."""
    q, k, v = (draw(name, LENGTH, 2, 2, 4) for name in "qkv")
    spec = AttentionSpec(window=WINDOW, scale=0.5)
    shards = RowShards(ALONE, layout, LENGTH, ((WINDOW, exchange),))
    found = attend_sharded(q, k, v, ShardedCall(shards, spec, "reference"))
    assert error(found, core_attention(q, k, v, spec, "reference")) < 1e-12


def self_tested(layout: Any, exchange: Any) -> None:
    """The self-test asks it."""
    scheme = AttentionScheme.model_validate({"position": {"kind": "nope"}, "window": WINDOW})
    shape = selftest.HeadShape(2, 1, 8, torch.float32, torch.device("cpu"))
    shards = RowShards(ALONE, layout, LENGTH, ((WINDOW, exchange),))
    found = selftest.run_context_test({"one": scheme}, shape, {"one": "auto"}, shards, ALONE)
    assert [line[:2] for line in found] == [("one", exchange)]


def exchange_in_run_file(member: Any) -> None:
    """A run file may name it, and the page says so."""
    assert ExchangeConfig.model_validate({"windowed": member}).windowed == member
    assert f"`{member}`" in _row_of_page("windowed")


def exchange_chosen(member: Any) -> None:
    """It is legal somewhere, with the bytes that it moves."""
    shape = HeadShape(4, 4, 8)
    assert choose_exchange(member, WINDOW, LENGTH, 2, shape, segments=1) == member
    assert exchange_bytes(member, WINDOW, LENGTH, 2, shape, segments=1).total() > 0


def exchange_bytes_alone(member: Any) -> None:
    """Its bytes have a formula."""
    assert exchange_bytes(member, WINDOW, LENGTH, 2, HeadShape(4, 4, 8), segments=2).forward > 0


def exchange_memory(member: Any) -> None:
    """Its memory is estimated."""
    found = context_memory(run_of(windowed=member), 0)
    assert found.axis == 2 and found.working > 0


def exchange_described(member: Any) -> None:
    """`describe` names it."""
    assert member in render(describe(run_of(windowed=member)))


def layout_in_run_file(member: Any) -> None:
    """A run file may name it, and the page says so."""
    assert ExchangeConfig.model_validate({"layout": member}).layout == member
    assert f"`{member}`" in _row_of_page("layout")
    assert choose_layout(member, []) == member


def layout_cut(member: Any) -> None:
    """Rows are cut so, each token once."""
    held = [segments(member, LENGTH, 2, rank) for rank in range(2)]
    assert sorted(t for each in held for part in each for t in range(*part)) == [*range(LENGTH)]


def layout_counted(member: Any) -> None:
    """Segments are counted."""
    assert segments_per_rank(member) == len(segments(member, LENGTH, 2, 0))


def layout_work(member: Any) -> None:
    """The work of its busiest rank is known."""
    assert work_max_over_mean(member, "keys", None, LENGTH, 2) >= 1


def layout_joined(member: Any) -> None:
    """What ranks hold is joined to rows."""
    whole = draw("row", LENGTH, 2)
    shards = RowShards(Axis("context", 2, 0, None, (0, 1)), member, LENGTH, ())
    assert torch.equal(shards.join(shards.part(whole)), whole)


def layout_parted(member: Any) -> None:
    """Rows are cut in the order of ranks."""
    shards = RowShards(Axis("context", 2, 0, None, (0, 1)), member, LENGTH, ())
    whole = draw("row", LENGTH, 2)
    assert torch.equal(shards.part(whole)[: LENGTH // 2], shards.cut(whole, 0))


def layout_described(member: Any) -> None:
    """`describe` names it."""
    assert member in render(describe(run_of(full="keys", layout=member)))


PLACES: dict[str, dict[str, Place]] = {
    "exchange": {
        "run_file": exchange_in_run_file,
        "choice": exchange_chosen,
        "bytes": exchange_bytes_alone,
        "memory": exchange_memory,
        "describe": exchange_described,
        "attention": lambda member: attended("contiguous", member),
        "self_test": lambda member: self_tested("zigzag", member),
    },
    "layout": {
        "run_file": layout_in_run_file,
        "segments": layout_cut,
        "segments_per_rank": layout_counted,
        "work": layout_work,
        "join": layout_joined,
        "part": layout_parted,
        "describe": layout_described,
        "attention": lambda member: attended(member, "heads"),
        "self_test": lambda member: self_tested(member, "halo"),
    },
}
MEMBERS = {"exchange": get_args(Exchange), "layout": get_args(Layout)}
UNKNOWN = {"exchange": "ring", "layout": "striped"}  # half added: in the union, and in no code


def main() -> None:
    """Print what every place says of a member that no code knows; null where it passes it."""
    warnings.simplefilter("ignore")
    told: dict[str, dict[str, str | None]] = {}
    for union, places in PLACES.items():
        told[union] = {}
        for name, place in places.items():
            try:
                place(UNKNOWN[union])
                told[union][name] = None
            except Exception as refusal:
                told[union][name] = f"{type(refusal).__name__}: {refusal}"[:200]
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
