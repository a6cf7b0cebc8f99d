"""Attention figures against explicit softmax matrices of the plain model, head by head."""

import json
import math
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, Rope
from megahybrid.errors import ConfigError
from megahybrid.evaluate.attention import (
    AttentionStatistics,
    attention_of,
    position_edges,
    retrieval_heads,
    to_json,
)
from megahybrid.evaluate.example import SEGMENTS, Example
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity import cases
from tests.plain_model import PlainModel, query_factor, random_tensors, rotate, visible

VOCAB = 50
LENGTH, QUESTION, ANSWER = 61, 50, 56
NEEDLES = ((20, 24), (30, 33))


class Watched(PlainModel):
    """The plain model, which keeps every layer's scores [heads, seq, seq], -inf where unseen; of
    layers with two views those of the far one, then those of the near one in a list beside them."""

    def _attention(self, u: Tensor, name: str, scheme: AttentionScheme, starts: Tensor) -> Tensor:
        for kept in ("scores", "near_scores", "shares"):
            self.__dict__.setdefault(kept, []).append(None)
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q = self._heads(u, f"{name}.attention", "query", heads, scheme.qk_norm)
        k = self._heads(u, f"{name}.attention", "key", kv_heads, scheme.qk_norm)
        owner = [head // (heads // kv_heads) for head in range(heads)]
        self.scores[-1] = self._scores(q, k[:, owner], name, scheme, scheme, starts)
        if scheme.near is not None:
            near = self._scores(q, k[:, owner], name, scheme, scheme.near, starts)
            share = self._near_share(u, name, scheme, owner).detach()[0]
            self.near_scores[-1] = near
            self.shares[-1] = share.expand(heads, u.shape[1], 1)
        return super()._attention(u, name, scheme, starts)

    def _scores(
        self, q: Tensor, k: Tensor, name: str, scheme: AttentionScheme, view: Any, starts: Tensor
    ) -> Tensor:
        positions = torch.arange(q.shape[2])[None] - starts
        if isinstance(view.position, Rope):
            q, k = (rotate(part, positions, view.position) for part in (q, k))
        mask = visible(starts, view.window, scheme.chunk)
        factor = query_factor(view, positions, mask.sum(-1), self.config.head_dim, q.dtype)
        scores = (q @ k.mT) * factor[:, None, :, None]
        if view.score_scale.kind == "ssmax":
            scores = scores * self.tensors[f"{name}.attention.logit_scale"][None, :, None, None]
        return scores.masked_fill(~mask[:, None], -math.inf)[0].detach()

    def mixed(self, layer: int) -> Tensor:
        """The attention of a layer, of both views where it has two, [heads, seq, seq]."""
        (far, _), near = self._far(layer), self.near_scores[layer]
        if near is None:
            return far
        return self.shares[layer] * near.softmax(-1) + (1 - self.shares[layer]) * far

    def sunk(self, layer: int) -> Tensor:
        """What the sinks of a layer get, [heads, seq, 1]; [heads, seq, 0] where it has none."""
        return self._far(layer)[1]

    def _far(self, layer: int) -> tuple[Tensor, Tensor]:
        scores, sinks = self.scores[layer], self.tensors.get(f"blocks.{layer}.attention.sinks")
        if sinks is None:
            return scores.softmax(-1), scores[..., :0]
        column = sinks.detach()[:, None, None].expand(*scores.shape[:-1], 1)
        p = torch.cat((scores, column), -1).softmax(-1)
        return p[..., :-1], p[..., -1:]


def example(length: int = LENGTH) -> Example:
    draw = torch.Generator().manual_seed(length)
    tokens = torch.randint(VOCAB, (length,), generator=draw).tolist()
    return Example(tuple(tokens), QUESTION, ANSWER, NEEDLES)


def pair(family: str, block: str) -> tuple[Transformer, Watched]:
    config = cases.model(family, block, vocab_size=VOCAB)
    tensors = random_tensors(config, 3)
    model = Transformer(config, ParallelMesh.single()).double()
    model.load_canonical(tensors)
    return model, Watched(config, tensors)


FAMILY_BLOCKS = list(zip(cases.FAMILIES, cycle(cases.BLOCKS), strict=False))


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize(("family", "block"), FAMILY_BLOCKS)
def test_every_figure_is_that_of_the_explicit_softmax_of_each_head(
    family: str, block: str, documents: bool
) -> None:
    model, plain = pair(family, block)
    one = example()
    tokens = torch.tensor([one.tokens])
    starts = torch.zeros_like(tokens)
    if documents:
        starts[0, 15:], starts[0, 53:] = 15, 53
    wanted_logits = plain.logits(tokens, starts)[0, ANSWER - 1 : -1]
    found, logits = attention_of(model, one, starts=starts, position_bins=7, chunk_tokens=9)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-9, atol=1e-9)

    key = torch.arange(LENGTH)
    needle = ((key >= 20) & (key < 24)) | ((key >= 30) & (key < 33))
    segment = {"begin": (key < 10) & ~needle, "needle": needle, "end": key >= QUESTION}
    segment["context"] = ~(segment["begin"] | needle | segment["end"])
    rows = torch.arange(QUESTION, LENGTH)
    lag = rows[:, None] - key
    for layer, scores in enumerate(plain.scores):
        sunk = plain.sunk(layer)[:, QUESTION:]  # [heads, end, 0 or 1]: what sinks get
        p = plain.mixed(layer)[:, QUESTION:]  # [heads, end, keys]
        ones = torch.ones(4, len(rows), 1).double()
        views = [(scores[:, QUESTION:], ones)]
        if (near := plain.near_scores[layer]) is not None:
            share = plain.shares[layer][:, QUESTION:]
            far = scores.softmax(-1)[:, QUESTION:]
            views = [(near[:, QUESTION:], share), (views[0][0], 1 - share)]
            torch.testing.assert_close(found.near_share[layer], share.mean((1, 2)))
        else:
            assert found.near_share[layer].isnan().all()
        wanted = {
            "mass": torch.stack(
                [
                    *(p[..., segment[name]].sum(-1).mean(1) for name in SEGMENTS),
                    *sunk.mean(1).unbind(-1),
                ],
                -1,
            ),
            "entropy": -(torch.xlogy(p, p).sum(-1) + torch.xlogy(sunk, sunk).sum(-1)).mean(1),
            "max_logit": torch.stack(
                [s.masked_fill(weight == 0, -math.inf).amax((1, 2)) for s, weight in views]
            ).amax(0),
            "distance": (p * lag).sum(-1).mean(1),
            "sink": p[:, torch.arange(len(rows)), starts[0, rows]].mean(1),
            # Those whose next token is answer: the last of the question to the last but one.
            "retrieval": scores.new_tensor(0),
        }
        every = plain.mixed(layer)
        wanted["retrieval"] = every[:, ANSWER - 1 : LENGTH - 1][..., needle].sum(-1).mean(1)
        for name, value in wanted.items():
            told = getattr(found, name)[layer]
            torch.testing.assert_close(told, value, rtol=1e-9, atol=1e-9, msg=name)
        torch.testing.assert_close(found.mass[layer].sum(-1), torch.ones(4).double())
        edges = found.position_edges
        assert (edges[0], edges[-1], len(edges)) == (10, 59, 8)  # 61 - ceil(0.03 * 61)
        for n, (start, stop) in enumerate(pairwise(edges)):
            value = p[..., start:stop].mean((1, 2))
            torch.testing.assert_close(found.by_position[layer, :, n], value)
        for n, (start, stop) in enumerate(pairwise(found.lag_edges)):
            within, told = (lag >= start) & (lag < stop), found.logit_by_lag[layer, :, n]
            weights = [weight * (within & s.isfinite()) for s, weight in views]
            total = sum(
                (w * s.nan_to_num(neginf=0)).sum((1, 2))
                for w, (s, _) in zip(weights, views, strict=True)
            )
            count = sum(weight.sum((1, 2)) for weight in weights)
            torch.testing.assert_close(told, total / count, equal_nan=True)
            if near is not None:
                looks = (far * within).sum((1, 2))
                wanted_share = (share * far * within).sum((1, 2)) / looks
                told = found.near_by_lag[layer, :, n]
                torch.testing.assert_close(told, wanted_share, equal_nan=True)


def test_retrieval_counts_queries_before_the_end_if_the_answer_follows_at_once() -> None:
    """With no question, the query that predicts the first answer token is still counted."""
    model, plain = pair("nope", "pre_norm")
    one = Example(example().tokens, ANSWER, ANSWER, NEEDLES)
    plain.logits(torch.tensor([one.tokens]))
    found, _ = attention_of(model, one)
    rows = plain.scores[0].softmax(-1)[:, ANSWER - 1 : LENGTH - 1]
    wanted = (rows[..., 20:24].sum(-1) + rows[..., 30:33].sum(-1)).mean(1)
    end = plain.scores[0].softmax(-1)[:, ANSWER:]
    torch.testing.assert_close(found.mass[0, :, 3], end[..., ANSWER:].sum(-1).mean(1))
    torch.testing.assert_close(found.entropy[0], -torch.xlogy(end, end).sum(-1).mean(1))
    torch.testing.assert_close(found.retrieval[0], wanted)


def test_pieces_of_rows_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("rnope_swa", "pre_norm")
    whole, _ = attention_of(model, example())
    monkeypatch.setattr("megahybrid.evaluate.attention.ROW_BYTES", 1)
    pieces, _ = attention_of(model, example(), chunk_tokens=3)
    for name in ("mass", "entropy", "by_position", "logit_by_lag", "max_logit"):
        torch.testing.assert_close(
            getattr(pieces, name), getattr(whole, name), rtol=1e-9, atol=1e-9, equal_nan=True
        )


def test_json_has_layers_kinds_heads_and_both_units_of_entropy() -> None:
    model, _ = pair("rnope_swa", "pre_norm")
    parts = [attention_of(model, example())[0] for _ in range(2)]
    mean = AttentionStatistics.mean(parts)
    told = json.loads(json.dumps(to_json(mean, ["local", "global"], 0.0), allow_nan=False))
    assert [layer["kind"] for layer in told["layers"]] == ["local", "global"]
    assert told["by_kind"]["global"]["mass"] == told["layers"][1]["mass"]
    for part in (told["all"], *told["layers"], *told["layers"][0]["heads"]):
        assert sum(part["mass"].values()) == pytest.approx(1)
        assert part["entropy_bits"] * math.log(2) == pytest.approx(part["entropy_nats"])
    # Window 5: no end row of a local layer sees the needles, and lags beyond it have no logit.
    assert told["by_kind"]["local"]["mass"]["needle"] == 0
    assert told["by_kind"]["local"]["logit_by_lag"][-1] is None
    scores = [head["score"] for head in told["retrieval_heads"]]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True)
    assert retrieval_heads(mean, 1.1) == []


def test_curves_against_position_drop_the_first_ten_and_the_last_three_per_cent() -> None:
    assert position_edges(1000, 4) == (10, 250, 490, 730, 970)
    assert position_edges(20, 64) == tuple(range(10, 20))
    assert position_edges(5, 3) == (10, 11)


def test_examples_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="question=5 and answer=3 do not lie in this order"):
        Example((1,) * 9, 5, 3)
    with pytest.raises(ConfigError, match=r"needles=\[4, 7\] is not a range before question=5"):
        Example((1,) * 9, 5, 6, ((4, 7),))
