"""The checkpoints of a run: what they hold, which of them stay, and the events they make."""

from pathlib import Path
from typing import Any

from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.directory import RunLock
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.folders import Retention
from megahybrid.checkpoint.saver import Saver
from megahybrid.checkpoint.writer import SaveResult, Snapshot
from megahybrid.config import RunConfig, dump
from megahybrid.errors import StorageError
from megahybrid.ledger import LEDGER_NAME, EvaluateEvent, EventSink, SaveEvent, read_ledger
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.parallel.collectives import gather_objects
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.engine import Engine
from megahybrid.train.state import TrainState


def ranks_of(mesh: ParallelMesh) -> Ranks:
    """All ranks of a mesh, as the checkpoints know them."""
    world = mesh.world
    return Ranks(world.rank, world.size, lambda value: gather_objects(value, world))


class RunSaver:
    """The checkpoints of one attempt at a run. Its methods are collective.

    Each keeps the `parent` of a branch. `held` is the step and folder of a checkpoint that is
    there.
    """

    def __init__(
        self,
        run: RunConfig,
        directory: Path,
        mesh: ParallelMesh,
        tell: EventSink,
        owner: RunLock | None,
        parent: dict[str, Any] | None = None,
        held: tuple[int, Path] | None = None,
    ) -> None:
        self._run = run
        self._directory = directory
        self._tell = tell
        self._parent = parent
        self._held = held
        self._scores = _scores(run, directory) if mesh.rank == 0 else {}
        self._check = None if owner is None else owner.check
        self._saver = Saver(directory, ranks_of(mesh), self._report, self._check)

    def save(self, engine: Engine, state: TrainState, kernels: ChosenKernels) -> None:
        """Begin a checkpoint, or write it where saving is not asynchronous. A failure is told."""
        if self._run.checkpoint.asynchronous:
            self._saver.start(*self._snapshot(engine, state, kernels))
        else:
            self._saver.save(*self._snapshot(engine, state, kernels))

    def save_and_wait(self, engine: Engine, state: TrainState, kernels: ChosenKernels) -> Path:
        """Write a checkpoint that the run cannot go on without, unless this step's is there
        already. Raises StorageError: what a disk refuses now it may take in the next attempt."""
        self.finish()
        if self._held is not None and self._held[0] == state.step:
            return self._held[1]
        result = self._saver.save(*self._snapshot(engine, state, kernels))
        if result.path is None:
            raise StorageError(
                f"directory={self._directory} could not take the checkpoint of step {result.step} "
                f"({result.error}). Make room there, then give the same command again: it resumes."
            )
        return result.path

    def finish(self) -> None:
        """Wait until no save is under way."""
        self._saver.finish()

    def poll(self) -> None:
        """Move on what is being written; to be called at each step boundary. Raises
        CheckpointError where the directory is another's by now: its ledger is too."""
        if self._check is not None:
            self._check()
        self._saver.poll()

    def scored(self, step: int, name: str, rows: str, loss: float | None) -> None:
        """A held-out loss, for checkpoint.keep_best."""
        if (name, rows) == (self._run.checkpoint.keep_best, "stream") and loss is not None:
            self._scores[step] = loss

    def _snapshot(
        self, engine: Engine, state: TrainState, kernels: ChosenKernels
    ) -> tuple[Snapshot, Retention]:
        engine.align_replicas()
        train_state = state.to_json() | {"kernels": kernels.to_json()}
        if self._parent is not None:
            train_state["parent"] = self._parent
        snapshot = Snapshot(
            step=state.step,
            tokens=state.tokens,
            optimizer_step=engine.optimizer_step,
            model_fingerprint=model_fingerprint(self._run.model),
            tensors=engine.tensors,
            fragments=list(engine.fragments()),
            train_state=train_state | schemes_of(self._run, state.tokens),
            config=_json(dump(self._run)),
        )
        keep = self._run.checkpoint
        return snapshot, Retention(keep.keep_last, keep.keep_every_steps, dict(self._scores))

    def _report(self, result: SaveResult) -> None:
        if result.path is not None:
            self._held = result.step, result.path
        self._tell(
            SaveEvent(
                ok=result.ok,
                saved_step=result.step,
                bytes=result.bytes,
                seconds=result.seconds,
                checked_seconds=result.checked_seconds,
                stall_seconds=result.stall_seconds,
                path=None if result.path is None else str(result.path),
                removed=result.removed or None,
                error=result.error,
                warning=result.warning,
            )
        )


def schemes_of(run: RunConfig, tokens: int) -> dict[str, Any]:
    """Return {"schemes": by name}, the layers of the step that wrote a checkpoint."""
    plan = run.plan_after(tokens)
    return {"schemes": {name: dump(scheme) for name, scheme in plan.schemes.items()}}


def _scores(run: RunConfig, directory: Path) -> dict[int, float]:
    """Return the losses of earlier attempts on the set of checkpoint.keep_best, by step."""
    path, name = directory / LEDGER_NAME, run.checkpoint.keep_best
    if name is None or not path.exists():
        return {}
    return {
        line.step: score.loss
        for line, score in read_ledger(path).of(EvaluateEvent)
        if (score.set, score.rows) == (name, "stream") and score.loss is not None
    }


def _json(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {str(key): _json(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_json(value) for value in plain]
    return plain
