"""The fp32 frequencies of rotations, bit for bit: what runs, in our model and in transformers."""

import math

import numpy as np
import torch
from torch import Tensor

from megahybrid.config.attention import Rope


def frequencies(position: Rope, head_dim: int) -> Tensor:
    """Return the angular frequencies [rotary_dim / 2] that our model runs with."""
    found: Tensor = position.frequencies(head_dim, torch, torch.float32)
    return found


def their_frequencies(theta: float, pairs: int, head_dim: int, factor: float = 1.0) -> Tensor:
    """Return the first `pairs` frequencies of a whole head, over `factor`, in transformers' order
    of operations."""
    powers = theta ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float) / head_dim)
    return 1.0 / powers / factor


def partial_rope(theta: float, pairs: int, head_dim: int) -> Rope | None:
    """Return our rotation of part of a head that has the bits of a `proportional` one, None without
    any.

    The class reaches its frequencies by the theta that a whole head would have; ours is the one
    near its root that gives the same fp32 bits, if there is one.
    """
    theirs = their_frequencies(theta, pairs, head_dim)
    root = theta ** (2 * pairs / head_dim)
    beside = [root]
    for away in (math.inf, 0.0):
        near = np.float32(root)
        for _ in range(4):
            near = np.nextafter(near, np.float32(away))
            beside.append(float(near))
    fraction = 1.0 if 2 * pairs == head_dim else (2 * pairs + 0.5) / head_dim
    for found in (float(f"{root:.9g}"), *beside):
        position = Rope(kind="rope", theta=found, rotary_fraction=fraction)
        if torch.equal(frequencies(position, head_dim), theirs):
            return position
    return None
