"""The check of repeated steps: what an earlier attempt did after its last checkpoint is done again,
and must come out the same.

A resume repeats such steps, and the ledger still holds their lines. Other cursors mean other data:
a wrong position in the checkpoint, or an order that changed under the run, which nobody would see
later. The run ends before anything of it is saved. Another loss means a wrong moment, rate or
weight, or a machine that computes differently: it is reported, and the run goes on.

Only what is the same on purpose is compared. Each stage of an attempt records what decides its data
and arithmetic (`Repeatable`). A step is compared where all steps before it were decided alike too:
a change that was tried for a while and taken back has left its trace in cursors and weights. Lines
of attempts that recorded nothing are passed over.
"""

import hashlib
import json
import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megahybrid.config import RunConfig, dump
from megahybrid.config.first_fields import first_fields
from megahybrid.config.old_words import first_words
from megahybrid.data.mixture import STATE_VERSION
from megahybrid.errors import RepeatError
from megahybrid.ledger import LEDGER_NAME, EventLine, Line, StageEvent, StepLine, read_every_line
from megahybrid.parallel.collectives import gather_objects, on_first
from megahybrid.parallel.mesh import ParallelMesh

# Fields that decide neither which rows come nor what is computed of them.
WITHOUT_EFFECT = ("checkpoint", "evaluate", "log", "directory", "start", "max_skipped_in_a_row")
# Fields that decide in which order of additions it is computed, and so the last bits.
ROUNDING = ("parallel", "kernels", "device", "deterministic")
ROUNDING_IN_STAGES = ("micro_batch_tokens", "recompute")
# Relative, of two layouts; docs/checkpoint_format.md has what tests hold.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3}
# For how many steps after two attempts parted those bounds hold: later, last bits have grown.
TOLERATED_STEPS = 40
# Fields of the data that have no part in what is trained on.
BESIDE_THE_ORDER = ("tokenizer", "held_out")


@dataclass(frozen=True)
class Repeatable:
    """Digests of what must be the same for steps to repeat: `config` for their data and, but for
    rounding, their losses; `layout` besides for every bit of them. `anew`: another order of the
    data was meant, so that no step before can be repeated."""

    config: str
    layout: str
    anew: bool = False


@dataclass(frozen=True)
class DecisionHistory:
    """The decisions behind all steps of a run up to one: each change, with the first step that it
    held for; None for those of a version that recorded nothing."""

    changes: tuple[tuple[int, Repeatable | None], ...] = ()

    @property
    def latest(self) -> Repeatable | None:
        """Return what decided the last step."""
        return self.changes[-1][1] if self.changes else None

    @property
    def config(self) -> list[tuple[int, str | None]]:
        """The changes of `Repeatable.config` alone."""
        found: list[tuple[int, str | None]] = []
        for step, told in self.changes:
            config = None if told is None else told.config
            if not found or found[-1][1] != config:
                found.append((step, config))
        return found

    def until(self, step: int) -> "DecisionHistory":
        """The history of the steps up to `step`."""
        return DecisionHistory(tuple(change for change in self.changes if change[0] <= step))

    def with_step(self, step: int, decided_by: Repeatable | None) -> "DecisionHistory":
        """The history through `step`, which `decided_by` decided."""
        if decided_by is not None:  # whoever meant another order may mean it again
            decided_by = replace(decided_by, anew=False)
        if self.changes and self.latest == decided_by:
            return self
        return DecisionHistory((*self.changes, (step, decided_by)))


@dataclass(frozen=True)
class EarlierStep:
    """The line that the ledger holds of a step that is to be repeated. `parted`: the last step
    before it that was not done again since."""

    attempt: int
    cursor_crc: int
    loss: float | None
    history: DecisionHistory
    parted: int = 0


@dataclass(frozen=True)
class Difference:
    """The difference of a repeated step from the line of an earlier attempt."""

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
    files: Mapping[str, str],
    anew: bool = False,
) -> Repeatable:
    """Return what decides the steps of stage `index`: later stages, and sources that none has read
    yet, may still change and have no part. `files`: the fingerprint of each source. Collective."""
    whole = first_words(first_fields(run, dump(run)))  # the digests of ledgers there are
    stages = [dict(stage) for stage in whole.pop("stages")[: index + 1]]
    rounding: dict[str, Any] = {name: whole.pop(name) for name in ROUNDING}
    rounding["stages"] = [
        {name: stage.pop(name) for name in ROUNDING_IN_STAGES} for stage in stages
    ]
    for stage in stages:
        del stage["gates"]
    config = {name: value for name, value in whole.items() if name not in WITHOUT_EFFECT}
    for name in BESIDE_THE_ORDER:
        config["data"].pop(name)
    # Which files, not where they lie: folders move, and data not yet read may be made anew.
    read = {name for stage in stages for name in stage["weights"]}
    config["data"]["sources"] = {name: files.get(name) for name in read}
    layout = [rounding, kernels, mesh.device.type, _machines(mesh), torch.__version__]
    return Repeatable(_digest([STATE_VERSION, config, stages, parent]), _digest(layout), anew)


def _machines(mesh: ParallelMesh) -> list[tuple[int, str, int | None]]:
    """Return for each rank the number of its machine, and what decides the order of its
    additions."""
    if mesh.device.type == "cuda":
        kind, threads = torch.cuda.get_device_name(mesh.device), None
    else:
        kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    mine = (socket.gethostname(), kind, threads)
    ranks = gather_objects(mine, mesh.world)
    hosts = list(dict.fromkeys(host for host, *_ in ranks))
    return [(hosts.index(host), kind, threads) for host, kind, threads in ranks]


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def steps_beyond(
    lines: Iterable[Line], step: int
) -> tuple[dict[int, EarlierStep], DecisionHistory]:
    """The steps beyond `step` that an attempt which begins there repeats, each as the newest
    attempt had it that came by the same data; and what decided the steps up to `step`.

    Which data that is, rewinds decide: a line counts where the rewinds in force when it was written
    are those in force at `step`. The rule is `read_ledger`'s: a beginning or a rewind makes void
    what lies beyond its step.
    """
    found: dict[tuple[int, ...], dict[int, EarlierStep]] = {}
    rewinds: list[tuple[int, int]] = []  # (step, number), those in force
    history, told = DecisionHistory(), None
    begun: list[tuple[int, int]] = []  # (attempt, step) of each beginning
    for number, line in enumerate(lines):
        if isinstance(line, EventLine):
            if line.begins or line.goes_back:
                rewinds = [each for each in rewinds if each[0] <= line.step]
                history, told = history.until(line.step), None
            if line.begins:
                begun.append((line.attempt, line.step))
            elif line.goes_back:
                rewinds.append((line.step, number))
            elif line.event == StageEvent.name:
                stage = line.content
                told = _recorded(stage.repeatable) if isinstance(stage, StageEvent) else None
                if told is not None and told.anew:
                    _drop_before(found, line.attempt)
        else:
            history = history.with_step(line.step, told)
            if line.step > step:
                here = found.setdefault(tuple(number for _, number in rewinds), {})
                here[line.step] = EarlierStep(line.attempt, line.cursor_crc, line.loss, history)
    history = history.until(step)
    steps = found.get(tuple(number for at, number in rewinds if at <= step), {})
    parted = _parted(begun, step)
    return {
        at: replace(earlier, parted=parted.get(earlier.attempt, step))
        for at, earlier in steps.items()
        if earlier.history.latest is not None
    }, history


def _parted(begun: Sequence[tuple[int, int]], step: int) -> dict[int, int]:
    """Return by attempt the last of its steps that neither a later attempt did again, nor one that
    begins at `step`."""
    found: dict[int, int] = {}
    for attempt, began in reversed(begun):
        found[attempt] = step
        step = min(step, began)
    return found


def _drop_before(found: dict[tuple[int, ...], dict[int, EarlierStep]], attempt: int) -> None:
    for steps in found.values():
        for step in [step for step, earlier in steps.items() if earlier.attempt < attempt]:
            del steps[step]


def _recorded(said: Any) -> Repeatable | None:
    """Return what a stage recorded; None of a version that recorded nothing, or another."""
    if isinstance(said, Mapping) and said.keys() == {"config", "layout", "anew"}:
        return Repeatable(str(said["config"]), str(said["layout"]), said["anew"] is True)
    return None


def difference(
    line: StepLine,
    earlier: EarlierStep,
    history: DecisionHistory,
    precision: str,
    deterministic: bool,
) -> Difference | None:
    """Return how a step, which `history` leads to, differs from the same one of an earlier attempt;
    None where it does not, or where they are not to be compared."""
    if earlier.history.config != history.config:
        return None
    if line.cursor_crc != earlier.cursor_crc:
        return Difference(
            line.step, earlier.attempt, "cursor_crc", earlier.cursor_crc, line.cursor_crc
        )
    exact = deterministic and earlier.history == history
    if not exact and line.step > earlier.parted + TOLERATED_STEPS:
        return None
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
    """Compares the steps that an attempt repeats. `check` is collective while there are any.
    `files` are the fingerprints of the run's sources."""

    def __init__(
        self,
        run: RunConfig,
        mesh: ParallelMesh,
        files: Mapping[str, str],
        allow: Sequence[str] = (),
    ) -> None:
        self._run, self._mesh, self._files = run, mesh, files
        self._deterministic = mesh.device.type == "cpu" or run.deterministic
        self._anew = any(_means_another_order(name) for name in allow)
        self._parent: Mapping[str, Any] | None = None
        self._earlier: dict[int, EarlierStep] = {}
        self._history = DecisionHistory()
        self._compares_losses = True
        self._decided_by: Repeatable | None = None

    def begin(self, directory: Path, step: int, parent: Mapping[str, Any] | None) -> None:
        """Look up what lies beyond `step`, before this attempt writes a line. Collective: rank 0
        reads, and every rank holds the same lines."""
        self._parent = parent
        path = directory / LEDGER_NAME

        def read() -> tuple[dict[int, EarlierStep], DecisionHistory]:
            return steps_beyond(read_every_line(path) if path.exists() else (), step)

        self._earlier, self._history = on_first(self._mesh.world, read)
        if self._anew:
            self.forget()

    def forget(self) -> None:
        """Compare nothing from here on: other data come after a rewind."""
        self._earlier = {}

    def stage(self, index: int, kernels: Mapping[str, str]) -> dict[str, Any]:
        """The steps that follow are of stage `index`. Returns its `repeatable` for the ledger."""
        self._decided_by = repeatable(
            self._run, index, self._mesh, kernels, self._parent, self._files, self._anew
        )
        return asdict(self._decided_by)

    def check(self, line: StepLine) -> Difference | None:
        """The first loss that differs, alike on every rank, or None. Raises RepeatError on every
        rank where the cursors of any rank differ: other data have come."""
        self._history = self._history.with_step(line.step, self._decided_by)
        earlier = self._earlier.pop(line.step, None)
        if earlier is None:
            return None
        mine = difference(line, earlier, self._history, self._run.precision, self._deterministic)
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
        self._compares_losses = False  # what differs now differs ever after: it is reported once
        return found[0]


def _means_another_order(allowed: str) -> bool:
    head, *rest = allowed.split(".")
    return head == "data" and rest[:1] not in ([name] for name in BESIDE_THE_ORDER)
