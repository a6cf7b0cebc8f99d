"""`megahybrid analyse`: what a checkpoint's heads look at while it answers."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megahybrid.commands.named_data import with_held_out
from megahybrid.commands.trained_model import TrainedModel, header, keep, load_trained_model
from megahybrid.config.suite import (
    ChatTask,
    HeldOutHaystack,
    NeedleTask,
    NoiseHaystack,
    RulerTask,
    Suite,
    load_suite,
)
from megahybrid.errors import EXIT_DONE, ConfigError, DataError
from megahybrid.evaluate.attention import AttentionStatistics, attention_of, to_json
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.progress import EvaluationProgress
from megahybrid.evaluate.suite import examples_of
from megahybrid.evaluate.suite_table import attention_tables
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.plain_file import read_plain_file
from megahybrid.train.suites import material_of

RETRIEVAL = 0.1  # needle mass while answering from which a head is listed; arXiv 2404.15574's share


@dataclass(frozen=True)
class Looked:
    """What to look at: examples of a suite, of a file, or needles of one length and depth."""

    suite_file: Path | None = None
    examples_file: Path | None = None
    data: Mapping[str, Path] | None = None  # held-out sets for hay, instead of the run's
    length: int | None = None  # None: the stage's longest rows
    depth: float | None = None  # None: 0.5
    trials: int | None = None  # None: 8
    threshold: float = RETRIEVAL
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if self.suite_file is not None and self.examples_file is not None:
            raise ConfigError("--examples and a suite were given (2 sources). Give one of them.")
        source = self.suite_file or self.examples_file
        for option in ("length", "depth", "trials"):
            value = getattr(self, option)
            if source is not None and value is not None:
                raise ConfigError(f"--{option}={value:g} says nothing to {source}. Leave it out.")
        if self.examples_file is not None and self.data is not None:
            raise ConfigError(f"--data says nothing to {self.examples_file}. Leave it out.")
        if not self.threshold >= 0:
            raise ConfigError(f"--threshold={self.threshold:g} is no share. Use 0 to 1.")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError(f"--depth={self.depth:g} is no share of the text. Use 0 to 1.")
        for name, value, least in (("trials", self.trials, 1), ("length", self.length, 8)):
            if value is not None and value < least:
                raise ConfigError(f"--{name}={value} asks nothing. Use more.")

    @property
    def name(self) -> str:
        """The name of the result in the run's `evaluations`."""
        source = self.suite_file or self.examples_file
        return "needle" if source is None else source.stem


def analyse(
    path: Path,
    mesh: ParallelMesh,
    *,
    suite_file: Path | None = None,
    examples_file: Path | None = None,
    data: Mapping[str, Path] | None = None,
    length: int | None = None,
    depth: float | None = None,
    trials: int | None = None,
    threshold: float = RETRIEVAL,
    tokenizer: Path | None = None,
    changes: Sequence[str] = (),
    as_json: bool = False,
    picture: Path | None = None,
) -> int:
    """Print attention mass, entropy and retrieval heads, and keep them in the run's `evaluations`.

    Examples are those of the suite's needle and synthetic tasks, or of a JSON list of {tokens,
    question, answer, needles}, or `trials` (8) needles at `depth` (0.5) in texts of `length` tokens
    (the stage's longest): noise, or the first dataset of `data`. Those of one task, length and
    depth are averaged. `picture` is a PNG to write. Raises MegahybridError, one line, for whatever
    the user can mend. Returns the exit code.
    """
    looked = Looked(suite_file, examples_file, data, length, depth, trials, threshold, tokenizer)
    trained = load_trained_model(path, mesh, changes)
    result = analysis(trained, looked)
    kept = keep(trained, "attention", looked.name, result)
    drawn = picture if picture is not None and not mesh.rank else None
    if drawn is not None:
        _draw(result, drawn)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _print(trained, result["results"], kept, drawn)
    return EXIT_DONE


def analysis(trained: TrainedModel, looked: Looked) -> dict[str, Any]:
    """Return what `analyse` prints as JSON; nothing is printed. Collective over the model's
    ranks."""
    groups = _examples(trained, looked)
    started = time.monotonic()
    results = _analysed(trained, groups, looked.threshold)
    return {**header(trained), "seconds": time.monotonic() - started, "results": results}


def _draw(result: dict[str, Any], path: Path) -> None:
    from megahybrid.report.head_picture import draw_heads

    path.write_bytes(draw_heads(result))


def _examples(trained: TrainedModel, looked: Looked) -> dict[str, list[Example]]:
    """Return the examples by their labels as JSON: task, length, depth."""
    if looked.examples_file is not None:
        return _own_examples(looked.examples_file, trained.run.model.vocab_size)
    run, suite = with_held_out(trained.run, looked.data), _suite(trained, looked)
    material = material_of(run, suite, looked.tokenizer)
    groups: dict[str, list[Example]] = {}
    for task_name, task in suite.tasks.items():
        if isinstance(task, RulerTask | ChatTask):
            continue  # its answers are generated, so there is no given text to look at
        for example in examples_of(task_name, task, suite.seed, material):
            labels = {"task": task_name, **example.labels}
            groups.setdefault(json.dumps(labels), []).append(example)
    if not groups:
        raise ConfigError(
            f"{looked.suite_file} has no needle or synthetic task (0 examples). Add one to analyse."
        )
    return groups


def _suite(trained: TrainedModel, looked: Looked) -> Suite:
    if looked.suite_file is not None:
        return load_suite(looked.suite_file)
    hay: HeldOutHaystack | NoiseHaystack = NoiseHaystack(kind="noise")
    if looked.data is not None:
        hay = HeldOutHaystack(kind="held_out")
    task = NeedleTask(
        kind="needle",
        lengths=[looked.length or trained.length],
        depths=[0.5 if looked.depth is None else looked.depth],
        trials=looked.trials or 8,
        haystack=hay,
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
    work = sum(len(example.tokens) for examples in groups.values() for example in examples)
    with EvaluationProgress("looking", work) as progress:
        for labels, examples in groups.items():
            parts, right = [], 0
            for number, example in enumerate(examples):
                told = json.loads(labels)["task"]
                progress.say(f"looking at {told}: {number + 1} of {len(examples)}")
                attention, logits = attention_of(trained.model, example)
                parts.append(attention)
                likeliest = logits.argmax(dim=-1).tolist()
                right += all(
                    likeliest[place - example.answer] == example.tokens[place]
                    for place in example.counted
                )
                progress.advance(len(example.tokens))
            figures = to_json(AttentionStatistics.mean(parts), kinds, threshold)
            counts = {"trials": len(examples), "exact": right / len(examples)}
            results.append({**json.loads(labels), **counts, "attention": figures})
    return results


def _print(
    trained: TrainedModel,
    results: Sequence[dict[str, Any]],
    kept: Path | None,
    drawn: Path | None,
) -> None:
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
    if drawn is not None:
        console.print(f"drawn as {drawn}", markup=False, soft_wrap=True)
