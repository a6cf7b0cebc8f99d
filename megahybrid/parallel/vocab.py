"""The vocabulary, cut over the tensor axis: embedding, and the loss that never holds all logits.

Rows are padded so that every rank holds as many; padding is zero and takes no part in anything.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from megahybrid.config.chunk_sizes import LOSS_CHUNK_BYTES, LOSS_PARTS
from megahybrid.parallel.collectives import (
    all_gather,
    gather_sequence,
    reduce_scatter,
    scatter_sequence,
)
from megahybrid.parallel.linear import sharded_parameter
from megahybrid.parallel.loss_softmax import FUSED, WRITTEN_OUT, Softmax
from megahybrid.parallel.matmul import accumulate, product, product_exact
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.parallel.sharding import Segment, shard_spec

IGNORED = -100


def padded_vocab_size(vocab_size: int, degree: int, pad_multiple: int = 8) -> int:
    """The vocabulary rounded up to a multiple of pad_multiple × tensor degree."""
    multiple = pad_multiple * degree
    return -(-vocab_size // multiple) * multiple


def _vocab_parameter(
    name: str,
    vocab_size: int,
    hidden_size: int,
    mesh: ParallelMesh,
    pad_multiple: int,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    segment = Segment(name, (vocab_size, hidden_size), 0)
    padded = padded_vocab_size(vocab_size, mesh.tensor.size, pad_multiple)
    return sharded_parameter((segment,), mesh, dtype, padded)


class VocabParallelEmbedding(nn.Module):
    """Looks tokens up in this rank's rows; the sum over ranks is scattered along the sequence."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        name: str,
        mesh: ParallelMesh,
        pad_multiple: int = 8,
        *,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.axis, self.vocab_size, self.scale = mesh.tensor, vocab_size, scale
        self.weight = _vocab_parameter(name, vocab_size, hidden_size, mesh, pad_multiple, dtype)
        spec = shard_spec(self.weight)
        self.rows = spec.box(spec.segments[0])[0]

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "seq_local batch hidden"]:
        """Vectors of the tokens, times `scale`. Tokens outside the vocabulary must be refused
        before."""
        found = self._found(tokens)
        return found if self.scale == 1 else found * self.scale

    def _found(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t()
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        start, stop = self.rows
        mine = (tokens >= start) & (tokens < stop)
        found = F.embedding(torch.where(mine, tokens - start, 0), self.weight)
        # [seq, batch, hidden], zero where another rank holds the row -> [seq_local, batch, hidden]
        return scatter_sequence(found * mine.unsqueeze(-1), self.axis)


class VocabParallelHead(nn.Module):
    """Cross-entropy and logits over the cut vocabulary.

    Tied: `VocabParallelHead.tied(embedding)` registers the embedding's own Parameter, so that it
    is gathered for this module too under ZeRO-3. Untied: a parameter of its own. With `softcap` c,
    every logit z, already scaled, is c tanh(z / c). With a `z_loss` z, a training step's sum of
    losses has z (log Z)² more for each token that counts, Z the sum of the logits' exponentials
    (arXiv 2204.02311, 5.1).
    """

    softcap: float | None = None
    z_loss: float = 0.0
    # Their sum in the last call with gradients on, in the losses' precision; None without z_loss.
    z_terms: Float[Tensor, ""] | None = None

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        name: str,
        mesh: ParallelMesh,
        pad_multiple: int = 8,
        *,
        dtype: torch.dtype | None = None,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.vocab_size = mesh.tensor, vocab_size
        if weight is None:
            weight = _vocab_parameter(name, vocab_size, hidden_size, mesh, pad_multiple, dtype)
        self.weight = weight
        spec = shard_spec(weight)
        self.rows = spec.box(spec.segments[0])[0]
        self.softmax = WRITTEN_OUT

    @classmethod
    def tied(cls, embedding: VocabParallelEmbedding, mesh: ParallelMesh) -> "VocabParallelHead":
        """The head that shares the embedding's parameter."""
        segment = shard_spec(embedding.weight).segments[0]
        vocab_size, hidden_size = segment.shape
        return cls(vocab_size, hidden_size, segment.name, mesh, weight=embedding.weight)

    def fuse(self, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Have the loss's softmax compiled by `compile` when gradients are wanted.

        Products and collectives stay outside.
        """
        self.softmax = Softmax(*map(compile, FUSED))

    def forward(
        self,
        hidden: Float[Tensor, "seq_local batch hidden"],
        targets: Int[Tensor, "batch seq"] | None,
        logit_scale: float = 1.0,
        chunk_tokens: int | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch seq"]] | Float[Tensor, "seq batch vocab"]:
        """(sum of losses over counting targets, loss of each token), the same on every tensor rank.

        A target of -100 does not count: its loss is 0. Only the sum is differentiable; with
        gradients enabled they are computed here, chunk by chunk of `chunk_tokens` tokens, so that
        neither logits nor a second product are needed in backward, which can then run only once.
        Softmax and the weight's gradient are in fp32 (float64 for float64 input). With gradients
        enabled the sum has the z-loss's terms too, which `z_terms` holds; the losses of tokens
        never have them. Without targets the result is that of `logits`.
        """
        if targets is None:
            return self._logits(hidden, logit_scale)
        chunk = chunk_tokens or chunk_size(self.weight.shape[0], hidden)
        loss, per_token, self.z_terms = _ChunkedLoss.apply(
            hidden,
            self.weight,
            targets.t().contiguous(),
            self.axis,
            self.rows,
            float(logit_scale),
            self.softcap,
            self.z_loss if torch.is_grad_enabled() else 0.0,
            chunk,
            self.softmax,
            torch.is_grad_enabled(),
        )
        return loss, per_token.t()

    def logits(
        self, hidden: Float[Tensor, "seq_local batch hidden"], logit_scale: float = 1.0
    ) -> Float[Tensor, "seq batch vocab"]:
        """All logits on every rank, unpadded and without gradients: for sampling.

        Costs seq × batch × vocab; call it on few tokens. Goes through the module's call, where
        ZeRO-3 makes the weight whole.
        """
        return self(hidden, None, logit_scale)

    @torch.no_grad()
    def _logits(self, hidden: Tensor, logit_scale: float) -> Tensor:
        whole = gather_sequence(hidden, self.axis)
        local = F.linear(whole, self.weight.to(whole.dtype)) * logit_scale
        if self.softcap is not None:
            local = self.softcap * torch.tanh(local / self.softcap)
        joined = all_gather(local.movedim(-1, 0), self.axis)  # [padded vocab, seq, batch]
        return joined[: self.vocab_size].movedim(0, -1)


def chunk_size(local_vocab: int, hidden: Tensor) -> int:
    """Return how many tokens' gradients of logits take about LOSS_CHUNK_BYTES on one rank.

    They are in hidden's dtype.
    """
    of_token = local_vocab * hidden.element_size()
    return max(1, LOSS_CHUNK_BYTES[hidden.device.type] // of_token)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        axis: Axis,
        rows: tuple[int, int],
        scale: float,
        softcap: float | None,
        z_loss: float,
        chunk: int,
        softmax: Softmax,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        needs_hidden = grad_enabled and ctx.needs_input_grad[0]
        needs_weight = grad_enabled and ctx.needs_input_grad[1]
        needs_grad = needs_hidden or needs_weight
        whole = all_gather(hidden, axis)
        flat, flat_targets = whole.flatten(0, 1), targets.flatten()  # [tokens, hidden], [tokens]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        per_token = flat.new_empty(flat.shape[0], dtype=exact)
        z_losses = torch.empty_like(per_token) if z_loss else None
        grad_whole = torch.empty_like(flat) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        used = weight.to(hidden.dtype)  # with its padding, for which products are faster
        counts = flat_targets != IGNORED
        mine = counts & (flat_targets >= rows[0]) & (flat_targets < rows[1])
        columns = torch.where(mine, flat_targets - rows[0], 0).unsqueeze(1)
        # In lower precision the slopes of a chunk are gathered from logits of parts of it. Written
        # out in the logits' own precision they take the logits' place.
        lower = hidden.dtype != exact
        part = -(-chunk // LOSS_PARTS) if lower else chunk
        grad_chunk = None
        if needs_grad and (lower or softmax is not WRITTEN_OUT):
            grad_chunk = flat.new_empty(min(chunk, flat.shape[0]), used.shape[0])
        for start in range(0, flat.shape[0], chunk):
            stop = min(start + chunk, flat.shape[0])
            for first in range(start, stop, part):
                some = slice(first, min(first + part, stop))
                out = None if grad_chunk is None else grad_chunk[first - start : some.stop - start]
                per_token[some], grad_logits, z_part = _loss_and_grad(
                    flat[some],
                    used,
                    (counts[some], mine[some], columns[some]),
                    axis,
                    rows[1] - rows[0],
                    scale,
                    softcap,
                    z_loss,
                    softmax if needs_grad else WRITTEN_OUT,
                    needs_grad,
                    out,
                )
                if z_losses is not None and z_part is not None:
                    z_losses[some] = z_part
            if grad_logits is not None:
                grad_logits = grad_logits if grad_chunk is None else grad_chunk[: stop - start]
                if grad_whole is not None:
                    product(grad_logits, used, out=grad_whole[start:stop])
                if grad_weight is not None:
                    accumulate(grad_weight, grad_logits, flat[start:stop])
                del grad_logits  # else it stands beside the next chunk's logits
        # Held as attributes: gradients of this size must be freed or handed over, never copied.
        ctx.grad_weight, ctx.weight_dtype = grad_weight, weight.dtype
        ctx.grad_hidden = (
            reduce_scatter(grad_whole.view_as(whole), axis) if grad_whole is not None else None
        )
        ctx.spent = False
        per_token = per_token.view_as(targets)
        if z_losses is None:
            ctx.mark_non_differentiable(per_token)
            return per_token.sum(), per_token, None
        z_terms = z_losses.sum()
        ctx.mark_non_differentiable(per_token, z_terms)
        return per_token.sum() + z_terms, per_token, z_terms

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("the chunked loss was differentiated twice; run its forward again")
        ctx.spent = True
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        if grad_hidden is not None:
            grad_hidden.mul_(slope.to(grad_hidden.device))
        if grad_weight is not None:
            same = grad_weight.dtype == ctx.weight_dtype
            out = grad_weight if same else torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, slope, out=out)
        return grad_hidden, grad_weight, *(None for _ in range(9))


def _loss_and_grad(
    inputs: Tensor,
    weight: Tensor,
    targets: tuple[Tensor, Tensor, Tensor],
    axis: Axis,
    vocab_local: int,
    scale: float,
    softcap: float | None,
    z_loss: float,
    softmax: Softmax,
    needs_grad: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses [tokens], the gradient of all by this rank's unscaled logits, and the
    z-losses.

    The gradient is in the inputs' dtype; it is `out` or takes the logits' place. `targets` say of
    each token whether it counts, whether its target is one of this rank's `vocab_local` ids (none
    where all is padding), and which.

    One collective per call: each rank sends its own maximum, its sum of exponentials relative to
    it, and the target's logit where it holds the target; all combine them alike.
    """
    counts, mine, column = targets
    logits = product_exact(inputs, weight.t(), torch.promote_types(inputs.dtype, torch.float32))
    if vocab_local:
        statistics = softmax.statistics(logits[:, :vocab_local], column, mine, scale, softcap)
    else:
        statistics = logits.new_zeros(3, len(counts))
        statistics[0] = -torch.inf
    of_ranks = all_gather(statistics.unsqueeze(0), axis)  # [tensor ranks, 3, tokens]
    losses, factor, z_losses = softmax.combine(of_ranks, statistics[0], counts, scale, z_loss)
    if not needs_grad:
        return losses, None, z_losses
    grad_logits = logits if out is None else out
    grad_logits[:, vocab_local:] = 0
    if vocab_local:
        softmax.grad_logits(
            logits[:, :vocab_local],
            statistics[0],
            factor,
            column,
            mine,
            scale,
            grad_logits[:, :vocab_local],
            softcap,
        )
    return losses, grad_logits, z_losses
