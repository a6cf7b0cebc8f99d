"""Needles stand where asked, at exactly the length asked, and their scores are what they say."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megahybrid.config import parse
from megahybrid.config.suite import NeedleTask, Suite
from megahybrid.data.token_writer import TokenWriter
from megahybrid.errors import ConfigError, DataError
from megahybrid.evaluate.answers import by_labels, score_answers, wilson
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import greedy
from megahybrid.evaluate.haystack import Material
from megahybrid.evaluate.needle import NeedleMaker
from megahybrid.evaluate.suite import example_draw, examples_of, run_suite
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.evaluate.characters import VOCAB, Characters, material
from tests.parity import cases
from tests.plain_model import PlainModel, random_tensors

TEXT = Characters().decode


def task(**fields: Any) -> NeedleTask:
    return parse(NeedleTask, {"kind": "needle", "lengths": [400], **fields})


@pytest.mark.parametrize("hay", ["noise", "keys"])
@pytest.mark.parametrize("variant", ["single", "multi_key", "multi_value", "multi_query"])
def test_example_has_the_length_and_holds_needles_question_and_answer(
    variant: str, hay: str
) -> None:
    settings = {"variant": variant, "needles": 3, "haystack": {"kind": hay}}
    maker = NeedleMaker(task(**settings), material())
    for trial in range(5):
        one = maker.make(700, 0.5, example_draw(1, "test", trial))
        assert len(one.tokens) == 700
        answer, question = TEXT(one.expected), TEXT(one.tokens[one.question : one.answer])
        assert answer == " " + ", ".join(one.references)
        assert (
            len(one.needles)
            == len(one.references)
            == (1 if "key" in variant or variant == "single" else 3)
        )
        told = [TEXT(one.tokens[start:stop]) for start, stop in one.needles]
        assert all(any(value in needle for needle in told) for value in one.references)
        if variant == "multi_value":  # asked in the order of the text
            assert [value in needle for value, needle in zip(one.references, told, strict=True)]
        for needle in told:
            key = needle.split(" for ")[1].split(" is")[0]
            assert key in question
        assert TEXT(one.tokens[: one.question]).count(one.references[0]) == 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needle_stands_at_its_depth(depth: float, tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text("abcdefghijklmnop" * 40)
    hay = {"kind": "text", "path": str(tmp_path / "hay.txt")}
    one = NeedleMaker(task(haystack=hay), material()).make(600, depth, example_draw(1, "x"))
    (start, stop) = one.needles[0]
    size = one.question - (stop - start)
    assert start == round(depth * size)
    rest = TEXT(one.tokens[:start] + one.tokens[stop : one.question])
    assert rest in "abcdefghijklmnop" * 80


def test_noise_and_keys_are_cut_between_sentences_only() -> None:
    for hay in ("noise", "keys"):
        maker = NeedleMaker(
            task(haystack={"kind": hay, **({"text": "One two. "} if hay == "noise" else {})}),
            material(),
        )
        one = maker.make(500, 0.4, example_draw(2, hay))
        before = TEXT(one.tokens[: one.needles[0][0]])
        assert before.endswith("One two. " if hay == "noise" else ".")


def test_held_out_documents_are_hay_without_their_ends(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "set", Characters.info) as writer:
        for text in ("hello there", "general"):
            writer.add(np.asarray(Characters().encode([text])[0]))
    from megahybrid.data.dataset import TokenDataset

    held = Material(VOCAB, Characters(), {"books": TokenDataset(tmp_path / "set")})
    one = NeedleMaker(task(haystack={"kind": "held_out"}), held).make(
        300, 0.0, example_draw(1, "y")
    )
    hay = TEXT(one.tokens[one.needles[0][1] : one.question])
    assert hay in "hello theregeneral" * 30
    assert 1 not in one.tokens
    with pytest.raises(DataError, match=r"haystack.set=film is not a held-out set.*books"):
        NeedleMaker(task(haystack={"kind": "held_out", "set": "film"}), held)


def test_same_seed_draws_the_same_examples_and_trials_differ() -> None:
    def made(seed: int) -> list[Example]:
        return examples_of("n", task(trials=3, depths=[0.5]), seed, material())

    assert made(1) == made(1)
    assert len({one.tokens for one in made(1) + made(2)}) == 6
    # A suite with another depth more has the same examples at the depths it had.
    more = examples_of("n", task(trials=3, depths=[0.1, 0.5]), 1, material())
    assert more[3:] == made(1)


def test_lengths_that_cannot_hold_the_needle_and_lists_too_short_are_refused() -> None:
    with pytest.raises(ConfigError, match="lengths=50 is too short for needles"):
        NeedleMaker(task(), material()).make(50, 0.5, example_draw(1, "z"))
    few = task(keys=["a", "b"], variant="multi_key", needles=4)
    with pytest.raises(ConfigError, match="4 different strings are needed but the list has 2"):
        NeedleMaker(few, material()).make(400, 0.5, example_draw(1, "z"))
    with pytest.raises(ConfigError, match=r"needle='x' does not name \{key\}"):
        task(needle="x")
    with pytest.raises(ConfigError, match="needles are text"):
        NeedleMaker(task(), Material(VOCAB, None, {}))


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, PlainModel]:
    config = cases.model("rnope_swa", vocab_size=VOCAB + 3)
    tensors = random_tensors(config, 5)
    model = Transformer(config, ParallelMesh.single()).double()
    model.load_canonical(tensors)
    return model, PlainModel(config, tensors)


def test_exact_match_is_what_greedy_decoding_writes(
    models: tuple[Transformer, PlainModel],
) -> None:
    """Teacher-forced arg-max on every answer token ⇔ greedy decoding gives the answer."""
    model, _ = models
    draw = np.random.default_rng(0)
    examples = []
    for number in range(40):
        prompt = draw.integers(0, VOCAB, int(draw.integers(2, 12))).tolist()
        answer = greedy(model, [prompt], 4, vocab_size=VOCAB)[0]
        if number % 2:  # a slip at any place, the first and the last too
            answer[number % 4] = (answer[number % 4] + 1 + number) % VOCAB
        examples.append(Example(tuple(prompt + answer), len(prompt), len(prompt)))
    scores = score_answers(model, examples, vocab_size=VOCAB, batch_tokens=40)
    for one, score in zip(examples, scores, strict=True):
        written = greedy(model, [one.prompt], 4, vocab_size=VOCAB)[0]
        assert score.exact == (tuple(written) == one.expected)
    assert 0 < sum(score.exact for score in scores) < 40


def test_log_likelihood_is_that_of_the_plain_model_over_the_tokenizers_ids(
    models: tuple[Transformer, PlainModel],
) -> None:
    model, plain = models
    one = Example((3, 4, 5, 6, 7, 8), 2, 3)
    some = Example((3, 4, 5, 6, 7, 8), 2, 3, (), (3, 5))
    logits = plain.logits(torch.tensor([one.tokens]))[0, :, :VOCAB].log_softmax(-1)
    each = [float(logits[n - 1, one.tokens[n]].detach()) for n in (3, 4, 5)]
    whole, part = score_answers(model, [one, some], vocab_size=VOCAB)
    assert whole.log_likelihood == pytest.approx(sum(each))
    assert part.log_likelihood == pytest.approx(each[0] + each[2]) and part.tokens == 2


def test_rates_have_wilsons_interval() -> None:
    # Wilson 1927, as in Brown, Cai, DasGupta 2001: 0 of 10 and 8 of 10.
    none, most = wilson(0.0, 10), wilson(0.8, 10)
    assert (none.low, round(none.high, 4)) == (0.0, 0.2775)
    assert (round(most.low, 4), round(most.high, 4)) == (0.4902, 0.9433)
    assert math.isnan(wilson(0.0, 0).value)


def test_suite_tables_have_a_row_for_each_length_and_depth(
    models: tuple[Transformer, PlainModel],
) -> None:
    suite = parse(
        Suite,
        {
            "tasks": {
                "one": {"kind": "needle", "lengths": [200, 160], "depths": [0.0, 1.0], "trials": 2},
                "many": {"kind": "recall", "lengths": [32], "trials": 3},
            }
        },
    )
    told: list[tuple[str, int, int]] = []
    result = run_suite(models[0], suite, material(), lambda *args: told.append(args))
    rows = result["tasks"]["one"]["rows"]
    assert [(row["length"], row["depth"]) for row in rows] == [
        (length, depth) for length in (200, 160) for depth in (0.0, 1.0)
    ]
    assert all(row["trials"] == 2 and 0 <= row["exact"] <= row["exact_high"] for row in rows)
    assert told[-1] == ("many", 3, 3) and ("one", 8, 8) in told
    many = result["tasks"]["many"]["by_length"]
    assert many[0]["log_likelihood_per_token"] < 0 and many[0]["trials"] == 3


def test_rates_of_groups_are_means_of_their_examples() -> None:
    from megahybrid.evaluate.answers import Score

    examples = [Example((1, 2, 3), 1, 1, labels={"length": 3, "depth": d}) for d in (0, 0, 1)]
    scores = [Score(True, 1.0, -1.0, 2), Score(False, 0.5, -5.0, 2), Score(False, 0.0, -9.0, 2)]
    near, far = by_labels(examples, scores, ("depth",))
    assert (near["exact"], near["token_accuracy"], near["log_likelihood"]) == (0.5, 0.75, -3.0)
    assert (far["exact"], far["log_likelihood_per_token"], far["trials"]) == (0.0, -4.5, 1)
