"""TensorBoard files in the run's directory; needs the `tensorboard` extra."""

from typing import Any

from megahybrid.ledger import EventLine, StepLine
from megahybrid.train.listeners.base import ListenerFailed, RunInfo
from megahybrid.train.listeners.scalars import event_scalars, step_scalars


class TensorBoardListener:
    """Writes the scalars of each step and evaluation, over tokens, to `tensorboard/`."""

    essential = False

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Opens the writer; what an earlier attempt wrote beyond this point is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ListenerFailed(
                "log.tensorboard=true, but tensorboard is not installed. "
                'Use pip install "megahybrid[tensorboard]".'
            ) from error
        self._writer = SummaryWriter(  # type: ignore[no-untyped-call]
            str(run.directory / "tensorboard"), purge_step=run.tokens + 1 if run.step else None
        )

    def on_step(self, line: StepLine) -> None:
        """The step's numbers, at the tokens through its end."""
        self._write(step_scalars(line), line.tokens)

    def on_event(self, line: EventLine) -> None:
        """The numbers of an evaluation, of a suite or of a sample of attention."""
        self._write(event_scalars(line), line.tokens)

    def on_end(self, outcome: str) -> None:
        """Flushes and closes."""
        if self._writer is not None:
            self._writer.close()  # type: ignore[no-untyped-call]

    def _write(self, scalars: dict[str, float], tokens: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, tokens)  # type: ignore[no-untyped-call]
