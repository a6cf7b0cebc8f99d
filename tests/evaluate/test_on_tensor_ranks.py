"""Generation, sampling and attention on a model cut over tensor ranks, against one process."""

from typing import Any

import pytest
import torch

from megahybrid.evaluate.attention import attention_of
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import Decoder, greedy
from megahybrid.evaluate.sampling import sample_tokens
from megahybrid.model.transformer import Transformer
from tests.distributed import run
from tests.parity import cases
from tests.plain_model import random_tensors

VOCAB = 50
# A ring of keys, a learnt factor per head, and a norm over the heads of all ranks.
FAMILIES = ("rnope_swa", "ssmax", "projection", "fused", "split")


def rows(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in lengths]


def looked_at(ranks: Any, family: str, block: str) -> dict[str, Any]:
    """Everything that a tensor axis could spoil, on one rank; lengths that no degree divides."""
    config = cases.model(family, block, vocab_size=VOCAB)
    model = Transformer(config, ranks.mesh()).double()
    model.load_canonical(random_tensors(config, 3))
    prompts = rows(13, 5, 1)
    decoder = Decoder(model, prompts, 3)
    logits = [decoder.prefill(chunk_tokens=3)]
    logits += [decoder.step(torch.tensor([token, token + 1, 7])) for token in (4, 9, 11)]
    (text,) = rows(29)
    example = Example(tuple(text), 20, 25, ((9, 14),))
    attention, answers = attention_of(model, example, position_bins=4, chunk_tokens=7)
    sampled = sample_tokens(
        model, prompts[0], tokens=9, temperature=0.7, seed=1, context_tokens=17,
        vocab_size=VOCAB, eod_id=VOCAB,
    )  # fmt: skip
    return {
        "logits": torch.stack(logits),
        "greedy": greedy(model, prompts, 6),
        "sampled": sampled,
        "answers": answers,
        "bytes": decoder.cache.bytes,
        "attention": attention,
    }


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_finds_what_one_process_finds(family: str, degree: int) -> None:
    block = "parallel" if family == "ssmax" else "pre_norm"
    (single,) = run(1, looked_at, family, block)
    found = run(degree, looked_at, family, block)
    for one in found:
        torch.testing.assert_close(one["logits"], single["logits"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one["answers"], single["answers"], rtol=1e-10, atol=1e-10)
        assert one["greedy"] == single["greedy"] and one["sampled"] == single["sampled"]
        for name in (name for name, kind in vars(single["attention"]).items() if is_tensor(kind)):
            torch.testing.assert_close(
                getattr(one["attention"], name), getattr(single["attention"], name),
                rtol=1e-9, atol=1e-9, equal_nan=True,
            )  # fmt: skip
    kv_heads = cases.model(family, block, vocab_size=VOCAB).num_kv_heads
    # Beyond as many ranks as heads of keys, each rank keeps one that another keeps too.
    assert sum(one["bytes"] for one in found) == single["bytes"] * max(1, degree // kv_heads)


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
