"""The loop: one step after another until a stage's tokens are seen or somebody asks to stop."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from megahybrid.config.parallel import ParallelConfig
from megahybrid.config.stages import StagePlan, StagePoint
from megahybrid.config.training import SpikeConfig
from megahybrid.data.batches import Batch
from megahybrid.data.loader import BatchLoader, StepData, StepShape
from megahybrid.errors import ExhaustedError, NoProgressError
from megahybrid.heartbeat import Heartbeat
from megahybrid.ledger import EventSink, ExhaustedEvent, SkipEvent, StepLine
from megahybrid.parallel.collectives import sum_scalars
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.engine import Engine, MicroBatch, StepResult, UpdateGate
from megahybrid.train.metrics import StepClock, memory_gib, mfu, training_seconds
from megahybrid.train.profile import Profiler, probe_seconds
from megahybrid.train.spikes import Recent, judge_spike, remember
from megahybrid.train.stage_model import StageModel
from megahybrid.train.state import TrainState
from megahybrid.train.stop import StopAsked, StopRequest

WAIT_SECONDS = 0.5  # for a batch, before the ranks ask one another whether to stop


@dataclass(frozen=True)
class StageOutcome:
    """The end of a stage: all its tokens seen, a stop asked for, no data left, or a spike after
    which to go back; with its reason."""

    kind: Literal["complete", "stopped", "spike", "exhausted"]
    reason: str = ""


@dataclass(frozen=True)
class Intervals:
    """The steps between saves, scores and audits, and when a run gives up."""

    save_every_steps: int
    evaluate_every_steps: int | None
    audit_every_steps: int | None
    max_skipped_in_a_row: int
    skip_spikes: SpikeConfig | None = None


@dataclass(frozen=True)
class TrainerHooks:
    """Functions that the steps of a stage call; all but the last two are collective."""

    save: Callable[[TrainState], object]
    poll_save: Callable[[], object]  # moves on a save that is being written beside the training
    evaluate: Callable[[TrainState], object]  # may raise StopAsked
    examine: Callable[[TrainState, StepData], object]  # suites and samples of attention, where due
    on_step: Callable[[StepLine], object]  # before what the step brings is evaluated or saved
    on_event: EventSink


@dataclass
class Trainer:
    """Advances a `TrainState` through one stage."""

    engine: Engine
    loader: BatchLoader
    plan: StagePlan
    mesh: ParallelMesh
    stage_model: StageModel
    peak: float | None  # FLOP/s of one device, for MFU
    intervals: Intervals
    hooks: TrainerHooks
    stop: StopRequest
    profiler: Profiler
    clock: StepClock
    heartbeat: Heartbeat

    def run(self, state: TrainState, until_tokens: int) -> tuple[TrainState, StageOutcome]:
        """Steps until `until_tokens` are seen. Returns the state, and how that ended.

        The first step is always audited, and the first with other layers: what is wrong in the code
        is wrong from the start.
        """
        try:
            outcome: StageOutcome | None
            for state, outcome in self._steps(state, until_tokens):  # noqa: B020 (the newest counts)
                if outcome is not None:
                    return state, outcome
        except StopAsked:
            pass
        except ExhaustedError as error:  # of the order, so all ranks meet it at the same step
            if state.step == 0:
                raise
            return state, StageOutcome("exhausted", str(error))
        return state, StageOutcome("stopped")

    def _steps(
        self, state: TrainState, until_tokens: int
    ) -> Iterator[tuple[TrainState, StageOutcome | None]]:
        """Yield the state after each step, before what may raise StopAsked."""
        first_step = state.step
        waits = True  # a stop that came while the stage was built is seen here
        self.clock.lap()  # building the stage is no part of its first step
        while state.tokens < until_tokens:
            point = self.plan.at(state.tokens)
            self.heartbeat.phase("data", state.step)
            with self.clock.phase("data"):
                self._wait_for_data(waits)
                data = next(self.loader)
            changed = self.stage_model.follow(state.tokens)
            # Kernels are compiled in a stage's first step, and for a new window.
            fresh = changed or state.step == first_step
            self.heartbeat.phase("compile" if fresh else "step")
            with self.profiler.step(state.step):
                result = self.engine.train_step(
                    [to_micro_batch(batch, self.mesh) for batch in data.micro_batches],
                    point.learning_rate,
                    audit=fresh or _due(state.step, self.intervals.audit_every_steps),
                    gate=self._gate(state),
                    between=partial(self.stop.poll, self.mesh) if fresh else None,
                )
            self.clock.add("forward_backward", result.seconds_forward_backward)
            self.clock.add("update", result.seconds_update)
            state = self._advance(state, point, data, result)
            self._tell(state, point, data, result)
            if state.skipped_in_a_row >= self.intervals.max_skipped_in_a_row:
                raise NoProgressError(
                    f"max_skipped_in_a_row={self.intervals.max_skipped_in_a_row} updates were "
                    f"skipped because {_why_skipped(result, 'their gradients were not finite')} "
                    f"(last at step {state.step}). Lower the learning rate or look at the data, "
                    "then start from an earlier checkpoint."
                )
            if result.refused and self._rewinds:
                yield state, StageOutcome("spike", result.refused)
                return
            if _due(state.step, self.intervals.audit_every_steps):
                self.stage_model.audit()
                self.heartbeat.busy(probe_seconds(self.mesh.device))
            with self.clock.phase("save"):
                self.hooks.poll_save()
            more = state.tokens < until_tokens
            asked = self.stop.agreed(self.mesh, waits=more and not self.loader.ready(0))
            if asked.stop:
                yield state, StageOutcome("stopped")
                return
            yield state, None
            if more:
                self._evaluate_and_save(state, data, asked.save)
            waits = asked.waits
        yield state, StageOutcome("complete")

    def _wait_for_data(self, waits: bool) -> None:
        """Until every rank has its batch: a disk that stands still must not keep a stop away."""
        while waits:
            there = self.loader.ready(WAIT_SECONDS)
            if there:
                self.heartbeat.phase("step")  # those that stand in `data` are the ones waited for
            waits = self.stop.poll(self.mesh, waits=not there)

    @property
    def _rewinds(self) -> bool:
        rule = self.intervals.skip_spikes
        return rule is not None and rule.action == "rewind"

    def _advance(
        self, state: TrainState, point: StagePoint, data: StepData, result: StepResult
    ) -> TrainState:
        return replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + point.batch_tokens,
            data=data.state,
            skipped_in_a_row=state.skipped_in_a_row + 1 if result.skipped else 0,
            recent=self._recent(state, result),
        )

    def _gate(self, state: TrainState) -> UpdateGate | None:
        rule = self.intervals.skip_spikes
        return None if rule is None else partial(judge_spike, rule, state.recent)

    def _recent(self, state: TrainState, result: StepResult) -> Recent:
        rule = self.intervals.skip_spikes
        if rule is None or result.skipped:
            return state.recent
        return remember(rule, state.recent, result.loss, result.gradient_norm)

    def _evaluate_and_save(self, state: TrainState, data: StepData, save_asked: bool) -> None:
        """Evaluate and save where that is due; at a stage's end the stage loop does both."""
        with self.clock.phase("evaluate"):
            if _due(state.step, self.intervals.evaluate_every_steps):
                self.hooks.evaluate(state)
            self.hooks.examine(state, data)
        if save_asked or _due(state.step, self.intervals.save_every_steps):
            with self.clock.phase("save"):
                self.hooks.save(state)
            # It may have taken long, and what is saved need not be saved again after a step more.
            self.stop.poll(self.mesh)

    def _tell(
        self, state: TrainState, point: StagePoint, data: StepData, result: StepResult
    ) -> None:
        seconds = self.clock.lap()
        spent = training_seconds(seconds)
        line = StepLine(
            step=state.step,
            stage=point.stage.name,
            tokens=state.tokens,
            length=point.length,
            source_tokens=data.source_tokens,
            cursor_crc=data.cursor_crc,
            learning_rate=point.learning_rate,
            loss=result.loss,
            z_loss=result.z_loss,
            gradient_norm=result.gradient_norm,
            gradient_norm_by_kind=dict(result.gradient_norm_by_kind),
            skipped=result.skipped,
            tokens_per_second=point.batch_tokens / spent if spent > 0 else None,
            mfu=self._mfu(data, spent),
            memory_gib=memory_gib(self.mesh.device),
            seconds=seconds,
        )
        self.hooks.on_step(line)
        for name, epochs in data.exhausted.items():
            self.hooks.on_event(ExhaustedEvent(source=name, epochs=round(epochs, 4)))
        if result.skipped:
            reason = _why_skipped(result, "gradient not finite")
            self.hooks.on_event(SkipEvent(reason=reason, in_a_row=state.skipped_in_a_row))

    def _mfu(self, data: StepData, seconds: float) -> float | None:
        """Return the MFU from the exact pairs of every rank's masks; None on devices without a
        known peak."""
        if self.peak is None:
            return None
        flops = float(sum(self.stage_model.flops.of(batch.starts) for batch in data.micro_batches))
        (total,) = sum_scalars([flops], self.mesh.replica)
        total /= data.shape.context  # ranks that share a row have all counted it
        return mfu(total, seconds, self.peak, self.mesh.world_size)


def _why_skipped(result: StepResult, otherwise: str) -> str:
    return result.refused or otherwise


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def to_micro_batch(batch: Batch, mesh: ParallelMesh) -> MicroBatch:
    """A batch on the mesh's device. Rows that are single documents carry no boundaries: kernels
    are faster without, and the host already knows."""
    one_document = not batch.starts.any()
    moved = batch.tensors(mesh.device)
    return MicroBatch(moved.tokens, moved.targets, None if one_document else moved.starts)


def step_shapes(
    plan: StagePlan,
    tokens: int,
    until_tokens: int,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
) -> Iterable[StepShape]:
    """The shapes of the steps from `tokens` on, for reading ahead within a stage. A group of fewer
    context ranks than the axis has takes as many fewer rows at a time: a rank's tokens are the
    same."""
    while tokens < until_tokens:
        point = plan.at(tokens)
        degree = parallel.context_degree(point.length)
        rows = point.micro_batch_rows * degree // parallel.context_axis
        yield StepShape(point.length, point.rows, rows, degree)
        tokens += point.batch_tokens
