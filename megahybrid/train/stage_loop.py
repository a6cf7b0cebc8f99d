"""The stages of a run, one after another: each builds its model and engine anew, trains, is saved
and scored; a spike goes back, a stop ends the attempt."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import assert_never

import torch

from megahybrid import __version__
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.reader import Reader
from megahybrid.config import RunConfig, dump
from megahybrid.config.explain import show
from megahybrid.data.loader import BatchLoader, StepData
from megahybrid.data.mixture import Mixture
from megahybrid.errors import EXIT_DONE, EXIT_RESUME, ExhaustedError
from megahybrid.heartbeat import Heartbeat
from megahybrid.ledger import (
    ConfigChangeEvent,
    RepeatDiffersEvent,
    RunFacts,
    StageEvent,
    StepLine,
    WarningEvent,
)
from megahybrid.model.compiled import keep_programs
from megahybrid.model.init import initialise
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.parallel import matmul
from megahybrid.parallel.collectives import on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.checkpointing import RunSaver, ranks_of
from megahybrid.train.engine import Engine
from megahybrid.train.kernel_selection import choose_kernels
from megahybrid.train.listeners import Listeners, RunInfo
from megahybrid.train.metrics import StepClock, peak_flops_per_second
from megahybrid.train.profile import Profiler
from megahybrid.train.repeated import RepeatedSteps
from megahybrid.train.restore import ResumePoint, find_resume_point, locate, positioned
from megahybrid.train.rewind import go_back
from megahybrid.train.stage_model import StageModel
from megahybrid.train.state import TrainState
from megahybrid.train.stop import StopAsked, StopRequest
from megahybrid.train.suites import Evaluations
from megahybrid.train.trainer import Intervals, StageOutcome, Trainer, TrainerHooks, step_shapes


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The parts that all stages of an attempt share, on one rank; train/run.py builds them."""

    run: RunConfig
    directory: Path
    mesh: ParallelMesh
    listeners: Listeners
    stop: StopRequest
    heartbeat: Heartbeat
    mixture: Mixture
    saver: RunSaver
    evaluations: Evaluations
    repeats: RepeatedSteps
    profiler: Profiler
    clock: StepClock
    allow: Sequence[str] = ()  # fields that may differ from those the run began with


class StageLoop:
    """Walks the stages that are left. `kernels` are those of the stage it is in; a stage that
    measures its own puts others in their place."""

    def __init__(self, parts: RunParts, kernels: ChosenKernels) -> None:
        self.parts = parts
        self.kernels = kernels
        self.plan = parts.run.stage_plan
        self.mesh = parts.mesh
        self.tell = parts.listeners.on_event

    def run(self, start: ResumePoint) -> int:
        """Train from `start` to the end of the plan; return the exit code."""
        parts, state = self.parts, start.state
        owed = parts.evaluations.owed(state) if start.resumes else None
        parts.repeats.begin(parts.directory, state.step, start.parent)
        parts.listeners.on_start(run_info(parts, start, self.kernels))
        for path, old, new in start.changes:
            self.tell(ConfigChangeEvent(field=path, before=show(old), now=show(new)))
        if owed is not None and not self._score_owed(start, far=owed == "documents"):
            return self._end_stopped()
        if start.resumes and state.tokens in self.plan.stage_ends:
            parts.evaluations.check_gates(self.plan.stage_ends.index(state.tokens), state.step)
        while not self.plan.finished(start.state.tokens):
            index = self.plan.at(start.state.tokens).index
            start, outcome = self._stage(index, start)
            match outcome.kind:
                case "complete":
                    parts.evaluations.check_gates(index, start.state.step)
                case "stopped":
                    return self._end_stopped()
                case "exhausted":
                    return self._end_exhausted(outcome.reason)
                case "spike":
                    pass  # the same stage again, from where it went back to
                case _:
                    assert_never(outcome.kind)
        parts.profiler.close()
        parts.listeners.on_end("done")
        return EXIT_DONE

    def _stage(self, index: int, start: ResumePoint) -> tuple[ResumePoint, StageOutcome]:
        """Train stage `index`; return what the next engine is filled from, and how it ended. A stop
        that interrupts the validation at its end counts as its outcome."""
        engine, stage_model = self._engine(index, start.state.tokens, start)
        state, outcome = self._train(engine, stage_model, index, start.state)
        if outcome.kind == "spike":
            engine.close()
            return self._go_back(state, outcome.reason), outcome
        with self.parts.heartbeat.during("save"):
            saved = self.parts.saver.save_and_wait(engine, state, self.kernels)
        scored = outcome.kind != "stopped" and self._scored(engine, state, far=True)
        engine.close()
        start = replace(start, state=state, checkpoint=saved, take="all")
        return start, outcome if scored else StageOutcome("stopped")

    def _engine(self, index: int, tokens: int, start: ResumePoint) -> tuple[Engine, StageModel]:
        """Build the stage's model, its layers as after `tokens`, inside an engine; filled from the
        checkpoint of `start` or drawn from the seed."""
        run, mesh = self.parts.run, self.mesh
        keep_programs(self.parts.directory / "programs", first=mesh.rank == 0)
        self.kernels = choose_kernels(run, index, mesh, self.kernels, self.tell)
        if self.kernels.products is not None:
            matmul.use(self.kernels.products)
        stage_model = StageModel(run, mesh, self.kernels, self.tell)
        model = stage_model.build(index, tokens)
        named = self.kernels.to_json()
        self.tell(
            StageEvent(
                index=index,
                kernels=named,
                self_test_seconds=stage_model.self_test_seconds,
                repeatable=self.parts.repeats.stage(index, named),
            ),
            stage=run.stages[index].name,
        )
        if run.parallel.zero_stage < 3:  # there the engine draws what it cuts, one by one
            initialise(model, run.seed, run.optimizer)
        engine = Engine(model, run, mesh)
        if start.checkpoint is not None:
            with Reader(start.checkpoint) as reader:
                step = None if start.take == "weights" else reader.manifest.optimizer_step
                engine.load(reader.read_flat, step)
        return engine, stage_model

    def _train(
        self, engine: Engine, stage_model: StageModel, index: int, state: TrainState
    ) -> tuple[TrainState, StageOutcome]:
        """Make the steps of stage `index` from `state` on."""
        parts, run, until = self.parts, self.parts.run, self.plan.stage_ends[index]
        data = positioned(parts.mixture, state.data)
        data = parts.mixture.reweight(data, run.stages[index].weights)
        with BatchLoader(
            parts.mixture,
            data,
            step_shapes(self.plan, state.tokens, until, run.parallel),
            rank=self.mesh.replica.rank,
            world_size=self.mesh.replica.size,
            documents=run.data.documents,
        ) as loader:
            trainer = Trainer(
                engine=engine,
                loader=loader,
                plan=self.plan,
                mesh=self.mesh,
                stage_model=stage_model,
                peak=self._peak(),
                intervals=Intervals(
                    run.checkpoint.every_steps,
                    run.evaluate.every_steps,
                    run.log.audit_every_steps,
                    run.max_skipped_in_a_row,
                    run.optimizer.skip_spikes,
                ),
                hooks=self._hooks(engine),
                stop=parts.stop,
                profiler=parts.profiler,
                clock=parts.clock,
                heartbeat=parts.heartbeat,
            )
            return trainer.run(state, until)

    def _hooks(self, engine: Engine) -> TrainerHooks:
        return TrainerHooks(
            save=partial(self.save, engine),
            poll_save=self.parts.saver.poll,
            evaluate=partial(self.evaluate, engine),
            examine=partial(self.examine, engine),
            on_step=self._on_step,
            on_event=self.tell,
        )

    def _on_step(self, line: StepLine) -> None:
        """Tell of a step. Raises RepeatError where it repeats one of an earlier attempt with other
        data: before the ledger, or a checkpoint, holds it."""
        differs = self.parts.repeats.check(line)
        self.parts.listeners.on_step(line)
        if differs is not None:
            self.tell(RepeatDiffersEvent(**asdict(differs)))
            self._warn(differs.message)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Begin a checkpoint; collective. A failure is told and the run goes on."""
        with self.parts.heartbeat.during("save"):
            self.parts.saver.save(engine, state, self.kernels)

    def evaluate(self, engine: Engine, state: TrainState, *, far: bool = False) -> None:
        """Score every held-out set; `far`: by position as well, and the suites. Collective."""
        with self.parts.heartbeat.during("evaluate"):
            self.parts.evaluations.score(engine.model, state, far=far)

    def examine(self, engine: Engine, state: TrainState, data: StepData) -> None:
        """Ask the suites and sample the attention that are due within a stage; collective."""
        evaluations = self.parts.evaluations
        if names := evaluations.suites_due(state.step):
            with self.parts.heartbeat.during("evaluate"):
                evaluations.ask(engine.model, state, names)
        if evaluations.attention_due(state.step):
            rows = data.micro_batches[0].tensors()
            evaluations.sample(engine.model, state, rows.tokens[0], rows.starts[0])

    def _scored(self, engine: Engine, state: TrainState, *, far: bool) -> bool:
        """Return whether the validation was done; after a stop the next attempt does it."""
        try:
            self.evaluate(engine, state, far=far)
        except StopAsked:
            return False
        return True

    def _score_owed(self, start: ResumePoint, *, far: bool) -> bool:
        """Make the validation that an earlier attempt owes, of the model as it was trained and not
        as the next stage begins. Return whether it was done."""
        last = start.state.tokens - 1
        engine, _ = self._engine(self.plan.at(last).index, last, start)
        scored = self._scored(engine, start.state, far=far)
        engine.close()
        return scored

    def _go_back(self, spike: TrainState, reason: str) -> ResumePoint:
        """Go back to the newest checkpoint, with the data after the spike. Collective."""
        parts = self.parts
        parts.saver.finish()
        parts.repeats.forget()
        located = locate(parts.run, parts.directory, self._warn, ranks_of(self.mesh))
        start, event = on_first(
            self.mesh.world,
            lambda: go_back(
                parts.directory,
                find_resume_point(parts.run, parts.directory, located, parts.allow),
                spike,
                reason,
                parts.run.max_skipped_in_a_row,
            ),
        )
        state = start.state
        stage = stage_name(parts.run, state)
        parts.listeners.on_rewind(state.step, stage, state.tokens, event)
        return start

    def _end_stopped(self) -> int:
        self.parts.profiler.close()
        self.parts.listeners.on_end("stopped")
        return EXIT_RESUME

    def _end_exhausted(self, reason: str) -> int:
        """End well where the run file says to stop without data; else raise ExhaustedError."""
        self.parts.profiler.close()
        if self.parts.run.data.exhausted != "stop":
            raise ExhaustedError(reason)
        self._warn(f"{reason} The run is saved and ends here.")
        self.parts.listeners.on_end("done")
        return EXIT_DONE

    def _warn(self, message: str) -> None:
        self.tell(WarningEvent(message=message))

    def _peak(self) -> float | None:
        if self.mesh.device.type != "cuda":
            return None
        return peak_flops_per_second(torch.cuda.get_device_name(), self.parts.run.precision)


def stage_name(run: RunConfig, state: TrainState) -> str:
    """Return the name of the stage that the next step belongs to, or of the last one."""
    plan = run.stage_plan
    return plan.at(min(state.tokens, plan.total_tokens - 1)).stage.name


def run_info(parts: RunParts, start: ResumePoint, kernels: ChosenKernels) -> RunInfo:
    """Return what the listeners are told when an attempt begins."""
    run, mesh, state = parts.run, parts.mesh, start.state
    names = [stage.name for stage in run.stages]
    return RunInfo(
        name=parts.directory.name,
        directory=parts.directory,
        config=dump(run),
        step=state.step,
        stage=stage_name(run, state),
        tokens=state.tokens,
        stages=tuple(zip(names, run.stage_plan.stage_ends, strict=True)),
        facts=RunFacts(
            world_size=mesh.world_size,
            tensor=mesh.tensor.size,
            context=mesh.context.size if mesh.context.size > 1 else None,
            data=mesh.data.size,
            zero_stage=run.parallel.zero_stage,
            precision=run.precision,
            device=str(mesh.device),
            megahybrid=__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            model=model_fingerprint(run.model),
            kernels=kernels.to_json(),
            parent=start.parent,
        ),
    )
