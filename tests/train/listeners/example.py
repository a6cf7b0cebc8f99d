"""A small run to tell listeners about, and a listener that remembers."""

from pathlib import Path

from megahybrid.ledger import EvaluateEvent, EventLine, PositionBucket, RunFacts, StepLine
from megahybrid.train.listeners import RunInfo

STAGES = (("short", 800), ("long", 1600))


def run_info(directory: Path, step: int = 0) -> RunInfo:
    return RunInfo(
        name="demo",
        directory=directory,
        config={"seed": 1, "model": {"hidden_size": 128}},
        step=step,
        stage="short",
        tokens=100 * step,
        stages=STAGES,
        facts=RunFacts(world_size=1, device="cpu"),
    )


def step_line(step: int, **fields: object) -> StepLine:
    values: dict = {
        "step": step,
        "stage": "short" if step <= 8 else "long",
        "tokens": 100 * step,
        "length": 50,
        "source_tokens": {"stdlib": 100 * step},
        "cursor_crc": 7,
        "learning_rate": 1e-3,
        "loss": 5.0 - 0.1 * step,
        "gradient_norm": 1.5,
        "gradient_norm_by_kind": {"attention": 1.0},
        "tokens_per_second": 5000.0,
        "memory_gib": 0.5,
        "seconds": {"data": 0.01, "other": 0.02},
    }
    return StepLine(**{**values, **fields})


EVALUATION = EvaluateEvent(
    set="stdlib",
    rows="stream",
    loss=4.25,
    tokens=1000,
    length=50,
    by_position=(PositionBucket(0, 50, 1000, 4.25), PositionBucket(50, 100, 0, None)),
)


class Memory:
    """Keeps what it hears; raises when told to."""

    def __init__(self, essential: bool = False, raise_at_step: int | None = None) -> None:
        self.essential = essential
        self.raise_at_step = raise_at_step
        self.steps: list[StepLine] = []
        self.events: list[EventLine] = []
        self.outcomes: list[str] = []

    def on_start(self, run: RunInfo) -> None:
        self.run = run

    def on_step(self, line: StepLine) -> None:
        if line.step == self.raise_at_step:
            raise OSError("the pipe\nbroke")
        self.steps.append(line)

    def on_event(self, line: EventLine) -> None:
        self.events.append(line)

    def on_end(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def names(self) -> list[str]:
        return [line.event for line in self.events]
