"""Evaluations of a model while it trains: held-out loss, suites, samples of its attention, gates of
stages.

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
    ChatTask,
    HeldOutHaystack,
    NeedleTask,
    RulerTask,
    Suite,
    SyntheticTask,
    load_suite,
)
from megahybrid.data.held_out import Rows
from megahybrid.data.run_tokenizer import tokenizer_of
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import ConfigError, GateError
from megahybrid.evaluate.haystack import Material
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.evaluate.suite import examples_of, run_suite
from megahybrid.evaluate.telemetry import attention_sample
from megahybrid.ledger import (
    LEDGER_NAME,
    AttentionEvent,
    EvaluateEvent,
    EventSink,
    GateEvent,
    SuiteEvent,
    TaskScores,
    read_ledger,
)
from megahybrid.ledger.records import from_json
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import broadcast_object, on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.results import result_path, write_result
from megahybrid.train.state import TrainState
from megahybrid.train.validation import HeldOutSets, evaluation_loss, open_held_out

# Told the step, the set, what its rows were and the loss.
Scored = Callable[[int, str, Rows, float | None], object]


class Evaluations:
    """Scores the held-out sets, asks the suites of `evaluate.suites`, samples attention and judges
    gates. `tell` hears the events and `scored` each held-out loss; `poll` is called between
    batches, on every rank, and what it raises ends the asking."""

    def __init__(
        self,
        run: RunConfig,
        directory: Path,
        mesh: ParallelMesh,
        tell: EventSink,
        poll: Callable[[], object],
        scored: Scored,
    ) -> None:
        self.run, self.directory, self.mesh = run, directory, mesh
        self.tell, self.poll, self.scored = tell, poll, scored
        context = ContextRanks(mesh, run.model, run.parallel)
        self.held_out = HeldOutSets(run, mesh, poll=poll, context=context)
        self.suites = load_suites(run)
        self.materials = {name: material_of(run, suite) for name, suite in self.suites.items()}

    def owed(self, state: TrainState) -> Rows | None:
        """Return the rows of a validation that was due here and was interrupted."""
        owed: Rows | None = None
        path, every = self.directory / LEDGER_NAME, self.run.evaluate.every_steps
        at_an_end = state.tokens in self.run.stage_plan.stage_ends
        if self.mesh.rank == 0 and state.step and path.exists():
            if at_an_end:
                owed = "documents"
            elif every is not None and state.step % every == 0:
                owed = "stream"
            scored = {
                score.set
                for line, score in read_ledger(path).of(EvaluateEvent)
                if line.step == state.step and score.rows == owed
            }
            owed = None if scored.issuperset(self.run.data.held_out) else owed
        if at_an_end and self.missing(state.step):
            owed = "documents"
        return broadcast_object(owed, self.mesh.world)

    def score(self, model: Transformer, state: TrainState, *, far: bool) -> None:
        """Score every held-out set at the stage's longest length; `far`: by position as well, and
        then the suites without a result."""
        stage = self._stage_of(state)

        def tell(name: str, score: HeldOutLoss, rows: Rows) -> None:
            self.tell(
                EvaluateEvent(set=name, stage=stage.name, step=state.step, rows=rows, **vars(score))
            )
            self.scored(state.step, name, rows, score.loss)

        token_loss = evaluation_loss(model)
        self.held_out.score(token_loss, max(stage.lengths), tell)
        if far:
            self.held_out.score_far(token_loss, tell)
            self.ask(model, state, self.missing(state.step))

    def _stage_of(self, state: TrainState) -> Stage:
        """Return the stage of the step that was made last."""
        return self.run.stage_plan.at(state.tokens - 1).stage

    def suites_due(self, step: int) -> list[str]:
        """Return the names of the suites to ask after this step, besides a stage's end."""
        asked = self.run.evaluate.suites.items()
        return [name for name, one in asked if one.every_steps and step % one.every_steps == 0]

    def attention_due(self, step: int) -> bool:
        """Return whether attention is sampled after this step."""
        every = self.run.evaluate.attention_every_steps
        return every is not None and step % every == 0

    def missing(self, step: int) -> list[str]:
        """Return the names of the suites without a result at this step.

        By the ledger: it knows what a resume made void, the files do not.
        """
        found = list(self.suites)
        path = self.directory / LEDGER_NAME
        if self.mesh.rank == 0 and found and path.exists():
            asked = read_ledger(path).of(SuiteEvent)
            known = {one.suite for line, one in asked if line.step == step}
            found = [name for name in found if name not in known]
        return broadcast_object(found, self.mesh.world)

    def ask(self, model: Transformer, state: TrainState, names: list[str]) -> None:
        """Ask suites and keep what they score, as `megahybrid evaluate` keeps it."""
        model.eval()
        stage = self._stage_of(state)
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
                self.tell(SuiteEvent(suite=name, seconds=seconds, tasks=short, path=str(path)))

    def _between(self, name: str, done: int, of: int) -> None:
        self.poll()

    def sample(
        self, model: Transformer, state: TrainState, tokens: Tensor, starts: Tensor | None
    ) -> None:
        """Tell what the heads look at in one row [seq] of this data rank."""
        index = self.run.stage_plan.at(state.tokens - 1).index
        kinds = list(self.run.plan_at(index).names())
        started = time.perf_counter()
        figures = attention_sample(model, tokens, starts, kinds)
        figures |= {"seconds": time.perf_counter() - started}
        self.tell(from_json(AttentionEvent, figures))

    def check_gates(self, index: int, step: int) -> None:
        """Raises GateError on every rank where a gate of stage `index` is not reached at `step`."""
        stage = self.run.stages[index]
        values = on_first(
            self.mesh.world, lambda: [self._reached(gate, step) for gate in stage.gates]
        )
        failed = []
        for gate, value in zip(stage.gates, values, strict=True):
            what, bound, ok = _verdict(gate, value)
            self.tell(GateEvent(gate=what, value=value, bound=bound, ok=ok))
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
            scored = read_ledger(self.directory / LEDGER_NAME).of(EvaluateEvent)
            for line, score in reversed(scored):
                if (line.step, score.set, score.rows) == (step, gate.set, "stream"):
                    return score.loss
            return None
        path = result_path(self.directory, step, "suite", gate.suite)
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))["tasks"].get(gate.task)
        return None if result is None else _mean(result, gate)


def _verdict(gate: LossGate | SuiteGate, value: float | None) -> tuple[str, str, bool]:
    """Return what was judged, the bound in words, and whether it is kept."""
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


def _short(task: dict[str, Any]) -> TaskScores:
    """A task in the ledger: its scores by length; the file has the rest."""
    if task["kind"] in ("ruler", "chat"):
        scores = {f"{row['task']}/{row['length']}": row["score"] for row in task["rows"]}
        return TaskScores(kind=task["kind"], score=scores)
    return TaskScores(
        kind=task["kind"],
        exact={str(row["length"]): row["exact"] for row in task["by_length"]},
        token_accuracy={str(row["length"]): row["token_accuracy"] for row in task["by_length"]},
    )


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
    if (gate.figure == "score") != isinstance(task, RulerTask | ChatTask):
        known = "score" if gate.figure != "score" else "exact or token_accuracy"
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
    if any(isinstance(task, ChatTask) for task in tasks):
        needs_sets, words = True, words or tokenizer_of(run, tokenizer)[0]
    return Material(
        vocab_size=run.model.vocab_size if words is None else words.info.vocab_size,
        tokenizer=words,
        held_out=open_held_out(run) if needs_sets else {},
    )
