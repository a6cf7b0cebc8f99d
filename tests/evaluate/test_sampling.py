from collections import Counter
from typing import Any

import pytest
import torch

from megahybrid.errors import MegahybridError
from megahybrid.evaluate.sampling import next_token_logits, sample_tokens
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity import cases
from tests.plain_model import PlainModel, random_tensors

PROMPT = [7, 3, 11, 40]
VOCAB = 50  # padded to 56
EVERYTHING: dict[str, Any] = {
    "tokens": 12,
    "temperature": 1.0,
    "seed": 5,
    "context_tokens": 64,
    "vocab_size": VOCAB,
    "eod_id": -1,
}


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, PlainModel]:
    """The same weights in the model and in the plain one, float64 so that no tie is broken."""
    config = cases.model("rnope_swa", vocab_size=VOCAB, logit_scale=0.5)
    tensors = random_tensors(config, 0)
    model = Transformer(config, ParallelMesh.single()).double()
    model.load_canonical(tensors)
    return model, PlainModel(config, tensors)


def test_logits_are_those_of_the_plain_models_last_token(
    models: tuple[Transformer, PlainModel],
) -> None:
    model, plain = models
    tokens = torch.tensor([PROMPT, PROMPT[::-1]])
    found = next_token_logits(model, tokens)
    assert found.shape == (2, VOCAB)
    torch.testing.assert_close(found, plain.logits(tokens)[:, -1], rtol=1e-10, atol=1e-10)


def test_temperature_zero_takes_the_likeliest_token_each_time(
    models: tuple[Transformer, PlainModel],
) -> None:
    model, plain = models
    known = list(PROMPT)
    for _ in range(12):
        known.append(int(plain.logits(torch.tensor([known]))[0, -1].argmax()))
    found = sample_tokens(model, PROMPT, **EVERYTHING | {"temperature": 0})
    assert found == known[len(PROMPT) :]


def test_sample_is_a_function_of_the_seed_and_longer_ones_begin_alike(
    models: tuple[Transformer, PlainModel],
) -> None:
    model, _ = models
    one = sample_tokens(model, PROMPT, **EVERYTHING)
    assert sample_tokens(model, PROMPT, **EVERYTHING) == one
    assert sample_tokens(model, PROMPT, **EVERYTHING | {"tokens": 20})[:12] == one
    assert sample_tokens(model, PROMPT, **EVERYTHING | {"seed": 6}) != one
    assert len(one) == 12


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(
    models: tuple[Transformer, PlainModel], temperature: float
) -> None:
    model, plain = models
    scores = plain.logits(torch.tensor([PROMPT]))[0, -1]
    wanted = torch.softmax(scores / temperature, 0)
    draws = 600
    counted: Counter[int] = Counter()
    for seed in range(draws):
        setting = EVERYTHING | {"tokens": 1, "temperature": temperature, "seed": seed}
        counted.update(sample_tokens(model, PROMPT, **setting))
    found = torch.tensor([counted[token] / draws for token in range(VOCAB)])
    # Five standard deviations of a share of 600 draws.
    assert ((found - wanted).abs() <= 5 * (wanted / draws).sqrt() + 5 / draws).all()


def test_ids_that_the_tokenizer_does_not_know_are_never_taken(
    models: tuple[Transformer, PlainModel],
) -> None:
    model, _ = models
    setting = EVERYTHING | {"tokens": 40, "temperature": 50.0}
    assert max(sample_tokens(model, PROMPT, **setting)) < VOCAB
    assert max(sample_tokens(model, PROMPT, **setting | {"vocab_size": 10})) < 10


def test_sample_ends_with_the_document(models: tuple[Transformer, PlainModel]) -> None:
    model, _ = models
    whole = sample_tokens(model, PROMPT, **EVERYTHING)
    eod = whole[4]
    ended = sample_tokens(model, PROMPT, **EVERYTHING | {"eod_id": eod})
    assert ended == whole[: whole.index(eod)]


def test_cropped_context_is_the_last_tokens_and_is_told_once(
    models: tuple[Transformer, PlainModel],
) -> None:
    model, plain = models
    told: list[None] = []
    known = list(PROMPT)
    for _ in range(6):
        known.append(int(plain.logits(torch.tensor([known[-6:]]))[0, -1].argmax()))
    setting = EVERYTHING | {"tokens": 6, "temperature": 0, "context_tokens": 6}
    found = sample_tokens(model, PROMPT, **setting, cropped=lambda: told.append(None))
    assert found == known[len(PROMPT) :]
    assert len(told) == 1
    told.clear()
    sample_tokens(model, PROMPT, **setting | {"tokens": 3}, cropped=lambda: told.append(None))
    assert not told


def test_broken_weights_are_told() -> None:
    config = cases.model("rope", vocab_size=VOCAB)
    model = Transformer(config, ParallelMesh.single())
    torch.nn.init.constant_(model.final_norm.weight, torch.nan)
    with pytest.raises(MegahybridError, match="not finite after 4 tokens.*earlier checkpoint"):
        sample_tokens(model, PROMPT, **EVERYTHING)
