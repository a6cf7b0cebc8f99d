"""Weights & Biases, at arm's length: whatever it does, no step waits for it.

One wandb run holds all stages and all attempts: its id is drawn once and kept in the run's
directory. Everything is plotted over tokens.
"""

import queue
import threading
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from megahybrid.train.ledger import EventLine, StepLine
from megahybrid.train.listeners.base import ListenerFailed, RunInfo
from megahybrid.train.listeners.scalars import evaluation_scalars, step_scalars

ID_NAME = "wandb_id.txt"
LEDGER_REMAINS = "The run goes on; the ledger has everything."


class WandbListener:
    """Hands rows to a thread of its own, which alone talks to wandb.

    The thread may hang or fail. Rows wait in a queue of `queue_rows`; when it is full, or when the
    thread has failed, the next call raises ListenerFailed and the run goes on without wandb.
    """

    essential = False

    def __init__(
        self,
        mode: Literal["offline", "online"],
        project: str,
        queue_rows: int = 10_000,
        start_seconds: float | int = 5.0,
        finish_seconds: float | int = 30.0,
    ) -> None:
        self._mode = mode
        self._project = project
        self._start_seconds = start_seconds
        self._finish_seconds = finish_seconds
        self._begun = threading.Event()
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_rows)
        self._failure: str | None = None
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
        self._thread = threading.Thread(
            target=self._work, args=(wandb, run), name="wandb-listener", daemon=True
        )
        self._thread.start()
        self._begun.wait(self._start_seconds)

    def on_step(self, line: StepLine) -> None:
        """Queues the step's numbers."""
        self._put({**step_scalars(line), "step": line.step, "tokens": line.tokens})

    def on_event(self, line: EventLine) -> None:
        """Queues the numbers of an evaluation."""
        scalars = evaluation_scalars(line)
        if scalars:
            self._put({**scalars, "step": line.step, "tokens": line.tokens})

    def on_end(self, outcome: str) -> None:
        """Waits until everything is handed over, `finish_seconds` at most."""
        if self._thread is None:
            return
        self._outcome = outcome
        self._put(None)
        self._thread.join(self._finish_seconds)
        if self._thread.is_alive():
            raise ListenerFailed(
                f"wandb did not finish within {self._finish_seconds:g} s. {LEDGER_REMAINS}"
            )
        self._raise_failure()

    def _put(self, row: dict[str, Any] | None) -> None:
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
            tracked = self._begin(wandb, run)
            self._begun.set()
            while (row := self._rows.get()) is not None:
                tracked.log(row)
            tracked.finish(exit_code=0 if self._outcome == "done" else 1)
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._failure = f"wandb: {reason}. {LEDGER_REMAINS}"
            self._begun.set()

    def _begin(self, wandb: ModuleType, run: RunInfo) -> Any:
        wandb.setup(wandb.Settings(silent=True))
        # wandb would ask for a key on the terminal, from under the progress bar.
        if self._mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ListenerFailed("no API key. Run `wandb login` or set WANDB_API_KEY")
        tracked = wandb.init(
            id=stable_id(run.directory),
            resume="allow" if self._mode == "online" else None,
            mode=self._mode,
            project=self._project,
            name=run.name,
            dir=str(run.directory),
            config={**run.config, "facts": run.facts},
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                init_timeout=60,  # also the longest a short run waits for wandb when it exits
                finish_timeout=self._finish_seconds,  # wandb's own exit hook obeys it too
            ),
        )
        tracked.define_metric("*", step_metric="tokens")
        return tracked


def stable_id(directory: Path) -> str:
    """The wandb id of the run in this directory, drawn at its first start."""
    path = directory / ID_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
