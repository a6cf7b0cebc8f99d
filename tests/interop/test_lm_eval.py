"""lm-evaluation-harness on an export, through its own wrapper of transformers, and on our model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.commands.trained_model import load_trained_model
from megahybrid.config.base import dump
from megahybrid.config.parsing import parse
from megahybrid.config.run import RunConfig
from megahybrid.data.run_tokenizer import tokenizer_of
from megahybrid.data.tokenizer import load_tokenizer, train_sentencepiece
from megahybrid.interop.export import export
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import (
    HEAD,
    LOCAL,
    NOPE,
    PARALLEL,
    ROPE,
    checkpoint_of_model,
    model_of,
    run_of_model,
)
from tests.plain_model import random_tensors

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is an optional package")
pytest.importorskip("accelerate", reason="the harness's wrapper of transformers needs accelerate")

TASKS = Path(__file__).parents[2] / "configs/lm_eval"
TEXT = "The quick brown fox jumps over the lazy dog. Paris is in France; 12 + 30 = 42.\n"
LENGTH = 64  # of the run's rows, and so what both sides see
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Cohere2": ([LOCAL, LOCAL, NOPE], PARALLEL),
    "SmolLM3": ([LOCAL, LOCAL, NOPE], {"tie_embeddings": False}),
    "Megahybrid": ([LOCAL | HEAD, ROPE | HEAD | {"window": 9}, NOPE | HEAD], {}),
}
ROWS = {
    "arc": [
        {
            "question": f"Which is {n}?",
            "choices": {"text": ["the fox", "12", "Paris is", "a dog"], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(6)
    ],
    "hellaswag": [
        {
            "activity_label": "Jumping",
            "ctx_a": f"The fox number {n} jumps.",
            "ctx_b": "the dog",
            "endings": [" is lazy. [step]", "is in Paris", "equals 42", "jumps over it"],
            "label": str(n % 4),
        }
        for n in range(6)
    ],
    "mmlu": [
        {"question": f"{n} + 30 = ? ", "choices": ["12", "42", "30", "0"], "answer": n % 4}
        for n in range(6)
    ],
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's wrapper on the export, and our adapter on the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    from megahybrid.evaluate.lm_eval_adapter import HybridLM

    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "t.model").write_bytes(train_sentencepiece([TEXT] * 40, vocab_size=330))
    schemes, fields = CASES[request.param]
    model = model_of(schemes, vocab_size=330, **fields)
    lengths = f"{{{LENGTH}: 1}}"
    run = run_of_model(model, f"stages.0.lengths={lengths}", f"stages.1.lengths={lengths}")
    run = parse(
        RunConfig, dump(run) | {"data": dump(run.data) | {"tokenizer": str(folder / "t.model")}}
    )
    # Pieces of one byte are never the likeliest: what is no UTF-8 is shown in two ways.
    words = load_tokenizer(folder / "t.model")
    tensors = random_tensors(model, 3, dtype=torch.float32, std=0.15)
    head = tensors["embedding.weight" if model.tie_embeddings else "head.weight"].data
    texts = [words.decode([token]) for token in range(330)]
    head[[n for n, text in enumerate(texts) if text == "\ufffd" or not text.isprintable()]] = 0
    checkpoint_of_model(folder / "run", model, run=run, tensors=tensors)
    export(folder / "run", folder / "out")
    theirs = HFLM(
        pretrained=str(folder / "out"), device="cpu", dtype="float32", batch_size=3,
        trust_remote_code=True,
    )  # fmt: skip
    trained = load_trained_model(folder / "run", ParallelMesh.single())
    _, eod_id = tokenizer_of(trained.run, None)
    ours = HybridLM(trained.model, words, eod_id=eod_id, max_length=trained.longest)
    assert theirs.max_length == ours.max_length == LENGTH
    return theirs, ours


def asked(method: Any, kind: str, requests: list[tuple[Any, ...]]) -> Any:
    """What a model answers to requests of the harness."""
    from lm_eval.api.instance import Instance

    return getattr(method, kind)(
        [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]
    )


def test_log_likelihoods_are_the_same(pair: Any) -> None:
    theirs, ours = pair
    requests = [
        ("Hello", " world"), ("", "The quick"), ("Paris is in ", "France"), ("x\n", "y z"),
        (TEXT, "The"), (TEXT * 5, " fox jumps"), ("12 + 30 =", " 42.\n"),
    ]  # fmt: skip
    found, wanted = (asked(model, "loglikelihood", requests) for model in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    for (a, _), (b, _) in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_rolling_log_likelihoods_are_the_same(pair: Any) -> None:
    theirs, ours = pair
    requests = [(TEXT,), (TEXT * 7,), ("ab",)]
    found, wanted = (asked(model, "loglikelihood_rolling", requests) for model in (ours, theirs))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_greedy_texts_are_the_same(pair: Any) -> None:
    theirs, ours = pair
    settings = {"until": ["\n", "fox"], "max_gen_toks": 30, "do_sample": False}
    requests = [(text, settings) for text in ("The", "Paris is in France", TEXT * 5, "12 +")]
    found, wanted = (asked(model, "generate_until", requests) for model in (ours, theirs))
    assert found == wanted


def test_local_tasks_of_the_known_schemas_score_the_same(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data/lm_eval").mkdir(parents=True)
    for name, rows in ROWS.items():
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"data/lm_eval/{name}.jsonl").write_text(text)
    from lm_eval.tasks import TaskManager

    tables, scores = [], []
    for model in pair:
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, tasks=[f"{name}_local" for name in ROWS], task_manager=manager,
            bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        tables.append({task: _figures(row) for task, row in found["results"].items()})
        samples = [sample for task in sorted(found["samples"]) for sample in found["samples"][task]]
        scores.append([answer[0] for sample in samples for answer in sample["filtered_resps"]])
    assert tables[0] == tables[1]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert len(scores[0]) == 3 * 6 * 4


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "stderr" not in name}
