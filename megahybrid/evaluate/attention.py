"""What the heads look at while they answer: attention mass, entropy, distance, by layer and head.

Defined as in arXiv 2501.18795: the queries are the tokens of question and (teacher-forced) answer;
each one's softmax row is summed over segments of the keys. Only those rows are ever computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megahybrid.evaluate.cache import SeenKeys, by_layers, schemes_of
from megahybrid.evaluate.example import BEGIN_TOKENS, LEARNED_SINK, SEGMENTS, Example
from megahybrid.evaluate.hidden_rows import HiddenRows
from megahybrid.evaluate.sharded_queries import ShardedQueries
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import all_gather, all_reduce
from megahybrid.parallel.mesh import Axis

ROW_BYTES = 64 * 2**20  # of one piece of softmax rows; four such pieces are held at most
LAST_DROPPED = 0.03  # of the keys, from curves against key position


@dataclass(frozen=True)
class AttentionStatistics:
    """Means over the queries of question and answer (and over examples), by layer and head.

    A missing logit at a lag (no query saw a key so far away) is NaN.
    """

    # Of begin, needle, context, end, and the learned sink where layers have one: sums to 1.
    mass: Float[Tensor, "layers heads segments"]
    entropy: Float[Tensor, "layers heads"]  # nats
    max_logit: Float[Tensor, "layers heads"]  # the largest scaled score of all rows, not a mean
    distance: Float[Tensor, "layers heads"]  # tokens from query to key, weighted by attention
    sink: Float[Tensor, "layers heads"]  # mass on the first token of the query's document
    retrieval: Float[Tensor, "layers heads"]  # needle mass of queries whose next token is answer
    by_position: Float[Tensor, "layers heads bins"]  # mass per key, mean within each bin
    position_edges: tuple[int, ...]  # bins are [edge, next edge) of key columns
    logit_by_lag: Float[Tensor, "layers heads lags"]  # mean scaled score
    lag_edges: tuple[int, ...]
    # Of layers with two views of their keys, NaN elsewhere: the share g of the near view, and its
    # mean by how far the far view looks.
    near_share: Float[Tensor, "layers heads"]
    near_by_lag: Float[Tensor, "layers heads lags"]

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the columns of `mass`."""
        return (*SEGMENTS, LEARNED_SINK)[: self.mass.shape[-1]]

    @classmethod
    def mean(cls, parts: "Sequence[AttentionStatistics]") -> "AttentionStatistics":
        """The mean over examples of one length, each counting alike (max_logit: the largest)."""
        means = {
            name: torch.stack([getattr(part, name) for part in parts]).nanmean(dim=0)
            for name, value in vars(parts[0]).items()
            if isinstance(value, Tensor)
        }
        means["max_logit"] = torch.stack([part.max_logit for part in parts]).amax(dim=0)
        return cls(**means, position_edges=parts[0].position_edges, lag_edges=parts[0].lag_edges)


class Tally:
    """Watches one example pass through the layers and sums over its end rows.

    The keys that it is told of are all that there are, or one part of them on each rank of `keys`,
    of which all are told of the same queries.
    """

    def __init__(
        self,
        model: Transformer,
        example: Example,
        starts: Int[Tensor, "one seq"],
        *,
        position_bins: int,
        begin: int = BEGIN_TOKENS,
        keys: Axis | None = None,
    ) -> None:
        length, device = len(example.tokens), model.embedding.weight.device
        self.example, self.starts = example, starts.to(device)[0]
        # Without a question the first answer token is predicted by a query before the end.
        self.first = min(example.question, example.answer - 1)
        self.tensor = model.mesh.tensor
        self.keys = keys or Axis.single("context")
        shape = (len(model.blocks), model.config.num_heads // self.tensor.size)  # this rank's heads
        segments = example.segments(begin).to(device)
        self.one_hot = torch.nn.functional.one_hot(segments, len(SEGMENTS)).double()
        self.position_edges = position_edges(length, position_bins, begin)
        edges = torch.tensor(self.position_edges, device=device)
        self.bin = torch.bucketize(torch.arange(length, device=device), edges, right=True)
        self.lag_edges = (0, *(min(2**n, length) for n in range(math.ceil(math.log2(length)) + 1)))
        self.lags = torch.tensor(self.lag_edges, device=device)

        def zeros(*last: int) -> Tensor:
            return torch.zeros(*shape, *last, dtype=torch.float64, device=device)

        self.mass, self.retrieval = zeros(len(SEGMENTS)), zeros()
        self.sunk = zeros() if any(scheme.sink for scheme in schemes_of(model)) else None
        self.entropy, self.distance, self.sink = zeros(), zeros(), zeros()
        self.max_logit = zeros() - math.inf
        self.by_bin = zeros(len(edges) + 1)
        self.lag_sum, self.lag_count = zeros(len(self.lags)), zeros(len(self.lags))
        self.near_sum, self.near_rows = zeros(), zeros()
        self.near_lag, self.far_lag = zeros(len(self.lags)), zeros(len(self.lags))

    def __call__(
        self,
        layer: int,
        views: tuple[SeenKeys, ...],
        queries: Tensor,
        columns: Tensor,
        share: Tensor | None,
    ) -> None:
        """One layer's queries of a chunk and all keys that they see, of those on this rank; in two
        views with the share of the near one."""
        rows = (queries >= self.first).nonzero().flatten()
        if not len(rows):
            return
        heads = views[0].q.shape[2]
        piece = max(1, ROW_BYTES // (8 * len(views) * heads * len(columns)))
        for some in rows.split(piece):
            part = tuple(
                view._replace(q=view.q[some, 0], keys=view.keys[0], allowed=view.allowed[0, some])
                for view in views
            )
            weight = None if share is None else share[some, 0].permute(1, 0, 2)
            self._add(layer, part, queries[some], columns, weight)

    def _add(
        self,
        layer: int,
        views: tuple[SeenKeys, ...],
        queries: Int[Tensor, "rows"],
        columns: Int[Tensor, "keys"],
        share: Float[Tensor, "heads rows 1"] | None,
    ) -> None:
        found = [_scores(view) for view in views]  # [heads, rows, keys], -inf where unseen
        compute = found[0].dtype
        sunk: Tensor | None = None
        if share is None:
            (only,) = found
            weights: list[Tensor] = [torch.ones_like(only[..., :1])]
            p, sunk = self._shares(only, views[0].sinks)
            parts = [p]
        else:
            weights = [share.to(compute), 1 - share.to(compute)]
            parts = [self._shares(scores, None)[0] for scores in found]
            p = weights[0] * parts[0] + weights[1] * parts[1]

        by_segment = p @ self.one_hot[columns].to(compute)  # [heads, rows, segments]
        answering = (queries >= self.example.answer - 1) & (queries < len(self.example.tokens) - 1)
        needle = by_segment[..., SEGMENTS.index("needle")]
        self.retrieval[layer] += needle[:, answering].sum(1)
        if queries[0] < self.example.question:
            if len(queries) == 1:
                return
            queries, p, by_segment = queries[1:], p[:, 1:], by_segment[:, 1:]
            found, weights, parts = ([x[:, 1:] for x in each] for each in (found, weights, parts))
            sunk = None if sunk is None else sunk[:, 1:]
        self.mass[layer] += by_segment.sum(1)
        self.entropy[layer] -= torch.xlogy(p, p).sum((1, 2))
        if sunk is not None and self.sunk is not None:
            self.sunk[layer] += sunk.sum((1, 2))
            self.entropy[layer] -= torch.xlogy(sunk, sunk).sum((1, 2))
        lag = queries[:, None] - columns
        self.distance[layer] += (p * lag).sum((1, 2))
        first = columns == self.starts[queries, None]
        self.sink[layer] += (p * first).sum((1, 2))
        self.by_bin[layer].index_add_(1, self.bin[columns], p.sum(1).double())
        bucket = torch.bucketize(lag, self.lags, right=True) - 1
        for scores, weight in zip(found, weights, strict=True):
            self._add_scores(layer, scores, weight, bucket)
        if share is not None:
            self._add_share(layer, weights[0], parts[1], bucket)

    def _add_scores(self, layer: int, scores: Tensor, weight: Tensor, bucket: Tensor) -> None:
        """The scores of a view by lag, each weighing as much as the view does for its query."""
        counted = (scores > -math.inf) & (weight > 0)
        most = scores.masked_fill(~counted, -math.inf).amax((1, 2)).double()
        self.max_logit[layer] = torch.maximum(self.max_logit[layer], most)
        known = (weight * scores.masked_fill(~counted, 0)).flatten(1).double()
        # A key that is not seen weighs nothing, and its lag may be none.
        bucket = bucket.clamp(min=0).flatten()
        self.lag_sum[layer].index_add_(1, bucket, known)
        self.lag_count[layer].index_add_(1, bucket, (weight * counted).flatten(1).double())

    def _add_share(self, layer: int, share: Tensor, far: Tensor, bucket: Tensor) -> None:
        """The share of the near view, and that by how far the far view looks at the same query."""
        self.near_sum[layer] += share.sum((1, 2))
        self.near_rows[layer] += share.shape[1]
        bucket = bucket.clamp(min=0).flatten()
        self.near_lag[layer].index_add_(1, bucket, (share * far).flatten(1).double())
        self.far_lag[layer].index_add_(1, bucket, far.flatten(1).double())

    def _shares(
        self, scores: Float[Tensor, "heads rows keys"], sinks: Float[Tensor, " heads"] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what each key gets of its query's attention, which goes to keys of all ranks, and
        what the sink gets [heads, rows, 1]: with keys on several ranks, this one's part of it."""
        if sinks is None:
            if self.keys.size == 1:
                return scores.softmax(dim=-1), None
            p = (scores - all_reduce(scores.amax(-1, keepdim=True), self.keys, "max")).exp()
            return p / all_reduce(p.sum(-1, keepdim=True), self.keys), None
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        if self.keys.size == 1:
            p = torch.cat((scores, column), dim=-1).softmax(dim=-1)
            return p[..., :-1], p[..., -1:]
        most = all_reduce(scores.amax(-1, keepdim=True), self.keys, "max").maximum(column)
        p, sunk = (scores - most).exp(), (column - most).exp()
        whole = all_reduce(p.sum(-1, keepdim=True), self.keys) + sunk
        # The first rank has it: what all ranks have is added up in the end.
        return p / whole, sunk / whole if self.keys.rank == 0 else torch.zeros_like(sunk)

    def result(self) -> AttentionStatistics:
        """Means over the end rows, of all heads, once. Every rank of both axes calls it."""
        all_reduce(self.max_logit, self.keys, "max")
        for part in (self.mass, self.entropy, self.distance, self.sink, self.retrieval):
            all_reduce(part, self.keys)
        if self.sunk is not None:
            all_reduce(self.sunk, self.keys)
            self.mass = torch.cat((self.mass, self.sunk[..., None]), dim=-1)
        for part in (self.by_bin, self.lag_sum, self.lag_count, self.near_lag, self.far_lag):
            all_reduce(part, self.keys)
        length = len(self.example.tokens)
        rows, answers = length - self.example.question, length - self.example.answer
        widths = torch.tensor(self.position_edges, device=self.bin.device).diff()
        parts = {
            "mass": self.mass / rows,
            "entropy": self.entropy / rows,
            "max_logit": self.max_logit,
            "distance": self.distance / rows,
            "sink": self.sink / rows,
            "retrieval": self.retrieval / answers,
            "by_position": self.by_bin[..., 1:-1] / (rows * widths),
            "logit_by_lag": (self.lag_sum / self.lag_count)[..., :-1],
            "near_share": self.near_sum / self.near_rows,
            "near_by_lag": (self.near_lag / self.far_lag)[..., :-1],
        }
        return AttentionStatistics(
            **{name: self._all_heads(value).cpu() for name, value in parts.items()},
            position_edges=self.position_edges,
            lag_edges=self.lag_edges,
        )

    def _all_heads(self, value: Tensor) -> Tensor:
        return all_gather(value.movedim(1, 0), self.tensor).movedim(0, 1)


def _scores(view: SeenKeys) -> Float[Tensor, "heads rows keys"]:
    """The scaled scores of a view, -inf where a query does not see a key."""
    compute = torch.float64 if view.q.dtype == torch.float64 else torch.float32
    grouped = view.q.to(compute).unflatten(1, (len(view.keys), -1))
    scores = torch.einsum("nhgd,hkd->hgnk", grouped, view.keys.to(compute)).flatten(0, 1)
    return (scores * view.scale).masked_fill(~view.allowed, -math.inf)


def position_edges(length: int, bins: int, begin: int = BEGIN_TOKENS) -> tuple[int, ...]:
    """Edges of `bins` bins of key columns (fewer where keys are), without the first ten and the
    last three per cent, where sinks and the question stand."""
    stop = max(begin + 1, length - math.ceil(LAST_DROPPED * length))
    bins = min(bins, stop - begin)
    return tuple(begin + (stop - begin) * n // bins for n in range(bins + 1))


@torch.no_grad()
def attention_of(
    model: Transformer,
    example: Example,
    *,
    starts: Int[Tensor, "one seq"] | None = None,
    position_bins: int = 64,
    chunk_tokens: int = 512,
) -> tuple[AttentionStatistics, Float[Tensor, "answer vocab"]]:
    """The attention of one example's end rows, and the logits of its answer's tokens.

    Memory beyond the weights is that of `by_layers` and four pieces of ROW_BYTES: it grows with
    the length, not with its square. Where context ranks share the text, each has the activations
    and keys of its own tokens. `starts` are given where the text holds several documents.
    """
    tokens = torch.tensor([example.tokens], device=model.embedding.weight.device)
    whole, length = starts is None, tokens.shape[1]
    starts = torch.zeros_like(tokens) if starts is None else starts.to(tokens.device)
    shards = model.shards(model.filled(length))
    if shards is None:
        tally = Tally(model, example, starts, position_bins=position_bins)
        hidden = by_layers(model, tokens, starts, observe=tally, chunk_tokens=chunk_tokens)
        asked = hidden[example.answer - 1 : -1]
    else:
        tally = Tally(model, example, starts, position_bins=position_bins, keys=shards.axis)
        watch = ShardedQueries(shards, starts, tally.first, tally, chunk_tokens)
        rows = HiddenRows(model, tokens, None if whole else starts, watch)
        asked = rows.at(torch.arange(example.answer - 1, length - 1, device=tokens.device))
    # The head joins what the ranks hold along the sequence: here the same rows from each.
    logits = model.head.logits(asked, model.config.logit_scale)[: len(asked), 0]
    return tally.result(), logits


def retrieval_heads(attention: AttentionStatistics, threshold: float) -> list[dict[str, Any]]:
    """Heads that look at the needle while they answer, strongest first."""
    found = (attention.retrieval >= threshold).nonzero().tolist()
    heads = [
        {"layer": layer, "head": head, "score": float(attention.retrieval[layer, head])}
        for layer, head in found
    ]
    return sorted(heads, key=lambda one: -float(one["score"]))


def to_json(
    attention: AttentionStatistics, kinds: Sequence[str], threshold: float
) -> dict[str, Any]:
    """All figures by layer and head, their means by layer, by kind of layer and over all."""
    layers = [
        {
            "layer": index,
            "kind": kind,
            **_summary(attention, [index]),
            "heads": _heads(attention, index),
        }
        for index, kind in enumerate(kinds)
    ]
    return {
        "segments": list(attention.segments),
        "all": _summary(attention, list(range(len(kinds)))),
        "by_kind": {
            kind: {"layers": kinds.count(kind)}
            | _summary(attention, [index for index, name in enumerate(kinds) if name == kind])
            for kind in dict.fromkeys(kinds)
        },
        "layers": layers,
        "retrieval_threshold": threshold,
        "retrieval_heads": retrieval_heads(attention, threshold),
        "position_edges": list(attention.position_edges),
        "lag_edges": list(attention.lag_edges),
    }


def _summary(attention: AttentionStatistics, layers: list[int]) -> dict[str, Any]:
    """Means over heads and `layers` (the maximum of max_logit)."""
    entropy = float(attention.entropy[layers].mean())
    mass = attention.mass[layers].mean((0, 1)).tolist()
    return {
        "mass": dict(zip(attention.segments, mass, strict=True)),
        "entropy_nats": entropy,
        "entropy_bits": entropy / math.log(2),
        "max_logit": float(attention.max_logit[layers].max()),
        "distance": float(attention.distance[layers].mean()),
        "sink": float(attention.sink[layers].mean()),
        "retrieval": float(attention.retrieval[layers].mean()),
        "by_position": attention.by_position[layers].mean((0, 1)).tolist(),
        "logit_by_lag": _known(attention.logit_by_lag[layers].nanmean((0, 1))),
        **_near(attention.near_share[layers], attention.near_by_lag[layers]),
    }


def _near(share: Tensor, by_lag: Tensor) -> dict[str, Any]:
    """The mean share of the near view, where some of these heads have two."""
    if share.isnan().all():
        return {}
    mean = by_lag.flatten(0, -2).nanmean(0)
    return {"near_share": float(share.nanmean()), "near_by_lag": _known(mean)}


def _heads(attention: AttentionStatistics, layer: int) -> list[dict[str, Any]]:
    entropy = attention.entropy[layer]
    return [
        {
            "head": head,
            "mass": dict(
                zip(attention.segments, attention.mass[layer, head].tolist(), strict=True)
            ),
            "entropy_nats": float(entropy[head]),
            "entropy_bits": float(entropy[head]) / math.log(2),
            "max_logit": float(attention.max_logit[layer, head]),
            "distance": float(attention.distance[layer, head]),
            "sink": float(attention.sink[layer, head]),
            "retrieval": float(attention.retrieval[layer, head]),
            "by_position": attention.by_position[layer, head].tolist(),
            "logit_by_lag": _known(attention.logit_by_lag[layer, head]),
            **_near(attention.near_share[layer, head], attention.near_by_lag[layer, head][None]),
        }
        for head in range(len(entropy))
    ]


def _known(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
