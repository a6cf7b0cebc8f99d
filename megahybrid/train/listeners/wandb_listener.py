"""Weights & Biases, at arm's length: whatever it does, no step waits for it.

One wandb run holds all stages and all attempts: its id is drawn once and kept in the run's
directory. Everything is plotted over tokens.
"""

import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from megahybrid.ledger import EventLine, StepLine, SuiteEvent
from megahybrid.train.listeners.base import ListenerFailed, RunInfo
from megahybrid.train.listeners.scalars import event_scalars, step_scalars

ID_NAME = "wandb_id.txt"
# Tables (columns, rows) and pictures (files) of a run's folder, by name: of one suite at one step,
# or (None) of everything the report shows. The report is built on training, so it is handed in.
Tracked = tuple[dict[str, tuple[list[str], list[list[Any]]]], dict[str, Path]]
Track = Callable[[Path, str | None, int], Tracked]
Row = dict[str, Any]
LEDGER_REMAINS = "The run goes on; the ledger has everything."


class WandbListener:
    """Hands rows to a thread of its own, which alone talks to wandb.

    With `track`, each suite's tables and pictures follow its numbers, and at the end all of the
    report's. The thread may hang or fail. Rows wait in a queue of `queue_rows`; when it is full, or
    when the thread has failed, the next call raises ListenerFailed and the run goes on without
    wandb.
    """

    essential = False

    def __init__(
        self,
        mode: Literal["offline", "online"],
        project: str,
        queue_rows: int = 10_000,
        start_seconds: float | int = 5.0,
        finish_seconds: float | int = 60.0,
        track: Track | None = None,
    ) -> None:
        self._mode = mode
        self._project = project
        self._start_seconds = start_seconds
        self._finish_seconds = finish_seconds
        self._begun = threading.Event()
        self._track = track
        self._directory = Path()
        self._tokens = 0
        self._rows: queue.Queue[Row | Callable[[ModuleType], Row] | None] = queue.Queue(queue_rows)
        self._failure: str | None = None
        self._undrawn: str | None = None
        self._outcome = "failed"
        self._thread: threading.Thread | None = None

    def on_start(self, run: RunInfo) -> None:
        """Imports wandb, begins the thread, and gives it `start_seconds` to reach wandb: what it
        does meanwhile holds the interpreter, which the first steps should have to themselves."""
        try:
            import wandb
        except ImportError as error:
            raise ListenerFailed(
                f"log.wandb={self._mode}, but wandb cannot be imported ({error})."
            ) from error
        self._directory, self._tokens = run.directory, run.tokens
        self._thread = threading.Thread(
            target=self._work, args=(wandb, run), name="wandb-listener", daemon=True
        )
        self._thread.start()
        self._begun.wait(self._start_seconds)

    def on_step(self, line: StepLine) -> None:
        """Queues the step's numbers."""
        self._tokens = line.tokens
        self._put({**step_scalars(line), "step": line.step, "tokens": line.tokens})

    def on_event(self, line: EventLine) -> None:
        """Queues the numbers of an event that has some, and a suite's tables and pictures."""
        scalars = event_scalars(line)
        place = {"step": line.step, "tokens": line.tokens}
        if scalars:
            self._put({**scalars, **place})
        if isinstance(line.content, SuiteEvent) and self._track is not None:
            self._put(self._tracked(line.content.suite, line.step, place))

    def on_end(self, outcome: str) -> None:
        """Waits until everything is handed over, `finish_seconds` at most."""
        if self._thread is None:
            return
        self._outcome = outcome
        if self._track is not None:
            self._put(self._tracked(None, 0, {"tokens": self._tokens}))
        self._put(None)
        self._thread.join(self._finish_seconds)
        if self._thread.is_alive():
            raise ListenerFailed(
                f"wandb did not finish within {self._finish_seconds:g} s. {LEDGER_REMAINS}"
            )
        self._raise_failure()
        if self._undrawn is not None:
            raise ListenerFailed(
                f"wandb has the numbers but not all tables and pictures: {self._undrawn}. Send "
                "them with megahybrid report RUN --wandb."
            )

    def _tracked(self, suite: str | None, step: int, place: Row) -> Callable[[ModuleType], Row]:
        """Return a function by which the thread makes a row: drawing must not hold up a step."""
        track, directory = self._track, self._directory
        assert track is not None

        def make(wandb: ModuleType) -> Row:
            try:
                return wandb_row(wandb, track(directory, suite, step)) | place
            except Exception as error:  # numbers are worth more than pictures of them
                self._undrawn = " ".join(str(error).split()) or type(error).__name__
                return place

        return make

    def _put(self, row: Row | Callable[[ModuleType], Row] | None) -> None:
        self._raise_failure()
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            raise ListenerFailed(
                f"wandb has not taken the last {self._rows.maxsize} rows. {LEDGER_REMAINS}"
            ) from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ListenerFailed(self._failure)

    def _work(self, wandb: ModuleType, run: RunInfo) -> None:
        try:
            tracked = begin(
                wandb, run.directory, run.name, self._mode, self._project,
                {**run.config, "facts": run.facts.detail()}, self._finish_seconds,
            )  # fmt: skip
            self._begun.set()
            while (row := self._rows.get()) is not None:
                tracked.log(row(wandb) if callable(row) else row)
            tracked.finish(exit_code=0 if self._outcome == "done" else 1)
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._failure = f"wandb: {reason}. {LEDGER_REMAINS}"
            self._begun.set()


def begin(
    wandb: ModuleType,
    directory: Path,
    name: str,
    mode: str,
    project: str,
    config: dict[str, Any],
    finish_seconds: float | int,
) -> Any:
    """The wandb run of this directory, taken up again where there is one."""
    wandb.setup(wandb.Settings(silent=True))
    # wandb would ask for a key on the terminal, from under the progress bar.
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ListenerFailed("no API key. Run `wandb login` or set WANDB_API_KEY")
    tracked = wandb.init(
        id=stable_id(directory),
        resume="allow" if mode == "online" else None,
        mode=mode,
        project=project,
        name=name,
        dir=str(directory),
        config=config,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            init_timeout=60,  # also the longest a short run waits for wandb when it exits
            finish_timeout=finish_seconds,  # wandb's own exit hook obeys it too
        ),
    )
    tracked.define_metric("*", step_metric="tokens")
    return tracked


def wandb_row(wandb: ModuleType, tracked: Tracked) -> Row:
    """Tables and pictures as wandb keeps them."""
    tables, pictures = tracked
    made: Row = {
        name: wandb.Table(columns=columns, data=rows) for name, (columns, rows) in tables.items()
    }
    return made | {name: wandb.Image(str(path)) for name, path in pictures.items()}


def send(
    directory: Path, name: str, mode: str, project: str, tokens: int, tracked: Tracked
) -> None:
    """Adds tables and pictures to the run's wandb run after the training. Raises ListenerFailed
    with the reason, in one line."""
    try:
        import wandb

        run = begin(wandb, directory, name, mode, project, {}, 60.0)
        run.log(wandb_row(wandb, tracked) | {"tokens": tokens})
        run.finish()
    except ListenerFailed:
        raise
    except (Exception, SystemExit) as error:
        raise ListenerFailed(" ".join(str(error).split()) or type(error).__name__) from error


def stable_id(directory: Path) -> str:
    """The wandb id of the run in this directory, drawn at its first start."""
    path = directory / ID_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
