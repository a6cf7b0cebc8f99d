"""The independent oracle's rotation of heads, with the frequencies of every scaling."""

import math

import torch
from torch import Tensor

from megahybrid.config.attention import Rope


def rotary_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """fp32 [rotary_dim / 2], in the order of operations of the published implementations."""
    pairs = int(head_dim * rope.rotary_fraction) // 2
    if rope.spectrum == "head":
        return _spectrum(rope, head_dim)[:pairs]
    assert rope.spectrum == "rotated"
    return _spectrum(rope, 2 * pairs)


def _spectrum(rope: Rope, dims: int) -> Tensor:
    """fp32 [dims / 2]: the frequencies of so many dimensions."""
    scaling = rope.scaling
    theta = rope.theta
    assert scaling is None or scaling.kind in ("ntk", "linear", "llama3", "yarn", "longrope")
    if scaling is not None and scaling.kind == "ntk":
        theta = theta * scaling.factor ** (dims / (dims - 2))
    inverse = 1.0 / (theta ** (torch.arange(0, dims, 2).float() / dims))
    if scaling is None or scaling.kind == "ntk":
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "longrope":
        powers = theta ** (torch.arange(0, dims, 2).float() / dims)
        return 1.0 / (torch.tensor(scaling.factors) * powers)
    if scaling.kind == "llama3":
        slow = scaling.original_length / scaling.low_frequency_factor
        fast = scaling.original_length / scaling.high_frequency_factor
        result = []
        for value in inverse:
            wavelength = 2 * math.pi / value
            if wavelength < fast:
                result.append(value)
            elif wavelength > slow:
                result.append(value / scaling.factor)
            else:
                smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
                    scaling.high_frequency_factor - scaling.low_frequency_factor
                )
                result.append((1 - smooth) * value / scaling.factor + smooth * value)
        return torch.stack(result)
    assert scaling.kind == "yarn"
    bounds = []
    for rotations in (scaling.beta_fast, scaling.beta_slow):
        length = scaling.original_length / (rotations * 2 * math.pi)
        bounds.append(dims * math.log(length) / (2 * math.log(theta)))
    low, high = bounds
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dims // 2).float() - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    powers = theta ** (torch.arange(0, dims, 2).float() / dims)
    return (1.0 / (scaling.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


def rotary_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by."""
    if rope.scaling is None or rope.scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.scaling.attention_factor is not None:
        return rope.scaling.attention_factor
    if rope.scaling.kind == "longrope":
        grown, before = rope.scaling.factor, rope.scaling.original_length
        return (1 + math.log(grown) / math.log(before)) ** 0.5 if grown > 1 else 1.0
    return 0.1 * math.log(rope.scaling.factor) + 1.0 if rope.scaling.factor > 1 else 1.0


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """x [batch, heads, seq, head_dim] turned by fp32 angles; positions [batch, seq].

    Of the first `rotary_dim` dimensions, i and i + rotary_dim / 2 are a pair.
    """
    inverse = rotary_frequencies(rope, x.shape[-1])
    angles = positions.float()[:, None, :, None] * inverse  # [batch, 1, seq, rotary_dim / 2]
    cos = (angles.cos() * rotary_factor(rope)).to(x.dtype)
    sin = (angles.sin() * rotary_factor(rope)).to(x.dtype)
    half = inverse.numel()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
