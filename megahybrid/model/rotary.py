"""Rotary position embedding: pairs (i, i + rotary_dim / 2) rotate by position * frequency.

Layers without position never come here.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megahybrid.config.attention import Rope
from megahybrid.model.kernels.documents import Documents

Segments = tuple[tuple[int, int], ...]  # of the tokens of a row: first, and one behind the last


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """cos and sin of a batch's angles, times the attention factor; made once per batch and `Rope`.

    batch is 1 where all rows have the same positions.
    """

    cos: Float[Tensor, "seq batch 1 head_dim"]  # 1 in the dimensions that do not rotate
    sin: Float[Tensor, "seq batch 1 pairs"]

    @classmethod
    def build(
        cls,
        rope: Rope,
        head_dim: int,
        length: int,
        documents: Documents | None,
        device: torch.device,
        dtype: torch.dtype,
        segments: Segments | None = None,
    ) -> "RotaryTable":
        """Angles are fp32 whatever `dtype` is: those of released models, bit for bit.

        (In float64 they would differ by 5e-3 at position 131,072.) Positions restart at each
        document. With `segments`, ranges of tokens of a row, the table is of these alone.
        """
        if documents is None:
            positions = torch.arange(length, device=device)[:, None]
        else:
            positions = documents.positions().T
        if segments is not None:
            positions = torch.cat([positions[start:stop] for start, stop in segments])
        return cls.at(rope, head_dim, positions, dtype)

    @classmethod
    def at(
        cls, rope: Rope, head_dim: int, positions: Int[Tensor, "seq batch"], dtype: torch.dtype
    ) -> "RotaryTable":
        """The table of tokens at these positions of their documents."""
        frequencies = _frequencies(rope, head_dim, positions.device)
        angles = positions[..., None, None].float() * frequencies
        factor = rope.attention_factor()
        cos, sin = angles.cos() * factor, angles.sin() * factor
        still = cos.new_ones(*cos.shape[:-1], head_dim - 2 * cos.shape[-1])
        return cls(torch.cat((cos, cos, still), dim=-1).to(dtype), sin.to(dtype))

    def stretch(self, first: int, last: int) -> "RotaryTable":
        """Return the table of the tokens first … last - 1 of these."""
        return RotaryTable(self.cos[first:last], self.sin[first:last])

    def rows_first(self) -> "RotaryTable":
        """Return the same table for heads that are [batch, seq, ...]."""
        return RotaryTable(self.cos.transpose(0, 1), self.sin.transpose(0, 1))


@lru_cache(maxsize=16)
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Kept, because a copy from the host would have it wait for the device at every batch."""
    return rope.frequencies(head_dim, torch, torch.float32).to(device)


@lru_cache(maxsize=8)
def plain_table(
    rope: Rope,
    head_dim: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    *segments: tuple[int, int],
) -> RotaryTable:
    """Return the table of rows of one document, or of `segments` of these: the same for every
    batch."""
    where = (device, dtype)
    return RotaryTable.build(
        rope, head_dim, length, None, *where, *([segments] if segments else [])
    )


def rotate(
    x: Float[Tensor, "seq batch heads head_dim"], table: RotaryTable
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Return x with its first 2 * pairs dimensions rotated: halves a, b become a cos - b sin and
    b cos + a sin."""
    if torch.compiler.is_compiling():
        return _rotated(x, table.cos, table.sin)
    return _Rotation.apply(x, table.cos, table.sin)


def rotate_back(
    grad: Float[Tensor, "seq batch heads head_dim"], table: RotaryTable
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Return the gradient of x from that of `rotate(x, table)`, without autograd."""
    return _rotate(grad, table.cos, table.sin, -1)


def rotate_both(q: Tensor, k: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and of keys."""
    return rotate(q, table), rotate(k, table)


class _Rotation(torch.autograd.Function):
    """Written out because autograd's version of the same line allocates twice as many tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate without writing in place: a compiler makes one kernel of it and of its backward."""
    pairs = sin.shape[-1]
    first, second, still = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    half = cos[..., :pairs]
    return torch.cat((first * half - second * sin, second * half + first * sin, still), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    pairs = sin.shape[-1]
    out = x * cos
    out[..., :pairs].addcmul_(x[..., pairs : 2 * pairs], sin, value=-direction)
    out[..., pairs : 2 * pairs].addcmul_(x[..., :pairs], sin, value=direction)
    return out
