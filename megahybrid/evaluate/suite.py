"""A suite run on a model: examples drawn, scored and put into tables."""

from collections.abc import Callable
from typing import Any

import numpy as np

from megahybrid.config.suite import (
    ChatTask,
    NeedleTask,
    RulerTask,
    Suite,
    SyntheticTask,
    Task,
)
from megahybrid.errors import ConfigError
from megahybrid.evaluate.answers import by_labels, score_answers
from megahybrid.evaluate.chat import ChatMaker, answer, scores_of
from megahybrid.evaluate.example import Example, same_length
from megahybrid.evaluate.generation import greedy
from megahybrid.evaluate.haystack import Material
from megahybrid.evaluate.needle import NeedleMaker
from megahybrid.evaluate.ruler import RulerMaker, generated_tokens, matches
from megahybrid.evaluate.synthetic import PUZZLES, Alphabet
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.random import key

ReportProgress = Callable[[str, int, int], None]


def example_draw(seed: int, *names: str | int) -> np.random.Generator:
    """The draws of one example, a function of the names alone."""
    return np.random.Generator(np.random.Philox(key=key(seed, "suite", *names)))


def examples_of(name: str, task: Task, seed: int, material: Material) -> list[Example]:
    """Every example of one task, labelled; of RULER's tasks too, with the task as a label."""
    found: list[Example] = []
    if isinstance(task, NeedleTask):
        maker = NeedleMaker(task, material)
        for length in task.lengths:
            for depth in task.depths:
                for trial in range(task.trials):
                    draw = example_draw(seed, name, length, str(depth), trial)
                    found.append(maker.make(length, depth, draw))
    elif isinstance(task, SyntheticTask):
        first, stop = task.ids or (0, material.vocab_size)
        if not 0 <= first < stop <= material.vocab_size:
            raise ConfigError(
                f"tasks.{name}.ids={[first, stop]} reach beyond the vocabulary "
                f"({material.vocab_size} ids). Use a range within [0, {material.vocab_size}]."
            )
        ids = Alphabet(first, stop)
        for length in task.lengths:
            for trial in range(task.trials):
                draw = example_draw(seed, name, length, trial)
                example = PUZZLES[task.kind](length, task.pairs, ids, draw)
                example.labels.update(length=length)
                found.append(example)
    elif isinstance(task, ChatTask):
        found += ChatMaker(name, task, material).make(task.trials, example_draw(seed, name))
    else:
        ruler = RulerMaker(task, material)
        for which in task.tasks:
            for length in task.lengths:
                for trial in range(task.trials):
                    example = ruler.make(
                        which, length, example_draw(seed, name, which, length, trial)
                    )
                    example.labels.update(task=which, length=length)
                    found.append(example)
    return found


def suite_tokens(suite: Suite) -> int:
    """Return the tokens of all examples of a suite, about as many as a model reads."""
    tokens = 0
    for task in suite.tasks.values():
        if isinstance(task, ChatTask):
            tokens += task.trials * max(task.lengths)  # its answers alone: prompts are drawn later
            continue
        per_length = task.trials
        if isinstance(task, NeedleTask):
            per_length *= len(task.depths)
        elif isinstance(task, RulerTask):
            per_length *= len(task.tasks)
        tokens += per_length * sum(task.lengths)
    return tokens


def run_suite(
    model: Transformer,
    suite: Suite,
    material: Material,
    tell: ReportProgress = lambda name, done, of: None,
    advance: Callable[[int], object] = bool,
) -> dict[str, Any]:
    """Return the scores of every task, as JSON values; `tell` is called with a task's progress,
    `advance` with the tokens that were read since its last call, of `suite_tokens` in all."""
    results: dict[str, Any] = {}
    for name, task in suite.tasks.items():
        examples = examples_of(name, task, suite.seed, material)
        result: dict[str, Any] = {"kind": task.kind, "trials": task.trials}
        if isinstance(task, RulerTask):
            result["rows"] = _ruler(model, name, examples, suite, material, tell, advance)
        elif isinstance(task, ChatTask):
            result["trials"] = len(examples)
            result |= _chat(model, name, task, examples, suite, material, tell, advance)
        else:
            labels = ("length", "depth") if isinstance(task, NeedleTask) else ("length",)

            def report_task(done: int, name: str = name, of: int = len(examples)) -> None:
                tell(name, done, of)

            vocab_size = material.vocab_size
            scores = score_answers(
                model,
                examples,
                vocab_size=vocab_size,
                batch_tokens=suite.batch_tokens,
                tell=report_task,
                advance=advance,
            )
            result["rows"] = by_labels(examples, scores, labels)
            result["by_length"] = by_labels(examples, scores, ("length",))
        if isinstance(task, NeedleTask):
            result["variant"] = task.variant
            result["haystack"] = task.haystack.kind
        results[name] = result
    return {"seed": suite.seed, "tasks": results}


def _chat(
    model: Transformer,
    name: str,
    task: ChatTask,
    examples: list[Example],
    suite: Suite,
    material: Material,
    tell: ReportProgress,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """How many answers end their turn, by turn and of all."""
    assert material.tokenizer is not None  # `ChatMaker` asked it for its special tokens
    told, most = 0, max(task.lengths)

    def report(done: int) -> None:
        nonlocal told
        tell(name, done, len(examples))
        advance((done - told) * most)
        told = done

    answers = answer(
        model,
        examples,
        most,
        vocab_size=material.vocab_size,
        eod_id=material.tokenizer.info.eod_id,
        batch_tokens=suite.batch_tokens,
        tell=report,
    )
    return scores_of(examples, answers, task.lengths)


def _ruler(
    model: Transformer,
    name: str,
    examples: list[Example],
    suite: Suite,
    material: Material,
    tell: ReportProgress,
    advance: Callable[[int], object],
) -> list[dict[str, Any]]:
    """A row for each of RULER's tasks and lengths: the mean share of references found."""
    assert material.tokenizer is not None  # needles were encoded with it
    decode, eod_id = material.tokenizer.decode, material.tokenizer.info.eod_id
    shares: dict[tuple[str, int], list[float]] = {}
    done = 0
    for which in dict.fromkeys(example.labels["task"] for example in examples):
        for batch in same_length(
            [e for e in examples if e.labels["task"] == which], suite.batch_tokens
        ):
            length = batch[0].labels["length"]
            added = greedy(
                model,
                [example.prompt for example in batch],
                generated_tokens(which, length),
                vocab_size=material.vocab_size,
                ends=lambda tokens: tokens[-1] == eod_id,
            )
            for example, tokens in zip(batch, added, strict=True):
                share = matches(which, example.references, decode(tokens))
                shares.setdefault((which, example.labels["length"]), []).append(share)
            done += len(batch)
            tell(name, done, len(examples))
            advance(sum(example.labels["length"] for example in batch))
    return [
        {
            "task": which,
            "length": length,
            "trials": len(found),
            "score": float(np.mean(found)),
            "standard_error": float(np.std(found, ddof=1) / len(found) ** 0.5)
            if len(found) > 1
            else None,
        }
        for (which, length), found in sorted(shares.items())
    ]
