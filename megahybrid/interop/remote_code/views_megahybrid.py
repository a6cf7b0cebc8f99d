"""Two views of the same queries, keys and values: what brings them together in a layer.

The scheme itself is the far view, its `near` the other. Fused, every head has both,
g * near + (1 - g) * far; split, a head has one of them. Keys are cached once, not rotated.
"""

from typing import Any

import torch
from torch import Tensor, nn


class MegahybridFuseGate(nn.Module):
    """The share g of the near view: sigmoid(w u + b) by token, sigmoid(b) by head, or a number."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, fuse: dict[str, Any], hidden: int, heads: int) -> None:
        super().__init__()
        self.initial, gate = fuse["initial"], fuse["gate"]
        self.weight = nn.Parameter(torch.zeros(heads, hidden)) if gate == "token" else None
        self.bias = None if gate == "fixed" else nn.Parameter(torch.zeros(heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, seq, hidden] -> g [batch or 1, heads or 1, seq or 1, 1], in fp32 or better."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        if self.bias is None:
            return torch.full((1, 1, 1, 1), self.initial, dtype=exact, device=hidden.device)
        score = self.bias.to(exact)[None, None]
        if self.weight is not None:
            score = nn.functional.linear(hidden, self.weight).to(exact) + score
        return score.sigmoid().transpose(1, 2)[..., None]


def split_share(split: dict[str, Any], heads: int, kv_heads: int, like: Tensor) -> Tensor:
    """Return 1 for the heads of the near view and 0 for the others, [1, heads, 1, 1]."""
    exact = torch.promote_types(like.dtype, torch.float32)
    owners = torch.arange(heads, device=like.device) // (heads // kv_heads)
    return (owners % split["of"] < split["near"]).to(exact)[None, :, None, None]


def fused(near: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """Return share * near + (1 - share) * far, in the dtype of these two."""
    return (share * near + (1 - share) * far).to(far.dtype)
