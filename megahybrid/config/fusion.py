"""Two views of the same queries, keys and values in one layer: how they are brought together.

The scheme itself is the far view, its `near` is the other. Fused, every head has both,
o = g * o_near + (1 - g) * o_far; split, a head has one of them.
"""

import math
from typing import Literal, assert_never

from pydantic import Field, model_validator

from megahybrid.config.base import Frozen

FuseGate = Literal["fixed", "head", "token"]


class Fuse(Frozen):
    """The share g of the near view in each head's output.

    gate=fixed: g = initial, in every head. gate=head: sigmoid(b), b learned for each head.
    gate=token: sigmoid(w u + b) of what queries are made of, w and b learned for each head, w 0 at
    first. `initial` is the g at which training starts.
    """

    gate: FuseGate = Field(description="what has a share of its own")
    initial: float = Field(default=0.5, ge=0, le=1, description="share of near, at first")

    @model_validator(mode="after")
    def _check_initial(self) -> "Fuse":
        if learned_fuse(self.gate) and not 0 < self.initial < 1:
            raise ValueError(
                f"initial={self.initial:g} is no share that a learned gate={self.gate} can have. "
                "Use one between 0 and 1, or gate: fixed."
            )
        return self


class HeadSplit(Frozen):
    """Key heads of the near view: j with j mod `of` < `near`, and the queries that share them."""

    near: int = Field(ge=1, description="near ones of each group of key heads")
    of: int = Field(ge=2, description="key heads of a group")

    @model_validator(mode="after")
    def _check_near(self) -> "HeadSplit":
        if self.near >= self.of:
            raise ValueError(
                f"near={self.near} leaves no head for the far view (of={self.of}). Use fewer "
                "than of, or the near view as the scheme."
            )
        return self

    def is_near(self, kv_head: int) -> bool:
        """Return whether a key head is of the near view."""
        return kv_head % self.of < self.near


def learned_fuse(gate: FuseGate) -> bool:
    """Return whether a gate has learned parameters."""
    match gate:
        case "fixed":
            return False
        case "head" | "token":
            return True
        case never:
            assert_never(never)


def has_product(gate: FuseGate) -> bool:
    """Return whether a gate reads what queries are made of."""
    match gate:
        case "fixed" | "head":
            return False
        case "token":
            return True
        case never:
            assert_never(never)


def first_bias(fuse: Fuse) -> float:
    """The b at which sigmoid(b) is the first share."""
    return math.log(fuse.initial) - math.log1p(-fuse.initial)


def fuse_shapes(gate: FuseGate, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The shape of each learned parameter of a gate, by its name behind `fuse_gate.`."""
    match gate:
        case "fixed":
            return {}
        case "head":
            return {"bias": (heads,)}
        case "token":
            return {"weight": (heads, hidden), "bias": (heads,)}
        case never:
            assert_never(never)
