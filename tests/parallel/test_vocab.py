"""The cut vocabulary: embedding and chunked loss equal F.embedding and F.cross_entropy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.config.chunk_sizes import LOSS_PARTS
from megahybrid.parallel.collectives import gather_sequence_replicated, local_slice
from megahybrid.parallel.loss_softmax import ROW_PARTS, fused_statistics
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import shard_spec
from megahybrid.parallel.vocab import (
    VocabParallelEmbedding,
    VocabParallelHead,
    chunk_size,
    padded_vocab_size,
)
from tests.distributed import Ranks, run
from tests.memory import peak_bytes
from tests.parallel.compare import EXACT, draw, error, gradient_errors, load

VOCAB, HIDDEN, SEQ, BATCH = 97, 12, 8, 3
UPSTREAM = 0.37  # what the caller multiplies the sum of losses with


def some_tokens() -> tuple[Tensor, Tensor]:
    """Tokens and targets of every part of the vocabulary, some of which do not count."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    targets = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    tokens[0, :2] = torch.tensor([0, VOCAB - 1])
    targets[0, :2] = torch.tensor([0, VOCAB - 1])
    targets[1, :6] = -100
    targets[2, 7] = -100
    return tokens, targets


def build(mesh: ParallelMesh, tied: bool) -> tuple[VocabParallelEmbedding, VocabParallelHead]:
    double = torch.float64
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, "embedding.weight", mesh, dtype=double)
    if tied:
        return embedding, VocabParallelHead.tied(embedding, mesh)
    return embedding, VocabParallelHead(VOCAB, HIDDEN, "head.weight", mesh, dtype=double)


def loss_errors(
    ranks: Ranks,
    tensor: int,
    tied: bool,
    scale: float,
    chunk_tokens: int | None,
    spread: float,
    fused: bool,
    softcap: float | None,
    z_loss: float = 0.0,
) -> tuple[float, dict[str, float]]:
    """The loss itself, and errors of everything the two layers compute."""
    mesh = ranks.mesh(tensor)
    tokens, targets = some_tokens()
    full = {
        name: (draw(name, VOCAB, HIDDEN) * spread).requires_grad_()
        for name in ("embedding.weight", "head.weight")
    }
    head_weight = full["embedding.weight" if tied else "head.weight"]
    plain_hidden = F.embedding(tokens.t(), full["embedding.weight"])
    plain_hidden.retain_grad()
    plain_logits = plain_hidden.tanh() @ head_weight.t() * scale
    if softcap is not None:
        plain_logits = softcap * (plain_logits / softcap).tanh()
    plain = F.cross_entropy(plain_logits.permute(1, 2, 0), targets, reduction="none")
    z_plain = (plain_logits.logsumexp(-1).t().square() * (targets != -100) * z_loss).sum()
    ((plain.sum() + z_plain) * UPSTREAM).backward()

    embedding, head = build(mesh, tied)
    head.softcap, head.z_loss = softcap, z_loss
    if fused:
        head.fuse(lambda function: function)
    layers = torch.nn.ModuleList([embedding, head])
    load(layers, {name: weight.detach() for name, weight in full.items()})
    with torch.no_grad():  # nothing may come of the padding, whatever it holds
        head.weight[head.rows[1] - head.rows[0] :] = 7.0
    hidden = embedding(tokens)
    hidden.retain_grad()
    loss, per_token = head(hidden.tanh(), targets, scale, chunk_tokens)
    (loss * UPSTREAM).backward()
    assert (head.z_terms is None) == (z_loss == 0)
    z_terms = torch.zeros(()) if head.z_terms is None else head.z_terms
    assert hidden.grad is not None and plain_hidden.grad is not None
    assert not per_token.requires_grad and per_token.shape == targets.shape
    assert (
        head.weight.grad is not None and not head.weight.grad[head.rows[1] - head.rows[0] :].any()
    )
    grads = {name: weight.grad for name, weight in full.items() if weight.grad is not None}
    errors = gradient_errors(layers, grads) | {
        "hidden": error(hidden, local_slice(plain_hidden, mesh.tensor)),
        "hidden_grad": error(hidden.grad, local_slice(plain_hidden.grad, mesh.tensor)),
        "loss": error(loss, plain.sum() + z_plain),
        "z_loss": error(z_terms, z_plain),
        "per_token": error(per_token, plain),
        "logits": error(head.logits(hidden.tanh(), scale), plain_logits),
    }
    with torch.no_grad():
        evaluated, evaluated_per_token = head(hidden.tanh(), targets, scale, chunk_tokens)
    assert evaluated.grad_fn is None and error(evaluated, loss - z_terms) < EXACT
    if not fused:  # the sum of exponentials is the same sum
        assert torch.equal(evaluated_per_token, per_token)
    return loss.item(), errors


@pytest.mark.parametrize("spread", [1.0, 300.0], ids=["usual", "huge_logits"])
@pytest.mark.parametrize(
    ("scale", "chunk_tokens", "fused", "softcap", "z_loss"),
    [
        (1.0, None, False, None, 0.0),
        (0.3, 5, False, None, 0.0),
        (1.0, 1, False, None, 0.0),
        (0.3, 5, True, None, 0.0),
        (0.3, 5, False, 2.5, 0.0),
        (0.3, 5, True, 2.5, 0.0),
        (0.3, 5, False, None, 0.25),
        (0.3, 5, True, 2.5, 0.25),
    ],
    ids=[
        "whole",
        "scaled-chunks_of_5",
        "chunks_of_1",
        "scaled-chunks_of_5-fused",
        "capped-chunks_of_5",
        "capped-chunks_of_5-fused",
        "z_loss-chunks_of_5",
        "z_loss-capped-chunks_of_5-fused",
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("processes", "tensor"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_chunked_loss_and_all_gradients_equal_plain_cross_entropy(
    processes: int,
    tensor: int,
    tied: bool,
    scale: float,
    chunk_tokens: int | None,
    fused: bool,
    softcap: float | None,
    z_loss: float,
    spread: float,
) -> None:
    if softcap is not None:
        softcap *= spread  # far above it 1 - tanh² has no digits, here as in the truth
    case = (tensor, tied, scale, chunk_tokens, spread, fused, softcap, z_loss)
    found = run(processes, loss_errors, *case)
    for loss, errors in found:
        assert max(errors.values()) < EXACT, errors
        assert loss == found[0][0]  # to the bit on every rank


def small_vocabulary(ranks: Ranks) -> float:
    """Five words on four ranks: the last ones hold nothing but padding."""
    mesh = ranks.mesh()
    weight = draw("w", 5, HIDDEN).requires_grad_()
    hidden, targets = draw("h", SEQ, 1, HIDDEN), torch.arange(SEQ).remainder(5).view(1, SEQ)
    with torch.no_grad():  # logits of which none is near 0, as those of padding are
        hidden[..., 0], weight[:, 0] = 1, -1000
    F.cross_entropy((hidden @ weight.t()).squeeze(1), targets[0], reduction="sum").backward()
    head = VocabParallelHead(5, HIDDEN, "w", mesh, dtype=torch.float64)
    load(head, {"w": weight.detach()})
    head(local_slice(hidden, mesh.tensor).clone(), targets)[0].backward()
    assert weight.grad is not None and head.weight.grad is not None
    expected = shard_spec(head.weight).split({"w": weight.grad})
    return float((head.weight.grad - expected).abs().max())


def test_rank_that_holds_only_padding_takes_part() -> None:
    assert max(run(4, small_vocabulary)) < 1e-12


def test_lower_precision_takes_logits_in_parts_and_fuses_them_for_gradients_alone() -> None:
    seen: list[int] = []

    def compile(function: Any) -> Any:
        def called(first: Tensor, *more: Any) -> Any:
            seen.extend([len(first)] if function is fused_statistics else [])
            return function(first, *more)

        return called

    head = VocabParallelHead(VOCAB, HIDDEN, "w", ParallelMesh.single(), dtype=torch.bfloat16)
    load(head, {"w": draw("w", VOCAB, HIDDEN).bfloat16()})
    head.fuse(compile)
    hidden = draw("h", SEQ, BATCH, HIDDEN).bfloat16().requires_grad_()
    head(hidden, some_tokens()[1], chunk_tokens=17)
    assert LOSS_PARTS == 8 and seen == [3, 3, 3, 3, 3, 2, 3, 3, 1]
    seen.clear()
    with torch.no_grad():
        head(hidden, some_tokens()[1], chunk_tokens=17)
    assert not seen


def test_targets_that_all_do_not_count_give_zero_loss_and_gradient() -> None:
    head = VocabParallelHead(VOCAB, HIDDEN, "head.weight", ParallelMesh.single())
    hidden = torch.randn(SEQ, BATCH, HIDDEN, requires_grad=True)
    loss, per_token = head(hidden, torch.full((BATCH, SEQ), -100))
    loss.backward()
    assert loss == 0 and not per_token.any()
    assert hidden.grad is not None and not hidden.grad.any()


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    head = VocabParallelHead(VOCAB, HIDDEN, "head.weight", ParallelMesh.single())
    targets = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    head(torch.randn(SEQ, BATCH, HIDDEN), targets)[0].backward()
    assert head.weight.grad is not None
    head.requires_grad_(False).zero_grad()
    hidden = torch.randn(SEQ, BATCH, HIDDEN, requires_grad=True)
    loss = head(hidden, targets)[0]
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and head.weight.grad is None
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def bf16_errors(ranks: Ranks, fused: bool, softcap: float | None) -> dict[str, tuple[float, float]]:
    """(ours, plain bf16) against float64, of loss and gradients, from the same bf16 values."""
    mesh = ranks.mesh()
    targets = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    hidden_values = draw("h", 32, 2, 64, dtype=torch.bfloat16)
    weight_values = draw("w", VOCAB, 64, dtype=torch.bfloat16) / 4

    def plain(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight = (
            value.to(dtype, copy=True).requires_grad_() for value in (hidden_values, weight_values)
        )
        logits = (hidden @ weight.t()).to(torch.promote_types(dtype, torch.float32))
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        loss = F.cross_entropy(logits.permute(1, 2, 0), targets, reduction="sum")
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return [loss.detach(), hidden.grad, weight.grad]

    truth, usual = plain(torch.float64), plain(torch.bfloat16)
    head = VocabParallelHead(VOCAB, 64, "w", mesh, dtype=torch.bfloat16)
    load(head, {"w": weight_values})
    head.softcap = softcap
    if fused:
        head.fuse(lambda function: function)
    shard = local_slice(hidden_values, mesh.tensor).clone().requires_grad_()
    loss = head(shard, targets, chunk_tokens=7)[0]
    loss.backward()
    assert shard.grad is not None and head.weight.grad is not None
    assert loss.dtype == torch.float32 and head.weight.grad.dtype == torch.bfloat16
    whole = gather_sequence_replicated(shard.grad, mesh.tensor)
    split = shard_spec(head.weight).split
    return {
        "loss": (error(loss, truth[0].float()), error(usual[0], truth[0].float())),
        "hidden": (error(whole, truth[1]), error(usual[1], truth[1])),
        "weight": (
            error(head.weight.grad, split({"w": truth[2]})),
            error(split({"w": usual[2]}), split({"w": truth[2]})),
        ),
    }


@pytest.mark.parametrize("words", [VOCAB, 8 * ROW_PARTS], ids=["no_parts", "parts"])
def test_the_pieces_of_a_row_have_its_sum_and_its_largest_logit(words: int) -> None:
    logits = 300 * draw("logits", 6, words)
    column, mine = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, dtype=torch.bool)
    peak, total, _ = fused_statistics(logits, column, mine, 0.5)
    assert torch.equal(peak, logits.amax(dim=1) / 2)
    assert (total.log() + peak - (logits / 2).logsumexp(dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("fused", [False, True], ids=["written_out", "fused"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "capped"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_bf16_loss_is_at_most_twice_as_far_from_the_truth_as_plain_bf16(
    tensor: int, fused: bool, softcap: float | None
) -> None:
    for errors in run(tensor, bf16_errors, fused, softcap):
        for name, (ours, plain) in errors.items():
            assert ours < max(2 * plain, 1e-4), (name, errors)


def test_logits_of_the_batch_are_never_held() -> None:
    tokens, vocab, hidden_size = 4096, 32768, 64
    head = VocabParallelHead(vocab, hidden_size, "head.weight", ParallelMesh.single())
    hidden = torch.randn(tokens, 1, hidden_size, requires_grad=True)
    targets = torch.randint(0, vocab, (1, tokens))
    head(hidden[:8], targets[:, :8])[0].backward()  # gradients exist from then on

    def plain() -> None:
        F.cross_entropy(F.linear(hidden, head.weight).squeeze(1), targets[0]).backward()

    all_logits = tokens * vocab * 4
    assert peak_bytes(plain) >= 2 * all_logits
    chunked = peak_bytes(lambda: head(hidden, targets)[0].backward())
    assert chunked < 0.4 * all_logits


def test_chunk_and_padding_follow_the_size_of_the_shard() -> None:
    fp32, bf16 = torch.empty(1), torch.empty(1, dtype=torch.bfloat16)
    assert chunk_size(131072, fp32) * 131072 * 4 == 128 * 2**20
    assert chunk_size(131072, bf16) == 2 * chunk_size(131072, fp32)
    assert chunk_size(10**9, fp32) == 1
    assert padded_vocab_size(97, 4) == 128
    assert padded_vocab_size(128, 4) == 128


@pytest.mark.gpu
def test_loss_over_32k_tokens_and_128k_words_costs_under_two_gigabytes() -> None:
    mesh, bf16 = ParallelMesh.single("cuda"), torch.bfloat16
    head = VocabParallelHead(131072, 2048, "head.weight", mesh, dtype=bf16)
    hidden = torch.randn(32768, 1, 2048, device="cuda", dtype=bf16, requires_grad=True)
    targets = torch.randint(0, 131072, (1, 32768), device="cuda")
    head(hidden[:8].detach(), targets[:, :8])  # the products' workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(hidden, targets)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 2e9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_on_a_gpu_is_the_loss_on_the_cpu(dtype: torch.dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        head = VocabParallelHead(VOCAB, 64, "w", ParallelMesh.single(device), dtype=dtype)
        load(head, {"w": draw("w", VOCAB, 64, dtype=dtype)})
        hidden = draw("h", 32, 2, 64, dtype=dtype).to(device).requires_grad_()
        loss = head(hidden, torch.arange(64, device=device).view(2, 32), chunk_tokens=7)[0]
        loss.backward()
        assert hidden.grad is not None and head.weight.grad is not None
        found.append([t.cpu() for t in (loss.detach(), hidden.grad, head.weight.grad)])
    for cpu, gpu in zip(*found, strict=True):
        assert error(gpu, cpu) < (2e-2 if dtype == torch.bfloat16 else 1e-5)
