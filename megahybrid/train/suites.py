"""What a model is asked while it trains: suites, samples of its attention, gates of stages.

Everything here is collective: all ranks ask alike and rank 0 writes.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megahybrid.config import RunConfig, dump
from megahybrid.config.base import did_you_mean
from megahybrid.config.gates import LossGate, SuiteGate
from megahybrid.config.stages import Stage
from megahybrid.config.suite import (
    HeldOutHaystack,
    NeedleTask,
    RulerTask,
    Suite,
    SyntheticTask,
    load_suite,
)
from megahybrid.data.run_tokenizer import tokenizer_of
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import ConfigError, GateError
from megahybrid.evaluate.haystack import Material
from megahybrid.evaluate.suite import examples_of, run_suite
from megahybrid.evaluate.telemetry import attention_sample
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import broadcast_object, on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.ledger import LEDGER_NAME, read_ledger
from megahybrid.train.results import result_path, write_result
from megahybrid.train.state import TrainState
from megahybrid.train.validation import open_held_out

Tell = Callable[[str, dict[str, Any]], None]


class Examiner:
    """Asks the suites of `evaluate.suites`, samples attention and judges gates. `tell` hears the
    events; `poll` is called between batches, on every rank, and what it raises ends the asking."""

    def __init__(
        self,
        run: RunConfig,
        directory: Path,
        mesh: ParallelMesh,
        tell: Tell,
        poll: Callable[[], object],
    ) -> None:
        self.run, self.directory, self.mesh = run, directory, mesh
        self.tell, self.poll = tell, poll
        self.suites = load_suites(run)
        self.materials = {name: material_of(run, suite) for name, suite in self.suites.items()}

    def due(self, step: int) -> list[str]:
        """Names of the suites to ask after this step, besides a stage's end."""
        asked = self.run.evaluate.suites.items()
        return [name for name, one in asked if one.every_steps and step % one.every_steps == 0]

    def samples(self, step: int) -> bool:
        """Whether attention is sampled after this step."""
        every = self.run.evaluate.attention_every_steps
        return every is not None and step % every == 0

    def missing(self, step: int) -> list[str]:
        """Names of the suites without a result at this step. By the ledger, which knows what a
        resume made void; the files do not."""
        found = list(self.suites)
        path = self.directory / LEDGER_NAME
        if self.mesh.rank == 0 and found and path.exists():
            asked = read_ledger(path).named("suite")
            known = {line.detail.get("suite") for line in asked if line.step == step}
            found = [name for name in found if name not in known]
        return broadcast_object(found, self.mesh.world)

    def ask(self, model: Transformer, state: TrainState, stage: Stage, names: list[str]) -> None:
        """Asks suites and keeps what they score, as `megahybrid evaluate` keeps it."""
        model.eval()
        for name in names:
            suite, started = self.suites[name], time.monotonic()
            scores = run_suite(model, suite, self.materials[name], self._between)
            seconds = time.monotonic() - started
            told: dict[str, Any] = {
                "checkpoint": None,
                "step": state.step,
                "tokens": state.tokens,
                "stage": stage.name,
                "trained_length": max(stage.lengths),
                "device": self.mesh.device.type,
                "precision": self.run.precision,
                "changes": [],
                "suite": name,
                "config": dump(suite),
                "seconds": seconds,
            }
            if self.mesh.rank == 0:
                path = write_result(self.directory, state.step, "suite", name, told | scores)
                short = {task: _short(one) for task, one in scores["tasks"].items()}
                detail = {"suite": name, "seconds": seconds, "tasks": short, "path": str(path)}
                self.tell("suite", detail)

    def _between(self, name: str, done: int, of: int) -> None:
        self.poll()

    def sample(
        self, model: Transformer, tokens: Tensor, starts: Tensor | None, kinds: list[str]
    ) -> None:
        """Tells what the heads look at in one row [seq], this data rank's."""
        started = time.perf_counter()
        figures = attention_sample(model, tokens, starts, kinds)
        self.tell("attention", figures | {"seconds": time.perf_counter() - started})

    def judge(self, index: int, step: int) -> None:
        """Raises GateError on every rank where a gate of stage `index` is not reached at `step`."""
        stage = self.run.stages[index]
        values = on_first(
            self.mesh.world, lambda: [self._reached(gate, step) for gate in stage.gates]
        )
        failed = []
        for gate, value in zip(stage.gates, values, strict=True):
            what, bound, ok = _verdict(gate, value)
            self.tell("gate", {"gate": what, "value": value, "bound": bound, "ok": ok})
            if not ok:
                reached = "nothing" if value is None else f"{value:.4g}"
                failed.append(f"{what} is {reached}, and {bound} was asked for")
        if failed:
            raise GateError(
                f"stages.{index}.gates: stage {stage.name} did not pass: {'; '.join(failed)} "
                f"(step {step}; its checkpoint is kept). Train the stage longer, or change the "
                "gate and give the same command again."
            )

    def _reached(self, gate: LossGate | SuiteGate, step: int) -> float | None:
        if isinstance(gate, LossGate):
            for line in reversed(read_ledger(self.directory / LEDGER_NAME).named("evaluate")):
                told = line.detail
                if (line.step, told.get("set"), told.get("rows")) == (step, gate.set, "stream"):
                    return told.get("loss")
            return None
        path = result_path(self.directory, step, "suite", gate.suite)
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))["tasks"].get(gate.task)
        return None if result is None else _mean(result, gate)


def _verdict(gate: LossGate | SuiteGate, value: float | None) -> tuple[str, str, bool]:
    """What was judged, the bound in words, and whether it is kept."""
    if isinstance(gate, LossGate):
        kept = value is not None and value <= gate.at_most
        return f"loss on {gate.set}", f"at most {gate.at_most:g}", kept
    length = "" if gate.length is None else f" at {gate.length:,} tokens"
    kept = value is not None and value >= gate.at_least
    return f"{gate.figure} of {gate.suite}.{gate.task}{length}", f"at least {gate.at_least:g}", kept


def _mean(task: dict[str, Any], gate: SuiteGate) -> float | None:
    """Over the task's rows of the gate's length, each row counting by its trials."""
    rows = [row for row in task["rows"] if gate.length in (None, row["length"])]
    counted = [(row[gate.figure], row["trials"]) for row in rows if gate.figure in row]
    trials = sum(count for _, count in counted)
    return sum(value * count for value, count in counted) / trials if trials else None


def _short(task: dict[str, Any]) -> dict[str, Any]:
    """A task in the ledger: its scores by length; the file has the rest."""
    if task["kind"] == "ruler":
        scores = {f"{row['task']}/{row['length']}": row["score"] for row in task["rows"]}
        return {"kind": task["kind"], "score": scores}
    return {
        "kind": task["kind"],
        "exact": {str(row["length"]): row["exact"] for row in task["by_length"]},
        "token_accuracy": {str(row["length"]): row["token_accuracy"] for row in task["by_length"]},
    }


def load_suites(run: RunConfig) -> dict[str, Suite]:
    """The files of `evaluate.suites`. Raises ConfigError for one that is missing or wrong."""
    return {name: load_suite(one.path) for name, one in run.evaluate.suites.items()}


def check_suites(run: RunConfig) -> None:
    """Raises MegahybridError, before any rank starts, for what asking would stumble over: files,
    tokenizer, lengths that cannot hold an answer, and gates on what no suite has."""
    suites = load_suites(run)
    for suite in suites.values():
        material = material_of(run, suite)
        for task_name, task in suite.tasks.items():
            examples_of(task_name, task.model_copy(update={"trials": 1}), suite.seed, material)
    for index, stage in enumerate(run.stages):
        for number, gate in enumerate(stage.gates):
            if isinstance(gate, SuiteGate):
                _check_gate(gate, suites[gate.suite], f"stages.{index}.gates.{number}")


def _check_gate(gate: SuiteGate, suite: Suite, where: str) -> None:
    task = suite.tasks.get(gate.task)
    if task is None:
        raise ConfigError(
            f"{where}.task names '{gate.task}', which suite {gate.suite} does not have."
            f"{did_you_mean(gate.task, list(suite.tasks))}"
        )
    if gate.length is not None and gate.length not in task.lengths:
        lengths = ", ".join(map(str, task.lengths))
        raise ConfigError(
            f"{where}.length={gate.length} is not asked by {gate.suite}.{gate.task} "
            f"(lengths: {lengths}). Use one of them."
        )
    if (gate.figure == "score") != isinstance(task, RulerTask):
        known = "score" if isinstance(task, RulerTask) else "exact or token_accuracy"
        raise ConfigError(
            f"{where}.figure={gate.figure} is no figure of a {task.kind} task. Use {known}."
        )


def material_of(run: RunConfig, suite: Suite, tokenizer: Path | None = None) -> Material:
    """The tokenizer and held-out sets that the suite's tasks ask for, and no other."""
    tasks = list(suite.tasks.values())
    words: Tokenizer | None = None
    if not all(isinstance(task, SyntheticTask) for task in tasks) and (
        tokenizer is not None or run.data.tokenizer is not None
    ):
        words = tokenizer_of(run, tokenizer)[0]
    hays = [task.haystack for task in tasks if isinstance(task, NeedleTask)]
    hays += [task.essay for task in tasks if isinstance(task, RulerTask)]
    needs_sets = any(isinstance(hay, HeldOutHaystack) for hay in hays)
    return Material(
        vocab_size=run.model.vocab_size if words is None else words.info.vocab_size,
        tokenizer=words,
        held_out=open_held_out(run) if needs_sets else {},
    )
