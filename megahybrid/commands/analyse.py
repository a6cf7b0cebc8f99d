"""`megahybrid analyse`: what a checkpoint's heads look at while it answers."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megahybrid.commands.trained_model import TrainedModel, header, keep, load_trained_model
from megahybrid.config.suite import ChatTask, NeedleTask, RulerTask, Suite, load_suite
from megahybrid.errors import EXIT_DONE, ConfigError, DataError
from megahybrid.evaluate.attention import AttentionStatistics, attention_of, to_json
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.suite import examples_of
from megahybrid.evaluate.suite_table import attention_tables
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.plain_file import read_plain_file
from megahybrid.train.suites import material_of

RETRIEVAL = 0.1  # needle mass while answering from which a head is listed; arXiv 2404.15574's share


def analyse(
    path: Path,
    mesh: ParallelMesh,
    *,
    suite_file: Path | None = None,
    examples_file: Path | None = None,
    length: int | None = None,
    depth: float | None = None,
    trials: int | None = None,
    threshold: float = RETRIEVAL,
    tokenizer: Path | None = None,
    changes: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Print attention mass, entropy and retrieval heads, and keep them in the run's `evaluations`.

    Examples are those of the suite's needle and synthetic tasks, or of a JSON list of {tokens,
    question, answer, needles}, or `trials` (8) needles at `depth` (0.5) in texts of `length` tokens
    (the stage's longest). Those of one task, length and depth are averaged. Raises MegahybridError,
    one line, for whatever the user can mend. Returns the exit code.
    """
    if suite_file is not None and examples_file is not None:
        raise ConfigError("--examples and a suite were given (2 sources). Give one of them.")
    source = suite_file or examples_file
    for option, value in (("--length", length), ("--depth", depth), ("--trials", trials)):
        if source is not None and value is not None:
            raise ConfigError(f"{option}={value:g} says nothing to {source}. Leave it out.")
    if not threshold >= 0:
        raise ConfigError(f"--threshold={threshold:g} is no share. Use 0 to 1.")
    trained = load_trained_model(path, mesh, changes)
    if examples_file is not None:
        groups = _own_examples(examples_file, trained.run.model.vocab_size)
        name = examples_file.stem
    else:
        suite = _suite(trained, suite_file, length, 0.5 if depth is None else depth, trials)
        name = "needle" if suite_file is None else suite_file.stem
        material = material_of(trained.run, suite, tokenizer)
        groups = {}
        for task_name, task in suite.tasks.items():
            if isinstance(task, RulerTask | ChatTask):
                continue  # its answers are generated, so there is no given text to look at
            for example in examples_of(task_name, task, suite.seed, material):
                labels = {"task": task_name, **example.labels}
                groups.setdefault(json.dumps(labels), []).append(example)
        if not groups:
            raise ConfigError(
                f"{suite_file} has no needle or synthetic task (0 examples). Add one to analyse."
            )
    started = time.monotonic()
    results = _analysed(trained, groups, threshold)
    result = {**header(trained), "seconds": time.monotonic() - started, "results": results}
    kept = keep(trained, "attention", name, result)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _print(trained, results, kept)
    return EXIT_DONE


def _suite(
    trained: TrainedModel, file: Path | None, length: int | None, depth: float, trials: int | None
) -> Suite:
    if file is not None:
        return load_suite(file)
    if not 0 <= depth <= 1:
        raise ConfigError(f"--depth={depth:g} is no share of the text. Use 0 to 1.")
    for name, value in (("--trials", trials), ("--length", length)):
        if value is not None and value < (8 if name == "--length" else 1):
            raise ConfigError(f"{name}={value} asks nothing. Use more.")
    task = NeedleTask(
        kind="needle", lengths=[length or trained.length], depths=[depth], trials=trials or 8
    )
    return Suite(tasks={"needle": task})


def _own_examples(file: Path, vocab_size: int) -> dict[str, list[Example]]:
    try:
        given = json.loads(read_plain_file(file))
        examples = [
            Example(
                tuple(int(token) for token in one["tokens"]),
                int(one["question"]),
                int(one["answer"]),
                tuple((int(start), int(stop)) for start, stop in one.get("needles", ())),
            )
            for one in given
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--examples={file} is not a JSON list of tokens, question, answer and needles "
            f"({error}). Give token ids, two indices and [first, last + 1] of each needle."
        ) from None
    groups: dict[str, list[Example]] = {}
    for example in examples:
        if not all(0 <= token < vocab_size for token in example.tokens):
            raise DataError(
                f"--examples={file} has token ids outside the vocabulary "
                f"(model.vocab_size={vocab_size}). Use the model's own tokenizer."
            )
        labels = {"task": file.stem, "length": len(example.tokens)}
        groups.setdefault(json.dumps(labels), []).append(example)
    if not groups:
        raise DataError(f"--examples={file} is empty (0 examples). Give at least one.")
    return groups


def _analysed(
    trained: TrainedModel, groups: dict[str, list[Example]], threshold: float
) -> list[dict[str, Any]]:
    kinds = trained.run.plan_at(trained.run.stages.index(trained.stage)).names()
    results = []
    with Console(stderr=True).status("looking") as status:
        for labels, examples in groups.items():
            parts, right = [], 0
            for number, example in enumerate(examples):
                status.update(f"{labels}: {number + 1} of {len(examples)}")
                attention, logits = attention_of(trained.model, example)
                parts.append(attention)
                likeliest = logits.argmax(dim=-1).tolist()
                right += all(
                    likeliest[place - example.answer] == example.tokens[place]
                    for place in example.counted
                )
            figures = to_json(AttentionStatistics.mean(parts), kinds, threshold)
            told = {"trials": len(examples), "exact": right / len(examples)}
            results.append({**json.loads(labels), **told, "attention": figures})
    return results


def _print(trained: TrainedModel, results: Sequence[dict[str, Any]], kept: Path | None) -> None:
    # Ten columns of figures: where nobody looks at a terminal, rich would assume 80 characters.
    console = Console(highlight=False, width=max(110, Console().width))
    changed = f"\nchanged: {', '.join(trained.changes)}" if trained.changes else ""
    told = f"{trained.checkpoint}\nstep {trained.step:,}{changed}"
    console.print(told, markup=False, soft_wrap=True)
    for result in results:
        depth = f", depth {result['depth']:g}" if "depth" in result else ""
        console.print(
            f"\n{result['task']}: {result['length']:,} tokens{depth}, {result['trials']} examples, "
            f"{result['exact']:.0%} answered",
            markup=False,
        )
        for title, table in attention_tables(result["attention"]):
            console.print(title, markup=False, soft_wrap=True)
            console.print(table)
    if kept is not None:
        console.print(f"\nkept in {kept}", markup=False, soft_wrap=True)
