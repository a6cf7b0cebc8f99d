"""Cached generation against full recomputation, by the model and by the plain oracle."""

from itertools import cycle

import pytest
import torch

from megahybrid.config.counting import kv_cache_bytes
from megahybrid.errors import ConfigError
from megahybrid.evaluate.cache import by_layers
from megahybrid.evaluate.generation import Decoder, greedy
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity import cases
from tests.plain_model import PlainModel, random_tensors

VOCAB = 50
BLOCK_OF = dict(zip(cases.FAMILIES, cycle(cases.BLOCKS), strict=False))


def built(family: str, dtype: torch.dtype = torch.float64) -> tuple[Transformer, PlainModel]:
    config = cases.model(family, BLOCK_OF[family], vocab_size=VOCAB)
    tensors = random_tensors(config, 3)
    model = Transformer(config, ParallelMesh.single()).to(dtype)
    model.load_canonical(tensors)
    return model, PlainModel(config, tensors)


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_cached_logits_are_those_of_full_recomputation_token_by_token(family: str) -> None:
    model, plain = built(family)
    rows = prompts((23, 9, 1))  # windows of 1 to 7 keys: the ring goes round several times
    decoder = Decoder(model, rows, 6)
    logits = decoder.prefill(chunk_tokens=4)
    for number in range(7):
        for row, known in enumerate(rows):
            whole = plain.logits(torch.tensor([known]))[0, -1]
            torch.testing.assert_close(logits[row], whole, rtol=1e-9, atol=1e-9)
        if number < 6:
            chosen = logits.argmax(dim=1)
            rows = [[*known, int(token)] for known, token in zip(rows, chosen, strict=True)]
            logits = decoder.step(chosen)


@pytest.mark.parametrize("family", ["rnope_swa", "window-one-key", "ssmax", "projection"])
def test_fp32_logits_after_a_long_text_are_within_1e5_of_recomputation(family: str) -> None:
    model, _ = built(family, torch.float32)
    (row,) = prompts((301,))
    decoder = Decoder(model, [row[:250]], 51)
    found = [decoder.prefill(chunk_tokens=64)]
    found += [decoder.step(torch.tensor([token])) for token in row[250:]]
    wanted = model.logits(torch.tensor([row]))[0, 249:]
    scale = max(1.0, float(wanted.abs().max()))
    assert float((torch.cat(found) - wanted).abs().max()) <= 1e-5 * scale


def test_chunks_of_any_size_give_the_same_logits() -> None:
    model, _ = built("rnope_swa")
    rows = prompts((17, 5))
    first = Decoder(model, rows, 0).prefill(chunk_tokens=100)
    for chunk in (1, 2, 5, 6, 16, 17):
        again = Decoder(model, rows, 0).prefill(chunk_tokens=chunk)
        torch.testing.assert_close(again, first, rtol=1e-11, atol=1e-11)


def test_greedy_tokens_are_those_of_full_recomputation_for_unequal_prompts() -> None:
    model, plain = built("rnope_swa")
    rows = prompts((12, 3, 30))
    found = greedy(model, rows, 20)
    for known, added in zip(rows, found, strict=True):
        for token in added:
            assert token == int(plain.logits(torch.tensor([known]))[0, -1].argmax())
            known = [*known, token]


def test_rows_stop_by_themselves_and_the_others_go_on() -> None:
    model, _ = built("nope")
    rows = prompts((12, 3))
    whole = greedy(model, rows, 10)
    found = greedy(model, rows, 10, ends=lambda added: added == whole[0][:4])
    assert found == [whole[0][:4], whole[1]]


@pytest.mark.parametrize("family", ["rnope_swa", "rope", "window-one-key", "fused", "split"])
@pytest.mark.parametrize("length", [4, 40, 400])
def test_memory_is_what_the_counting_says(family: str, length: int) -> None:
    model, _ = built(family, torch.float32)
    decoder = Decoder(model, prompts((length - 3, 1)), 3)
    decoder.prefill()
    assert decoder.cache.bytes == 2 * kv_cache_bytes(model.config, length, bytes_per_value=4)


def test_three_to_one_cache_is_a_quarter_and_the_window_of_full_attention() -> None:
    """science: cache against full attention = 1/4 + 3/4 min(S, W) / S."""
    schemes = {"local": cases.ROPE | {"window": 16}, "global": cases.NOPE}
    plan = {"num_layers": 4, "pattern": ["local"] * 3 + ["global"], "schemes": schemes}
    sized = cases.model("rope").model_dump() | {"layer_plan": plan}
    config = type(cases.model("rope")).model_validate(sized)
    model = Transformer(config, ParallelMesh.single())
    whole = Transformer(cases.model("rope"), ParallelMesh.single())  # two full layers
    for length in (8, 16, 64, 256):
        held = Decoder(model, prompts((length,)), 0).cache.bytes
        full = 2 * Decoder(whole, prompts((length,)), 0).cache.bytes
        assert held / full == 0.25 + 0.75 * min(length, 16) / length


@pytest.mark.parametrize("family", ["rnope_swa", "llama4-log", "projection"])
def test_layer_by_layer_in_chunks_is_the_same_forward(family: str) -> None:
    model, _ = built(family)
    tokens = torch.tensor(prompts((31, 31)))
    starts = torch.zeros_like(tokens)
    starts[1, 11:] = 11
    with torch.no_grad():
        found = by_layers(model, tokens, starts, chunk_tokens=8)
        torch.testing.assert_close(found, model.hidden(tokens, starts), rtol=1e-9, atol=1e-9)


def test_empty_prompts_and_full_caches_are_refused() -> None:
    model, _ = built("nope")
    with pytest.raises(ConfigError, match=r"prompts=\[0\].*at least one token"):
        Decoder(model, [[]], 3)
    decoder = Decoder(model, [[1]], 0)
    decoder.prefill()
    with pytest.raises(ConfigError, match="tokens=0 have been added.*more tokens"):
        decoder.step(torch.tensor([1]))
