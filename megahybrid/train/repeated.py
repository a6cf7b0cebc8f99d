"""Steps that an earlier attempt did beyond the checkpoint, done again: they must come out alike.

A resume repeats them, and the ledger still holds their lines. Other cursors mean other data: a
wrong position in the checkpoint, or an order that changed under the run, which nobody would see
later. The run ends before anything of it is saved. Another loss means a wrong moment, rate or
weight, or a machine that computes differently: it is told, and the run goes on.

Only what is the same on purpose is compared. Each stage of an attempt tells what decides its data
and arithmetic (`Repeatable`); lines of attempts that told none, or another one, are passed over.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megahybrid.config import RunConfig, dump
from megahybrid.errors import RepeatError
from megahybrid.parallel.collectives import gather_objects, on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.ledger import (
    BEGINNINGS,
    LEDGER_NAME,
    REWIND,
    EventLine,
    Line,
    StepLine,
    read_every_line,
)

# Fields that decide neither which rows come nor what is computed of them.
WITHOUT_EFFECT = ("checkpoint", "evaluate", "log", "directory", "start", "max_skipped_in_a_row")
# Fields that decide in which order of additions it is computed, and so the last bits.
ROUNDING = ("parallel", "kernels", "device", "deterministic")
ROUNDING_IN_STAGES = ("micro_batch_tokens", "recompute")
# Relative, of two layouts; docs/checkpoint_format.md has what tests hold.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3}


@dataclass(frozen=True)
class Repeatable:
    """Digests of what must be the same for steps to repeat: `config` for their data and, but for
    rounding, their losses; `layout` besides for every bit of them. `anew`: another order of the
    data was meant, so that no step before can be repeated."""

    config: str
    layout: str
    anew: bool = False


@dataclass(frozen=True)
class EarlierStep:
    """What the ledger holds of a step that is to be repeated."""

    attempt: int
    cursor_crc: int
    loss: float | None
    told: Repeatable


@dataclass(frozen=True)
class Difference:
    """How a repeated step differs from the line of an earlier attempt."""

    step: int
    attempt: int
    field: str  # cursor_crc or loss
    before: float | int | None
    now: float | int | None
    bound: float = 0.0

    @property
    def message(self) -> str:
        """The difference in words, for the ledger and the log."""
        bound = f" within {self.bound:g}" if self.bound else " to the bit"
        return (
            f"step {self.step} was repeated with {self.field}={self.now}, not{bound} the "
            f"{self.before} of attempt {self.attempt}"
        )


def repeatable(
    run: RunConfig,
    index: int,
    mesh: ParallelMesh,
    kernels: Mapping[str, str],
    parent: Mapping[str, Any] | None,
    anew: bool = False,
) -> Repeatable:
    """What decides the steps of stage `index`: later stages may still change and have no part."""
    whole = dump(run)
    stages = [dict(stage) for stage in whole.pop("stages")[: index + 1]]
    rounding: dict[str, Any] = {name: whole.pop(name) for name in ROUNDING}
    rounding["stages"] = [
        {name: stage.pop(name) for name in ROUNDING_IN_STAGES} for stage in stages
    ]
    for stage in stages:
        del stage["gates"]
    config = {name: value for name, value in whole.items() if name not in WITHOUT_EFFECT}
    for name in ("tokenizer", "held_out"):
        config["data"].pop(name)
    cuda = mesh.device.type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    threads = None if cuda else torch.get_num_threads()
    layout = [rounding, kernels, mesh.world_size, mesh.device.type, machine, threads]
    return Repeatable(
        _digest([config, stages, parent]), _digest([*layout, torch.__version__]), anew
    )


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def steps_beyond(lines: Iterable[Line], step: int) -> dict[int, EarlierStep]:
    """The steps beyond `step` that an attempt which begins there repeats, each as the newest
    attempt had it that came by the same data.

    Which data that is, rewinds decide: a line counts where the rewinds in force when it was written
    are those in force at `step`. The rule is `read_ledger`'s: a beginning or a rewind makes void
    what lies beyond its step.
    """
    found: dict[tuple[int, ...], dict[int, EarlierStep]] = {}
    rewinds: list[tuple[int, int]] = []  # (step, number), those in force
    told: Repeatable | None = None
    for number, line in enumerate(lines):
        if isinstance(line, EventLine):
            if line.event in BEGINNINGS or line.event == REWIND:
                rewinds = [each for each in rewinds if each[0] <= line.step]
                told = None
            if line.event == REWIND:
                rewinds.append((line.step, number))
            elif line.event == "stage":
                told = _told(line.detail)
                if told is not None and told.anew:
                    _drop_before(found, line.attempt)
        elif line.step > step:
            here = found.setdefault(tuple(number for _, number in rewinds), {})
            if told is None:
                here.pop(line.step, None)
            else:
                here[line.step] = EarlierStep(line.attempt, line.cursor_crc, line.loss, told)
    return found.get(tuple(number for at, number in rewinds if at <= step), {})


def _drop_before(found: dict[tuple[int, ...], dict[int, EarlierStep]], attempt: int) -> None:
    for steps in found.values():
        for step in [step for step, earlier in steps.items() if earlier.attempt < attempt]:
            del steps[step]


def _told(detail: Mapping[str, Any]) -> Repeatable | None:
    """What a stage told; None of a version that told nothing, or another."""
    said = detail.get("repeatable")
    if isinstance(said, Mapping) and said.keys() == {"config", "layout", "anew"}:
        return Repeatable(str(said["config"]), str(said["layout"]), said["anew"] is True)
    return None


def difference(
    line: StepLine, earlier: EarlierStep, told: Repeatable, precision: str, deterministic: bool
) -> Difference | None:
    """How a step differs from the same one of an earlier attempt; None where it does not, or where
    they are not to be compared."""
    if earlier.told.config != told.config:
        return None
    if line.cursor_crc != earlier.cursor_crc:
        return Difference(
            line.step, earlier.attempt, "cursor_crc", earlier.cursor_crc, line.cursor_crc
        )
    exact = deterministic and earlier.told.layout == told.layout
    bound = 0.0 if exact else TOLERANCE[precision]
    if _same(line.loss, earlier.loss, bound):
        return None
    return Difference(line.step, earlier.attempt, "loss", earlier.loss, line.loss, bound)


def _same(a: float | None, b: float | None, bound: float) -> bool:
    """A loss that was not finite is None in the ledger."""
    a, b = (None if x is None or not math.isfinite(x) else x for x in (a, b))
    if a is None or b is None:
        return a is b
    return abs(a - b) <= bound * max(abs(a), abs(b))


class RepeatedSteps:
    """Compares the steps that an attempt repeats. `check` is collective while there are any."""

    def __init__(self, run: RunConfig, mesh: ParallelMesh, allow: Sequence[str] = ()) -> None:
        self._run, self._mesh = run, mesh
        self._deterministic = mesh.device.type == "cpu" or run.deterministic
        self._anew = any(name.split(".")[0] == "data" for name in allow)
        self._parent: Mapping[str, Any] | None = None
        self._earlier: dict[int, EarlierStep] = {}
        self._compares_losses = True
        self._told: Repeatable | None = None

    def begin(self, directory: Path, step: int, parent: Mapping[str, Any] | None) -> None:
        """Look up what lies beyond `step`, before this attempt writes a line. Collective: rank 0
        reads, and every rank holds the same lines."""
        self._parent = parent
        path = directory / LEDGER_NAME

        def read() -> dict[int, EarlierStep]:
            return steps_beyond(read_every_line(path), step) if path.exists() else {}

        self._earlier = {} if self._anew else on_first(self._mesh.world, read)

    def forget(self) -> None:
        """From here on other data come, after a rewind: nothing is repeated."""
        self._earlier = {}

    def stage(self, index: int, kernels: Mapping[str, str]) -> dict[str, Any]:
        """The steps that follow are of stage `index`. Returns what the ledger is to say of it."""
        self._told = repeatable(self._run, index, self._mesh, kernels, self._parent, self._anew)
        return {"repeatable": asdict(self._told)}

    def check(self, line: StepLine) -> Difference | None:
        """The first loss that differs, alike on every rank, or None. Raises RepeatError on every
        rank where the cursors of any rank differ: other data have come."""
        earlier = self._earlier.pop(line.step, None)
        if earlier is None or self._told is None:
            return None
        mine = difference(line, earlier, self._told, self._run.precision, self._deterministic)
        found = [each for each in gather_objects(mine, self._mesh.world) if each is not None]
        for each in found:
            if each.field == "cursor_crc":
                raise RepeatError(
                    f"{each.message}: other data come after the checkpoint than came before. "
                    "Nothing of them was saved. Look at what changed in the data, the checkpoint "
                    "or this program; if another order is meant, say so: --allow data."
                )
        if not found or not self._compares_losses:
            return None
        self._compares_losses = False  # what differs now differs ever after: it is told once
        return found[0]
