"""The harness's requests against explicit log-softmax and full recomputation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.errors import ConfigError
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.distributed import run
from tests.evaluate.characters import EOD, VOCAB, Characters
from tests.parity import cases
from tests.plain_model import PlainModel, random_tensors

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is an optional package")


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, PlainModel]:
    from megahybrid.evaluate.lm_eval_adapter import HybridLM

    config = cases.model("rnope_swa", vocab_size=VOCAB)
    tensors = random_tensors(config, 5)
    model = Transformer(config, ParallelMesh.single()).double()
    model.load_canonical(tensors)
    adapter = HybridLM(model, Characters(), eod_id=EOD, max_length=24, batch_tokens=60)
    return adapter, PlainModel(config, tensors)


def likelihoods(plain: PlainModel, tokens: list[int]) -> torch.Tensor:
    """Of each token but the first, given all before."""
    logits = plain.logits(torch.tensor([tokens]))[0, :-1].detach().log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def ids(text: str) -> list[int]:
    return Characters().encode([text])[0]


def test_loglikelihood_is_the_sum_over_the_continuation(pair: tuple[Any, PlainModel]) -> None:
    adapter, plain = pair
    asked = [
        ("Hello", " world"),
        ("", "abc"),
        ("a much longer context than fits", "!?"),
        ("x ", "y"),
    ]
    found = adapter.loglikelihood([Request(args) for args in asked], disable_tqdm=True)
    wanted = [
        likelihoods(plain, ids("Hello world"))[-6:],
        likelihoods(plain, [EOD, *ids("abc")]),
        likelihoods(plain, ids("a much longer context than fits!?")[-25:])[-2:],
        likelihoods(plain, ids("x y"))[-2:],  # the space belongs to what follows
    ]
    for (value, _), each in zip(found, wanted, strict=True):
        assert value == pytest.approx(float(each.sum()), abs=1e-9)


def test_rolling_scores_every_token_once(pair: tuple[Any, PlainModel]) -> None:
    adapter, plain = pair
    text = "The quick brown fox jumps over the lazy dog, twice."
    found = adapter.loglikelihood_rolling([Request((text,)), Request(("ab",))], disable_tqdm=True)
    whole = [EOD, *ids(text)]
    total, done = 0.0, 1
    # The harness: 24 tokens from the prefix; then windows of 24 that end 24 further on.
    total += float(likelihoods(plain, whole[:25]).sum())
    done = 25
    while done < len(whole):
        stop = min(done + 24, len(whole))
        start = max(0, stop - 25)
        total += float(likelihoods(plain, whole[start:stop])[-(stop - done) :].sum())
        done = stop
    assert found[0] == pytest.approx(total, abs=1e-8)
    assert found[1] == pytest.approx(float(likelihoods(plain, [EOD, *ids("ab")]).sum()))


def test_generation_is_greedy_and_ends_at_a_stop(pair: tuple[Any, PlainModel]) -> None:
    adapter, plain = pair
    known = ids("Once")
    for _ in range(12):
        known.append(int(plain.logits(torch.tensor([known]))[0, -1].argmax()))
    written = Characters().decode(known[4:])
    asked = [("Once", {"max_gen_toks": 12, "until": []}), ("Hm", {"max_gen_toks": 12})]
    asked.append(("Once", {"max_gen_toks": 12, "until": [written[5:7]]}))
    found = adapter.generate_until([Request(args) for args in asked], disable_tqdm=True)
    assert found[0] == written
    assert found[2] == written.split(written[5:7])[0]
    with pytest.raises(ConfigError, match="do_sample=true.*greedy"):
        adapter.generate_until([Request(("a", {"do_sample": True, "temperature": 1.0}))])


def answered(ranks: Any) -> list[Any]:
    """One request of each type, on the ranks of a tensor axis."""
    from megahybrid.evaluate.lm_eval_adapter import HybridLM

    config = cases.model("rnope_swa", vocab_size=VOCAB)
    model = Transformer(config, ranks.mesh()).double()
    model.load_canonical(random_tensors(config, 5))
    adapter = HybridLM(model, Characters(), eod_id=EOD, max_length=24)
    likely = adapter.loglikelihood([Request(("Hello", " world"))], disable_tqdm=True)
    rolled = adapter.loglikelihood_rolling([Request(("A text of more than 24",))])
    text = adapter.generate_until([Request(("Once", {"max_gen_toks": 7}))])
    return [*likely, rolled, text]


def test_ranks_of_a_tensor_axis_answer_as_one_process() -> None:
    ((expected, exact), rolled, text), *_ = run(1, answered)
    for (value, same), values, texts in run(2, answered):
        assert value == pytest.approx(expected, rel=1e-9) and same == exact
        assert values == pytest.approx(rolled, rel=1e-9) and texts == text


def test_harness_runs_a_task_over_local_data(pair: tuple[Any, PlainModel], tmp_path: Path) -> None:
    rows = [
        {"text": f"Item {n} is", "choices": [" a", " bee", " cow"], "label": n % 3}
        for n in range(4)
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    from lm_eval.tasks import TaskManager

    adapter, plain = pair
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=["own_choice"], task_manager=manager, bootstrap_iters=0
    )
    right = 0
    for row in rows:
        sums = [
            float(likelihoods(plain, ids(row["text"] + c))[-len(c) :].sum())  # type: ignore[operator, arg-type]
            for c in row["choices"]  # type: ignore[attr-defined]
        ]
        right += sums.index(max(sums)) == row["label"]
    assert found["results"]["own_choice"]["acc,none"] == right / 4
