"""The composition root: from a checked `RunConfig`, everything is built here and handed on."""

import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megahybrid import __version__
from megahybrid.checkpoint.directory import Owner, check_model
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.reader import Reader
from megahybrid.config import RunConfig, dump, dump_yaml
from megahybrid.config.explain import show
from megahybrid.data.held_out import Rows
from megahybrid.data.loader import BatchLoader, StepData
from megahybrid.data.mixture import open_mixture
from megahybrid.errors import (
    EXIT_DONE,
    EXIT_RESUME,
    ExhaustedError,
    MegahybridError,
    first_line,
    raise_in_training,
)
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.heartbeat import Heartbeat, write_whole
from megahybrid.model.compiled import keep_programs
from megahybrid.model.init import initialise
from megahybrid.model.kernels.choice import resolve_kernels
from megahybrid.parallel import matmul
from megahybrid.parallel.collectives import broadcast_object, on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.checkpointing import RunSaver, ranks_of
from megahybrid.train.engine import Engine
from megahybrid.train.kernel_selection import choose_kernels
from megahybrid.train.ledger import LEDGER_NAME, read_ledger
from megahybrid.train.listeners import Listeners, RunInfo
from megahybrid.train.metrics import StepClock, peak_flops_per_second
from megahybrid.train.preflight import check_inputs
from megahybrid.train.profile import Profiler
from megahybrid.train.repeated import RepeatedSteps
from megahybrid.train.restore import Beginning, find_beginning, locate, positioned
from megahybrid.train.rewind import go_back, past_spikes
from megahybrid.train.stage_model import DTYPES, Layers
from megahybrid.train.state import TrainState
from megahybrid.train.stop import StopAsked, StopRequest
from megahybrid.train.suites import Examiner
from megahybrid.train.trainer import Ending, Habits, Trainer, step_shapes
from megahybrid.train.validation import HeldOutSets, evaluation_loss


@dataclass
class Attempt:
    """One process's part of one attempt at a run, from restore to the last stage or a stop."""

    run: RunConfig
    directory: Path
    mesh: ParallelMesh
    listeners: Listeners
    stop: StopRequest
    owner: Owner | None  # on rank 0
    heartbeat: Heartbeat
    allow: Sequence[str] = ()  # fields that may differ from those the run began with
    clock: StepClock = field(default_factory=StepClock)
    kernels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        run = self.run
        self.plan = run.stage_plan
        self.fingerprint = model_fingerprint(run.model)
        self.mixture = open_mixture(run)
        self.held_out = HeldOutSets(run, self.mesh, poll=self._meanwhile)
        self.examiner = Examiner(
            run,
            self.directory,
            self.mesh,
            self.listeners.on_event,
            self._meanwhile,
        )
        files = {name: it.fingerprint for name, it in self.mixture.datasets.items()}
        self.repeats = RepeatedSteps(run, self.mesh, files, self.allow)
        self.profiler = Profiler(run.log.profile_steps, self.directory / "profile", self.mesh)

    def go(self, beginning: Beginning) -> int:
        """Train from `beginning` to the end of the plan. Returns the exit code."""
        state = beginning.state
        self.kernels = resolve_kernels(
            self.run.kernels,
            self.mesh.device,
            DTYPES[self.run.precision],
            self.run.model.head_dim,
            beginning.kernels,
        )
        source, take = beginning.checkpoint, beginning.take
        self.saver = RunSaver(
            self.run,
            self.directory,
            self.mesh,
            self.listeners,
            self.owner,
            {"kernels": self.kernels} | _told(parent=beginning.parent),
            held=(state.step, source) if beginning.resumes and source is not None else None,
        )
        owed = self._owed_evaluation(state) if beginning.resumes else None
        self.repeats.begin(self.directory, state.step, beginning.parent)
        self.listeners.on_start(self._info(state, beginning))
        for path, old, new in beginning.changes:
            change = {"field": path, "before": show(old), "now": show(new)}
            self.listeners.on_event("config_change", change)
        if owed is not None:
            # Scored as it was trained, not as the next stage begins.
            ended = self.plan.at(state.tokens - 1).index
            engine, _ = self._engine(ended, state.tokens - 1, source, take)
            scored = self._scored(engine, state, far=owed == "documents")
            engine.close()
            if not scored:
                return self._end_stopped()
        if beginning.resumes and state.tokens in self.plan.stage_ends:
            self.examiner.judge(self.plan.stage_ends.index(state.tokens), state.step)
        while not self.plan.finished(state.tokens):
            index = self.plan.at(state.tokens).index
            engine, layers = self._engine(index, state.tokens, source, take)
            state, ending = self._stage(engine, layers, index, state)
            if ending.kind == "spike":
                engine.close()
                beginning = self._go_back(state, ending.reason)
                source, take, state = beginning.checkpoint, beginning.take, beginning.state
                continue
            with self.heartbeat.during("save"):
                source, take = self.saver.save_and_wait(engine, state), "all"
            done = ending.kind != "stopped" and self._scored(engine, state, far=True)
            engine.close()
            if not done:
                return self._end_stopped()
            if ending.kind == "exhausted":
                return self._end_exhausted(ending.reason)
            self.examiner.judge(index, state.step)
        self.profiler.close()
        self.listeners.on_end("done")
        return EXIT_DONE

    def _meanwhile(self) -> None:
        """Between two batches of a validation, which may take long: publish what is written, and
        look for a stop. Collective."""
        self.saver.poll()
        self.stop.poll(self.mesh)

    def _end_stopped(self) -> int:
        self.profiler.close()
        self.listeners.on_end("stopped")
        return EXIT_RESUME

    def _end_exhausted(self, reason: str) -> int:
        """As the run file asked, and then it is done; where it hoped for more data, not."""
        self.profiler.close()
        if self.run.data.exhausted != "stop":
            raise ExhaustedError(reason)
        self._warn(f"{reason} The run is saved and ends here.")
        self.listeners.on_end("done")
        return EXIT_DONE

    def _go_back(self, spike: TrainState, reason: str) -> Beginning:
        """To the newest checkpoint, with the data after the spike. Collective."""
        self.saver.finish()
        self.repeats.forget()
        located = locate(self.run, self.directory, self._warn, ranks_of(self.mesh))
        beginning, detail = on_first(
            self.mesh.world,
            lambda: go_back(
                self.directory,
                find_beginning(self.run, self.directory, located, self.allow),
                spike,
                reason,
                self.run.max_skipped_in_a_row,
            ),
        )
        state = beginning.state
        self.listeners.on_rewind(state.step, self._stage_name(state), state.tokens, detail)
        return beginning

    def _warn(self, message: str) -> None:
        self.listeners.on_event("warning", {"message": message})

    def _owed_evaluation(self, state: TrainState) -> Rows | None:
        """Rows of the validation that was due here and not finished: a stop or a kill came."""
        owed: Rows | None = None
        path, every = self.directory / LEDGER_NAME, self.run.evaluate.every_steps
        if self.mesh.rank == 0 and state.step and path.exists():
            if state.tokens in self.plan.stage_ends:
                owed = "documents"
            elif every is not None and state.step % every == 0:
                owed = "stream"
            scored = {
                line.detail.get("set")
                for line in read_ledger(path).named("evaluate")
                if line.step == state.step and line.detail.get("rows") == owed
            }
            owed = None if scored.issuperset(self.run.data.held_out) else owed
        if state.tokens in self.plan.stage_ends and self.examiner.missing(state.step):
            owed = "documents"
        return broadcast_object(owed, self.mesh.world)

    def _engine(
        self, index: int, tokens: int, source: Path | None, take: str
    ) -> tuple[Engine, Layers]:
        """The stage's model, its layers as after `tokens`, inside an engine; filled from `source`
        or drawn from the seed."""
        run = self.run
        keep_programs(self.directory / "programs", first=self.mesh.rank == 0)
        # In place: what a checkpoint says of kernels is this very dictionary.
        self.kernels.update(
            choose_kernels(run, index, self.mesh, self.kernels, self.listeners.on_event)
        )
        if "products" in self.kernels:
            matmul.use(self.kernels["products"])
        layers = Layers(run, self.mesh, self.kernels, self.listeners.on_event)
        model = layers.build(index, tokens)
        self.listeners.on_event(
            "stage",
            {
                "index": index,
                "kernels": self.kernels,
                "self_test_seconds": layers.self_test_seconds,
            }
            | self.repeats.stage(index, self.kernels),
            stage=run.stages[index].name,
        )
        if run.parallel.zero_stage < 3:  # there the engine draws what it cuts, one by one
            initialise(model, run.seed, run.optimizer)
        engine = Engine(model, run, self.mesh)
        if source is not None:
            with Reader(source) as reader:
                step = reader.manifest.optimizer_step if take == "all" else None
                engine.load(reader.read_flat, step)
        return engine, layers

    def _stage(
        self, engine: Engine, layers: Layers, index: int, state: TrainState
    ) -> tuple[TrainState, Ending]:
        run, until = self.run, self.plan.stage_ends[index]
        data = positioned(self.mixture, state.data)
        data = self.mixture.reweight(data, run.stages[index].weights)
        with BatchLoader(
            self.mixture,
            data,
            step_shapes(self.plan, state.tokens, until),
            rank=self.mesh.data.rank,
            world_size=self.mesh.data.size,
            documents=run.data.documents,
        ) as loader:
            trainer = Trainer(
                engine=engine,
                loader=loader,
                plan=self.plan,
                mesh=self.mesh,
                layers=layers,
                peak=self._peak(),
                habits=Habits(
                    run.checkpoint.every_steps,
                    run.evaluate.every_steps,
                    run.log.audit_every_steps,
                    run.max_skipped_in_a_row,
                    run.optimizer.skip_spikes,
                ),
                listeners=self.listeners,
                repeats=self.repeats,
                stop=self.stop,
                profiler=self.profiler,
                save=lambda state: self.save(engine, state),
                poll_save=self.saver.poll,
                evaluate=lambda state: self.evaluate(engine, state),
                examine=lambda state, data: self.examine(engine, state, data),
                clock=self.clock,
                heartbeat=self.heartbeat,
            )
            return trainer.run(state, until)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Begin a checkpoint; collective. A failure is told and the run goes on."""
        with self.heartbeat.during("save"):
            self.saver.save(engine, state)

    def evaluate(self, engine: Engine, state: TrainState, *, far: bool = False) -> None:
        """Score every held-out set at the stage's longest length; `far`: by position as well."""
        stage = self.plan.at(state.tokens - 1).stage

        def tell(name: str, score: HeldOutLoss, rows: str) -> None:
            detail = {"set": name, "stage": stage.name, "step": state.step, "rows": rows}
            self.listeners.on_event("evaluate", detail | score.to_json())
            self.saver.scored(state.step, name, rows, score.loss)

        token_loss = evaluation_loss(engine.model)
        with self.heartbeat.during("evaluate"):
            self.held_out.score(token_loss, max(stage.lengths), tell)
            if far:
                self.held_out.score_far(token_loss, tell)
                missing = self.examiner.missing(state.step)
                self.examiner.ask(engine.model, state, stage, missing)

    def examine(self, engine: Engine, state: TrainState, data: StepData) -> None:
        """Ask the suites and sample the attention that are due within a stage; collective."""
        point = self.plan.at(state.tokens - 1)
        if names := self.examiner.due(state.step):
            with self.heartbeat.during("evaluate"):
                self.examiner.ask(engine.model, state, point.stage, names)
        if self.examiner.samples(state.step):
            rows = data.micro_batches[0].tensors()
            kinds = list(self.run.plan_at(point.index).names())
            self.examiner.sample(engine.model, rows.tokens[0], rows.starts[0], kinds)

    def _scored(self, engine: Engine, state: TrainState, *, far: bool) -> bool:
        """Whether the validation was done; a stop interrupts it, and the next attempt does it."""
        try:
            self.evaluate(engine, state, far=far)
        except StopAsked:
            return False
        return True

    def _peak(self) -> float | None:
        if self.mesh.device.type != "cuda":
            return None
        return peak_flops_per_second(torch.cuda.get_device_name(), self.run.precision)

    def _stage_name(self, state: TrainState) -> str:
        return self.plan.at(min(state.tokens, self.plan.total_tokens - 1)).stage.name

    def _info(self, state: TrainState, beginning: Beginning) -> RunInfo:
        names = [stage.name for stage in self.run.stages]
        return RunInfo(
            name=self.directory.name,
            directory=self.directory,
            config=dump(self.run),
            step=state.step,
            stage=self._stage_name(state),
            tokens=state.tokens,
            stages=tuple(zip(names, self.plan.stage_ends, strict=True)),
            facts={
                "world_size": self.mesh.world_size,
                "tensor": self.mesh.tensor.size,
                "data": self.mesh.data.size,
                "zero_stage": self.run.parallel.zero_stage,
                "precision": self.run.precision,
                "device": str(self.mesh.device),
                "megahybrid": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "model": self.fingerprint,
                "kernels": self.kernels,
            }
            | _told(parent=beginning.parent),
        )


def _told(**facts: Any) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if fact is not None}


def run_attempt(
    run: RunConfig,
    directory: Path,
    mesh: ParallelMesh,
    make_listeners: Callable[[], Listeners],
    stop: StopRequest,
    heartbeat: Heartbeat,
    allow: Sequence[str] = (),
) -> int:
    """Own the directory, find where to begin, and go. Collective; returns the exit code.

    `allow` names fields (dotted, or their head) that may differ from those the run began with.
    """
    if run.deterministic and mesh.device.type == "cuda":
        torch.use_deterministic_algorithms(True)
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(Owner(directory)) if mesh.rank == 0 else None
        warnings: list[str] = []
        on_first(mesh.world, lambda: _claim(run, directory, allow))
        located = locate(run, directory, warnings.append, ranks_of(mesh))
        # One rank looks, so that all begin from the same checkpoint.
        beginning = on_first(
            mesh.world,
            lambda: past_spikes(directory, find_beginning(run, directory, located, allow)),
        )
        listeners = make_listeners() if mesh.rank == 0 else Listeners([])
        if mesh.rank == 0:
            write_whole(directory / "config.yaml", dump_yaml(run))
        attempt = Attempt(run, directory, mesh, listeners, stop, owner, heartbeat, allow)
        for warning in warnings:
            listeners.on_event("warning", {"message": warning})
        try:
            return attempt.go(beginning)
        except BaseException as error:
            # The disk that ended the run may refuse its last line too: the cause is what is told.
            with contextlib.suppress(MegahybridError, OSError):
                listeners.on_end("failed", {"error": first_line(error)})
            if listeners.began:
                raise_in_training(error)
            raise


def _claim(run: RunConfig, directory: Path, allow: Sequence[str]) -> None:
    check_inputs(run, directory, allow)
    check_model(directory, model_fingerprint(run.model))
