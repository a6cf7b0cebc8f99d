"""Whether answers end, and the loss by turn of the assistant, of held-out conversations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megahybrid.config import parse
from megahybrid.config.suite import ChatTask, Suite
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.errors import ConfigError
from megahybrid.evaluate.chat import Answered, ChatMaker, answer, scores_of, turns_of
from megahybrid.evaluate.haystack import Material
from megahybrid.evaluate.loss import TURNS, HeldOutLoss, held_out_loss
from megahybrid.evaluate.sampling import next_token_logits
from megahybrid.evaluate.suite import run_suite
from megahybrid.evaluate.suite_table import suite_tables
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.train.validation import HeldOutSets
from tests.data.chat.chats import write_tokenizer
from tests.data_prep.test_chats import job, run, write_rows
from tests.parity import cases
from tests.plain_model import random_tensors
from tests.train.test_validation import held_out_run

CHATS = [
    [("user", "the cat"), ("assistant", f"sees dog {n}"), ("user", "why"), ("assistant", "blue")]
    for n in range(6)
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """The conversations in two sets, of which one ends its turns with no token of its own."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = write_tokenizer(folder)
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    for name in ("chatml", "plain"):
        run(write_rows(folder / "rows.jsonl", rows), tokenizer, folder / name, job(name))
    words = load_tokenizer(tokenizer)
    sets = {name: TokenDataset(folder / name / "train") for name in ("chatml", "plain")}
    return Material(words.info.vocab_size, words, sets)


def task(**fields: Any) -> ChatTask:
    return ChatTask(kind="chat", **{"trials": 6, "lengths": [8, 16], **fields})


def made(material: Material, seed: int = 0, **fields: Any) -> list[Any]:
    draw = np.random.default_rng(seed)
    return list(ChatMaker("one", task(**fields), material).make(fields.get("trials", 6), draw))


def test_prompts_end_where_the_assistant_begins_and_answers_with_the_turn(
    material: Material,
) -> None:
    words = material.tokenizer
    assert words is not None
    end = words.token_id("<|im_end|>")
    turns = set()
    for seed in range(4):
        examples = made(material, seed)
        assert len({example.tokens for example in examples}) == 6  # a conversation each
        for example in examples:
            assert example.expected[-1] == end
            said = words.decode(example.expected)
            turn = example.labels["turn"]
            assert said == "blue" if turn == 2 else said.startswith("sees dog ")
            assert example.prompt.count(end) == 2 * turn - 1  # all before, and none of its own
            turns.add(turn)
    assert turns == {1, 2}


def test_a_turn_that_only_words_end_is_not_asked(material: Material) -> None:
    words = material.tokenizer
    assert words is not None
    for example in made(material, set="plain"):
        assert example.labels["turn"] == 2 and example.expected[-1] == words.info.eod_id


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"trials": 7}, "trials=7 asks for more conversations than set chatml has .* (6)"),
        ({"set": "other"}, r"set=other is not in data.held_out .*: chatml, plain"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    material: Material, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"tasks.one.{told}".replace("(6)", r"\(6\)")):
        made(material, **fields)


def test_answers_are_those_of_a_loop_without_a_cache(material: Material) -> None:
    config = cases.model("rnope_swa", vocab_size=material.vocab_size)
    model = Transformer(config, ParallelMesh.single()).double()
    model.load_canonical(random_tensors(config, 5))
    examples, most = made(material), 12
    # Whatever comes first after the first prompt ends a turn, so that one does end here.
    first = int(next_token_logits(model, torch.tensor([examples[0].prompt])).argmax())
    examples = [
        type(one)((*one.tokens[:-1], first), one.question, one.answer, labels=one.labels)
        for one in examples
    ]
    found = answer(
        model, examples, most, vocab_size=material.vocab_size, eod_id=-1, batch_tokens=64
    )
    for one, example in zip(found, examples, strict=True):
        known = list(example.prompt)
        while len(known) < len(example.prompt) + most and known[-1] != first:
            known.append(int(next_token_logits(model, torch.tensor([known])).argmax()))
        said = len(known) - len(example.prompt)
        assert one.tokens == (said if known[-1] == first else None)
    assert found[0].tokens == 1 and {one.tokens for one in found} != {1}


def test_scores_are_shares_by_turn_and_of_all(material: Material) -> None:
    examples = made(material, seed=2)
    turns = [example.labels["turn"] for example in examples]
    answers = [Answered(8, True), Answered(9, False), *[Answered(None, False)] * 4]
    told = scores_of(examples, answers, [8, 16])
    for row in told["rows"]:
        mine = [one for one, its in zip(answers, turns, strict=True) if row["task"][-1] == str(its)]
        ended = [one for one in mine if one.tokens is not None and one.tokens <= row["length"]]
        assert (row["trials"], row["score"]) == (len(mine), len(ended) / len(mine))
    assert [(row["ended"], row["exact"]) for row in told["ended"]] == [
        (pytest.approx(1 / 6), pytest.approx(1 / 6)),
        (pytest.approx(2 / 6), pytest.approx(1 / 6)),
    ]


def test_a_suite_asks_and_tells_it(material: Material) -> None:
    config = cases.model("rnope_swa", vocab_size=material.vocab_size)
    model = Transformer(config, ParallelMesh.single())
    suite = parse(Suite, {"tasks": {"ends": {"kind": "chat", "lengths": [8], "trials": 5}}})
    result = run_suite(model, suite, material)
    assert json.loads(json.dumps(result)) == result
    (told,) = result["tasks"].values()
    assert told["ended"][0]["trials"] == 5 == sum(row["trials"] for row in told["rows"])
    assert len(list(suite_tables(result))) == 2


def test_loss_by_turn_is_a_loop_over_runs_of_targets() -> None:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 50, (3, 60), generator=draw)
    targets[torch.rand(3, 60, generator=draw) < 0.5] = -100
    losses = torch.rand(3, 60, generator=draw)

    def token_loss(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        return losses

    rows = [(targets, targets, torch.zeros_like(targets))]
    sums: dict[int, list[float]] = {}
    for row in range(3):
        for turn, (first, stop) in enumerate(turns_of(targets[row].numpy() != -100), 1):
            sums.setdefault(min(turn, TURNS), []).extend(losses[row, first:stop].tolist())
    alone, cpu = Axis.single("data"), torch.device("cpu")
    score = held_out_loss(token_loss, rows, 60, 64, alone, cpu, turns=True)
    assert score.by_turn is not None and len(sums) == len(score.by_turn)
    for one in score.by_turn:
        found = sums[one.turn]
        assert one.tokens == len(found)
        assert one.loss == pytest.approx(sum(found) / len(found))
    assert score.by_position == held_out_loss(token_loss, rows, 60, 64, alone, cpu).by_position
    assert sum(one.tokens for one in score.by_turn) == score.tokens


def test_held_out_conversations_are_told_by_turn_however_short(
    material: Material, tmp_path: Path
) -> None:
    run = held_out_run(tmp_path)  # whose shortest rows are longer than some of these
    found = {}

    def keep(name: str, score: HeldOutLoss, rows: str) -> None:
        found[rows] = score

    def ones(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        return (targets != -100).float()

    dataset = material.held_out["chatml"]
    sets = HeldOutSets(run, ParallelMesh.single(), sets={"chats": dataset})
    sets.min_tokens = 10_000
    sets.score(ones, 64, keep)
    sets.score_far(ones, keep)
    counted = {1: 0, 2: 0}
    for start, size in dataset.document_spans():
        for turn, (first, stop) in enumerate(turns_of(dataset.counts(start, size)), 1):
            counted[turn] += stop - first
    assert found["stream"].by_turn is None
    told = found["documents"].to_json()["by_turn"]
    assert told == [{"turn": n, "tokens": counted[n], "loss": 1.0} for n in (1, 2)]


def test_turns_are_runs_of_targets() -> None:
    counts = np.asarray([0, 1, 1, 0, 0, 1], bool)
    assert turns_of(counts) == [(1, 3), (5, 6)]
    assert turns_of(counts[:1]) == [] and turns_of(~counts[:1]) == [(0, 1)]
