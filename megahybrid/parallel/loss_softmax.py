"""The softmax of one chunk's logits: sums for the loss, and the gradient of the logits.

Two ways of the same numbers. Written out, each operation passes over the logits and leaves its
result in their place. Fused, for a compiler to make one reading of each of the two: a logit then
costs 14 bytes of traffic on a device instead of 34 (4 of them the product's own).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Of a row of logits, each summed up by itself. With fewer sums than a device wants (256 rows, on an
# H200) torch's compiler cuts the rows, and then reads them twice: once to find the largest.
ROW_PARTS = 8

# peak, total and target's logit of each token: what the ranks tell one another
Statistics = Float[Tensor, "3 tokens"]


class Softmax(NamedTuple):
    """The three steps of one way.

    `statistics` comes first, then `combine`; `grad_logits` gets the logits as the first left them.
    """

    statistics: Callable[..., Statistics]
    combine: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    grad_logits: Callable[..., object]


def statistics(
    logits: Float[Tensor, "tokens words"],
    column: Int[Tensor, "tokens 1"],
    mine: Bool[Tensor, " tokens"],
    scale: float,
    softcap: float | None = None,
) -> Statistics:
    """Return the largest scaled logit, the sum of exponentials relative to it, the target's logit.

    The target's logit is the one in `column` (0 where it is not `mine`). Leaves the exponentials in
    the place of `logits`. With `softcap` c, a scaled logit z is c tanh(z / c), and that tanh is
    left: the derivative is made of it.
    """
    if softcap is not None:
        logits.mul_(scale / softcap).tanh_()
        target_logit = torch.where(mine, logits.gather(1, column).squeeze(1) * softcap, 0)
        peak = logits.amax(dim=1) * softcap
        total = _exponentials(logits, softcap, peak).sum(dim=1)
        return torch.stack([peak, total, target_logit])
    if scale != 1.0:
        logits.mul_(scale)
    target_logit = torch.where(mine, logits.gather(1, column).squeeze(1), 0)
    peak = logits.amax(dim=1)
    logits.sub_(peak.unsqueeze(1)).exp_()
    return torch.stack([peak, logits.sum(dim=1), target_logit])


def _exponentials(tanh: Tensor, softcap: float, peak: Tensor) -> Tensor:
    """Those of capped logits, relative to the largest."""
    return (tanh * softcap).sub_(peak.unsqueeze(1)).exp_()


def combine(
    of_ranks: Float[Tensor, "ranks 3 tokens"],
    peak: Float[Tensor, " tokens"],
    counts: Bool[Tensor, " tokens"],
    scale: float,
    z_loss: float = 0.0,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"] | None]:
    """Return each token's loss, 0 where it does not count, the `factor` of its gradient, and its
    z-loss, `z_loss` times (log Z)² with Z the sum of exponentials of the scaled logits.

    The factor is that of `grad_logits` on the rank whose largest logit is `peak`; the z-loss, None
    where its coefficient is 0, multiplies it by 1 + 2 z_loss log Z.
    """
    peaks, totals, target_logits = of_ranks.unbind(1)
    top = peaks.amax(dim=0)
    denominator = (totals * (peaks - top).exp()).sum(dim=0)
    losses = torch.where(counts, denominator.log() + top - target_logits.sum(dim=0), 0)
    factor = (peak - top).exp() / denominator * counts * scale
    if not z_loss:
        return losses, factor, None
    log_z = denominator.log() + top
    z_losses = torch.where(counts, log_z.square() * z_loss, 0)
    return losses, factor * (1 + 2 * z_loss * log_z), z_losses


def grad_logits(
    exponentials: Float[Tensor, "tokens words"],
    peak: Float[Tensor, " tokens"],
    factor: Float[Tensor, " tokens"],
    column: Int[Tensor, "tokens 1"],
    mine: Bool[Tensor, " tokens"],
    scale: float,
    out: Float[Tensor, "tokens words"],
    softcap: float | None = None,
) -> None:
    """Write exponentials * factor, less `scale` in the column that is `mine`, into `out`.

    `out` may be the exponentials. With a soft-cap these are a tanh t still, and the gradient of a
    capped logit is multiplied by 1 - t².
    """
    if softcap is not None:
        tanh, exponentials = exponentials, _exponentials(exponentials, softcap, peak)
        grad_logits(exponentials, peak, factor, column, mine, scale, exponentials)
        torch.mul(exponentials, tanh.square_().neg_().add_(1), out=out)
        return
    # In full precision: near a certain prediction probability - 1 would lose its digits.
    at_target = exponentials.gather(1, column).squeeze(1) * factor - mine.to(factor.dtype) * scale
    torch.mul(exponentials, factor.unsqueeze(1), out=out)
    out.scatter_(1, column, at_target.to(out.dtype).unsqueeze(1))


def _scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        return softcap * torch.tanh(logits * (scale / softcap))
    return logits if scale == 1.0 else logits * scale


def fused_statistics(
    logits: Tensor, column: Tensor, mine: Tensor, scale: float, softcap: float | None = None
) -> Statistics:
    """Return `statistics` and leave the logits as they are.

    Written as compilers know a softmax: they find the largest and the sum in one reading.
    """
    scaled = _scaled(logits, scale, softcap)
    target_logit = torch.where(mine, scaled.gather(1, column).squeeze(1), 0)
    parts = ROW_PARTS if logits.shape[1] % ROW_PARTS == 0 else 1
    of_part = scaled.unflatten(1, (parts, -1))  # [tokens, pieces, words / pieces]
    peaks = of_part.amax(dim=2, keepdim=True)
    totals = (of_part - peaks).exp().sum(dim=2, keepdim=True)
    peak = peaks.amax(dim=1, keepdim=True)
    total = (totals * (peaks - peak).exp()).sum(dim=1)
    return torch.stack([peak.flatten(), total.flatten(), target_logit])


def fused_grad_logits(
    logits: Tensor,
    peak: Tensor,
    factor: Tensor,
    column: Tensor,
    mine: Tensor,
    scale: float,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    """Compute `grad_logits` from the logits themselves; `out` is another tensor."""
    scaled = _scaled(logits, scale, softcap)
    exponentials = (scaled - peak.unsqueeze(1)).exp() * factor.unsqueeze(1)
    index = torch.arange(logits.shape[1], device=logits.device)
    target = (index == column) & mine.unsqueeze(1)
    found = torch.where(target, exponentials - scale, exponentials)
    out.copy_(found if softcap is None else found * (1 - (scaled / softcap).square()))


WRITTEN_OUT = Softmax(statistics, combine, grad_logits)
FUSED = Softmax(fused_statistics, combine, fused_grad_logits)
