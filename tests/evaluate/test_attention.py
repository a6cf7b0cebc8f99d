"""Attention figures against explicit softmax matrices of the plain model, head by head."""

import json
import math
from itertools import cycle, pairwise

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
    """The plain model, which keeps every layer's scores [heads, seq, seq]; -inf where unseen."""

    def _attention(self, u: Tensor, name: str, scheme: AttentionScheme, starts: Tensor) -> Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q = self._heads(u, f"{name}.attention", "query", heads, scheme.qk_norm)
        k = self._heads(u, f"{name}.attention", "key", kv_heads, scheme.qk_norm)
        positions = torch.arange(u.shape[1])[None] - starts
        if isinstance(scheme.position, Rope):
            q, k = (rotate(part, positions, scheme.position) for part in (q, k))
        k = k[:, [head // (heads // kv_heads) for head in range(heads)]]
        mask = visible(starts, scheme.window, scheme.chunk)
        factor = query_factor(scheme, positions, mask.sum(-1), self.config.head_dim, u.dtype)
        scores = (q @ k.mT) * factor[:, None, :, None]
        if scheme.score_scale.kind == "ssmax":
            scores = scores * self.tensors[f"{name}.attention.logit_scale"][None, :, None, None]
        self.__dict__.setdefault("scores", []).append(
            scores.masked_fill(~mask[:, None], -math.inf)[0].detach()
        )
        return super()._attention(u, name, scheme, starts)


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


def shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each key gets, and what the sink gets where there is one, [heads, seq, 0 or 1]."""
    if sinks is None:
        return scores.softmax(-1), scores[..., :0]
    column = sinks.detach()[:, None, None].expand(*scores.shape[:-1], 1)
    p = torch.cat((scores, column), -1).softmax(-1)
    return p[..., :-1], p[..., -1:]


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
        every, sunk = shares(scores, plain.tensors.get(f"blocks.{layer}.attention.sinks"))
        p, sunk = every[:, QUESTION:], sunk[:, QUESTION:]  # [heads, end, keys], [heads, end, sinks]
        scores = scores[:, QUESTION:]
        masses = [p[..., segment[name]].sum(-1).mean(1) for name in SEGMENTS]
        wanted = {
            "mass": torch.stack([*masses, *sunk.mean(1).unbind(-1)], -1),
            "entropy": -(torch.xlogy(p, p).sum(-1) + torch.xlogy(sunk, sunk).sum(-1)).mean(1),
            "max_logit": scores.amax((1, 2)),
            "distance": (p * lag).sum(-1).mean(1),
            "sink": p[:, torch.arange(len(rows)), starts[0, rows]].mean(1),
            # Those whose next token is answer: the last of the question to the last but one.
            "retrieval": scores.new_tensor(0),
        }
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
            seen = (lag >= start) & (lag < stop) & scores[0].isfinite()
            told = found.logit_by_lag[layer, :, n]
            if seen.any():
                torch.testing.assert_close(told, scores[:, seen].mean(1))
            else:
                assert told.isnan().all()


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
