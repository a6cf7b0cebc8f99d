"""Context gain against explicit recomputation, where it must be zero, and where a copy is far."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse
from megahybrid.evaluate.by_document import ratio_interval
from megahybrid.evaluate.context_gain import (
    Windows,
    beyond,
    context_gains,
    gain_edges,
    restarted_losses,
)
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.train.validation import evaluation_loss
from tests.parity import cases
from tests.plain_model import PlainModel, random_tensors

ALONE, CPU = Axis.single("data"), torch.device("cpu")
VOCAB, LENGTH = 50, 48


def rows_of_documents(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows: one document, and three; a few targets do not count."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=draw)
    targets = torch.randint(0, VOCAB, (2, LENGTH), generator=draw)
    targets[torch.rand(targets.shape, generator=draw) < 0.2] = -100
    starts = torch.zeros_like(tokens)
    starts[1, 5:] = 5
    starts[1, 30:] = 30
    return tokens, targets, starts


def spied(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
    """In place of a loss: 1000 times the token, and how many of its document are shown to it."""
    seen = torch.arange(tokens.shape[1]) - starts + 1
    return torch.where(targets == -100, 0, 1000 * tokens + seen).double()


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (7, 1), (7, 3), (8, 8), (20, 40), (47, 2)])
@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_each_token_is_shown_once_its_last_tokens_and_fewer_than_a_stride_more(
    context: int, stride: int, rows_at_once: int
) -> None:
    tokens, targets, starts = rows_of_documents()
    found = restarted_losses(spied, tokens, targets, starts, context, stride, rows_at_once)
    for row, place in itertools.product(range(2), range(LENGTH)):
        whole = place - int(starts[row, place]) + 1
        if targets[row, place] == -100 or whole <= context:
            assert found[row, place] == 0
            continue
        token, seen = divmod(int(found[row, place]), 1000)
        assert token == tokens[row, place]
        # Of a context that is cut, one token at least is not shown.
        assert context <= seen < min(context + stride, whole)
        assert seen == context + (whole - 1 - context) % stride


SCHEMES: dict[str, dict[str, Any]] = {
    "rope": {"position": {"kind": "rope", "theta": 100.0}},
    "log-n": {"position": {"kind": "nope"}, "score_scale": {"kind": "log", "base": 8}},
    "ssmax": {"position": {"kind": "nope"}, "score_scale": {"kind": "ssmax"}},
    "llama4": {
        "position": {"kind": "nope"},
        "score_scale": {"kind": "llama4", "floor": 4, "coefficient": 0.5},
    },
}


def small_model(window: int | None, **scheme: Any) -> ModelConfig:
    """Two layers of one scheme."""
    plan = {
        "num_layers": 2,
        "pattern": ["only"],
        "schemes": {"only": {"window": window, **scheme}},
    }
    told = cases.model("rnope_swa", vocab_size=VOCAB).model_dump(mode="json")
    return parse(ModelConfig, told | {"layer_plan": plan})


def loss_of(config: ModelConfig) -> Any:
    model = Transformer(config, ParallelMesh.single()).double()
    model.load_canonical(random_tensors(config, 3))
    return evaluation_loss(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gain_equals_explicit_recomputation_token_by_token(scheme: str) -> None:
    """By the independent model: each token's own context as a row of its own, whole and cut."""
    config, context, stride = small_model(None, **SCHEMES[scheme]), 6, 3
    plain = PlainModel(config, random_tensors(config, 3))
    tokens, targets, starts = rows_of_documents()
    loss = loss_of(config)
    whole = loss(tokens, targets, starts)
    cut = restarted_losses(loss, tokens, targets, starts, context, stride, 2)
    largest = 0.0
    for row, place in beyond(targets, starts, context).nonzero().tolist():
        start = int(starts[row, place])
        kept = context + (place - start - context) % stride
        alone = []
        for first in (start, place + 1 - kept):
            shown = tokens[row : row + 1, first : place + 1]
            asked = torch.full_like(shown, -100)
            asked[0, -1] = targets[row, place]
            alone.append(float(plain.loss(shown, asked)[1][0, -1]))
        assert float(whole[row, place]) == pytest.approx(alone[0], rel=1e-10)
        assert float(cut[row, place]) == pytest.approx(alone[1], rel=1e-10)
        largest = max(largest, abs(alone[1] - alone[0]))
    assert largest > 0.01  # what is cut off matters


@pytest.mark.parametrize(("kind", "exact"), [("nope", 1e-12), ("rope", 1e-5)])  # fp32 angles
def test_gain_is_zero_where_no_path_reaches_back_so_far_and_only_there(
    kind: str, exact: float
) -> None:
    window = 4
    position = {"kind": "nope"} if kind == "nope" else SCHEMES["rope"]["position"]
    config = small_model(window, position=position)
    loss, (tokens, targets, starts) = loss_of(config), rows_of_documents()
    reach = 2 * (window - 1) + 1  # tokens, its own among them
    differences = []
    for context in (reach, reach - 1):
        counted = beyond(targets, starts, context)
        cut = restarted_losses(loss, tokens, targets, starts, context, 1)
        differences.append((cut - loss(tokens, targets, starts))[counted].abs().max())
    assert differences[0] < exact
    assert differences[1] > 1e-3


def test_sums_by_position_and_document_are_those_of_a_loop() -> None:
    """Documents of several lengths, each a row; every figure by hand, the interval by another
    bootstrap."""
    draw, context = torch.Generator().manual_seed(1), 5
    rows, text = [], torch.randint(1, 6, (VOCAB,), generator=draw)
    for number, size in enumerate([40, 17, 33, 48, 9, 26, 44, 30, 21, 12]):
        tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=draw)
        targets = torch.randint(0, VOCAB, (1, LENGTH), generator=draw)
        targets[:, size:] = -100
        rows.append((torch.tensor([number]), tokens, targets, torch.zeros_like(tokens)))
    loss = loss_of(small_model(None, position={"kind": "nope"}))
    windows = [Windows(context, 2, 3), Windows(16, 1)]
    found = context_gains(loss, rows, windows, 10, LENGTH, ALONE, CPU, token_bytes=text)
    for gain, each in zip(found, windows, strict=True):
        by_bucket: dict[int, dict[int, list[float]]] = {}
        text_bytes, every = 0, []
        edges = gain_edges(each.context, LENGTH)
        for number, tokens, targets, starts in rows:
            cut = restarted_losses(loss, tokens, targets, starts, each.context, each.stride)
            differ = (cut - loss(tokens, targets, starts))[0]
            for place in range(each.context, LENGTH):
                if targets[0, place] >= 0:
                    bucket = max(n for n, edge in enumerate(edges) if edge <= place)
                    mine = by_bucket.setdefault(bucket, {}).setdefault(int(number), [])
                    mine.append(float(differ[place]))
                    every.append(float(differ[place]))
                    text_bytes += int(text[targets[0, place]])
        assert (gain.tokens, gain.bytes) == (len(every), text_bytes)
        assert gain.gain == pytest.approx(np.mean(every), rel=1e-9)
        assert [one.start for one in gain.by_position] == edges[:-1]
        for bucket, told in enumerate(gain.by_position):
            documents = list(by_bucket.get(bucket, {}).values())
            values = list(itertools.chain(*documents))
            assert (told.tokens, told.documents) == (len(values), len(documents))
            assert told.gain == pytest.approx(np.mean(values), rel=1e-9)
            assert_interval(told.low, told.high, documents)
        assert gain.low is not None and gain.high is not None
        assert gain.low < gain.gain < gain.high


def assert_interval(low: float | None, high: float | None, documents: list[list[float]]) -> None:
    """Within what two bootstraps differ by."""
    draw, means = np.random.default_rng(11), []
    sums, counts = [sum(one) for one in documents], [len(one) for one in documents]
    for chosen in draw.integers(len(documents), size=(1000, len(documents))).tolist():
        means.append(sum(sums[n] for n in chosen) / sum(counts[n] for n in chosen))
    least, most = np.quantile(means, (0.025, 0.975))
    assert low == pytest.approx(least, abs=0.15 * (most - least))
    assert high == pytest.approx(most, abs=0.15 * (most - least))


def test_intervals_are_seeded_cover_the_mean_and_know_that_documents_hang_together() -> None:
    draw = np.random.default_rng(3)
    level = draw.normal(size=40)  # of each document: its tokens share it
    counts = draw.integers(50, 100, size=40).astype(float)
    interval = ratio_interval(level * counts, counts)
    assert interval == ratio_interval(level * counts, counts)
    assert interval[0] < (level * counts).sum() / counts.sum() < interval[1]
    # 40 documents of one level each are 40 draws, however many tokens they have.
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * level.std() / 40**0.5, rel=0.15)
    nothing = np.zeros(40)
    assert ratio_interval(nothing, np.r_[1.0, nothing[1:]]) == (None, None)
    # Documents that do not reach a bucket are no draws of it.
    padded = ratio_interval(np.r_[level * counts, nothing], np.r_[counts, nothing])
    assert padded == interval


DISTANCE = 12
STEPS = 100


def copies(rows: int, draw: torch.Generator) -> Tensor:
    """Tokens [rows, LENGTH] of which each is the one DISTANCE before it."""
    period = torch.randint(0, VOCAB, (rows, DISTANCE), generator=draw)
    return period.repeat(1, LENGTH // DISTANCE + 1)[:, : LENGTH + 1]


def test_a_copy_is_worth_its_distance_to_a_model_trained_to_copy() -> None:
    """Gains where the context ends before what is copied, and nothing where it holds that."""
    model = Transformer(
        small_model(None, position=SCHEMES["rope"]["position"]), ParallelMesh.single()
    )
    model.load_canonical(random_tensors(model.config, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        tokens = copies(16, draw)
        targets = tokens[:, 1:].clone()
        targets[:, : DISTANCE - 1] = -100
        loss = model(tokens[:, :-1], targets)[0] / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = copies(10, draw)
    rows = [
        (torch.tensor([n]), row[None, :-1], row[None, 1:], torch.zeros(1, LENGTH, dtype=torch.long))
        for n, row in enumerate(tokens)
    ]
    windows = [Windows(context, 1, 8) for context in (4, DISTANCE - 1, DISTANCE, 20)]
    found = context_gains(evaluation_loss(model), rows, windows, 10, LENGTH, ALONE, CPU)
    for gain in found[:2]:
        assert gain.low is not None and gain.low > 1
    for gain in found[2:]:
        assert gain.gain is not None and abs(gain.gain) < 0.1
