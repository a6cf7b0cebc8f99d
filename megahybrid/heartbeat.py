"""Heartbeats: each rank's own word on which phase and step it is in, and how it ended.

A file per rank, replaced whole every few seconds by a thread, so that the loop pays nothing. It
holds no time of day: clocks jump and differ between machines. It counts its beats, and tells how
long the phase has lasted by the rank's own monotonic clock; who watches measures with its own how
long no beat came. `HangDetector` says from that which rank hangs. Standard library only: the
launcher reads on login nodes.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
LOGS = "MEGAHYBRID_LOGS"  # set by our batch job: …/JOB.RESTART, where it arranges the ranks' logs
PHASES = ("start", "compile", "data", "step", "evaluate", "save")
BEAT_SECONDS = 2.0
STACKS_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True)
class Beat:
    """The contents of one rank's file."""

    rank: int
    host: str
    pid: int
    beats: int = 0
    phase: str = "start"
    step: int = 0
    phase_seconds: float = 0.0
    busy_seconds: float | None = None  # of a fixed piece of work, without waiting for others
    exit_code: int | None = None  # set once, at the end
    message: str | None = None  # the error that ended the rank, in one line
    consequence: bool = False  # the error only says that another rank is gone
    attempt: str = ""  # JOB.RESTART, where a batch job started the ranks


_FIELDS = {field.name for field in fields(Beat)}


def heartbeat_file(run_directory: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat."""
    return run_directory / FOLDER / f"rank-{rank:04d}.json"


def write_whole(path: Path, text: str) -> None:
    """Replaces a file so that nobody ever reads a part of it. Raises OSError that names it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # half a file would keep what little room there is
        raise OSError(error.errno, error.strerror, str(path)) from None


class Heartbeat:
    """Beats for one rank until `end`. `phase` and `busy` are cheap enough for every step."""

    def __init__(
        self, run_directory: Path, rank: int, *, beat_seconds: float = BEAT_SECONDS
    ) -> None:
        self.path = heartbeat_file(run_directory, rank)
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        attempt = Path(os.environ.get(LOGS, "")).name
        self._beat = Beat(rank, host, os.getpid(), attempt=attempt)
        # One value, replaced whole: the loop writes it while the thread reads.
        self._phase_since = ("start", 0, time.monotonic())
        self._recent: list[float] = []
        self._beat_seconds = beat_seconds
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> "Heartbeat":
        """Writes the first beat and goes on in a thread."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def phase(self, name: str, step: int | None = None) -> None:
        """Enter phase `name`, one of PHASES, with `step` steps done."""
        assert name in PHASES, name
        self._phase_since = (name, self._phase_since[1] if step is None else step, time.monotonic())

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Be in phase `name` inside the block, and in the one before it afterwards."""
        before = self._phase_since[0]
        self.phase(name)
        try:
            yield
        finally:
            self.phase(before)

    def busy(self, seconds: float) -> None:
        """Note what a fixed piece of work cost this rank alone.

        The median of the last five is told, once there are three: a machine stumbles now and then.
        """
        self._recent = [*self._recent[-4:], seconds]

    def end(self, exit_code: int, message: str | None = None, *, consequence: bool = False) -> None:
        """Write the last beat: how the rank ended. Nothing follows."""
        self._stop.set()
        self._write(exit_code=exit_code, message=message, consequence=consequence)

    def _run(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            self._write()

    def _write(self, **end: Any) -> None:
        # A full or absent disk must not end a rank that computes; the silence will be noticed.
        with self._writing, contextlib.suppress(OSError):
            if self._superseded():
                self._stop.set()
                return
            phase, step, since = self._phase_since
            recent = self._recent
            self._beat = replace(
                self._beat,
                beats=self._beat.beats + 1,
                phase=phase,
                step=step,
                phase_seconds=round(time.monotonic() - since, 2),
                busy_seconds=round(statistics.median(recent), 4) if len(recent) >= 3 else None,
                **end,
            )
            write_whole(self.path, json.dumps(asdict(self._beat)))

    def _superseded(self) -> bool:
        """Return whether a later attempt beats here: this node was silent, and the run went on."""
        found = _read_beat(self.path)
        return found is not None and _order(found.attempt) > _order(self._beat.attempt)


def _order(attempt: str) -> tuple[int, ...]:
    parts = attempt.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def write_stacks_on_signal(path: Path) -> None:
    """Have STACKS_SIGNAL append the stacks of all threads to `path`; nothing else happens.

    faulthandler writes from the signal itself, so a rank that hangs inside a library answers too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115 (held until the process ends)
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)


def remove_empty_stacks(logs: Path) -> None:
    """Removes the files of ranks that nobody asked for their stacks."""
    for path in logs.glob("stacks-*.txt"):
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()


def clear(run_directory: Path) -> None:
    """Forgets the heartbeats of an earlier attempt."""
    with contextlib.suppress(FileNotFoundError):
        for path in (run_directory / FOLDER).iterdir():
            path.unlink(missing_ok=True)


def read_beats(run_directory: Path, attempt: str = "") -> dict[int, Beat]:
    """The newest beat of every rank that has begun; with `attempt` (JOB.RESTART) of that one's."""
    found: dict[int, Beat] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in (run_directory / FOLDER).glob("rank-*.json"):
            beat = _read_beat(path)
            if beat is not None and (not attempt or beat.attempt == attempt):
                found[beat.rank] = beat
    return dict(sorted(found.items()))


def _read_beat(path: Path) -> Beat | None:
    # Another node may be replacing the file as we read.
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads(path.read_text())
        return Beat(**{key: known[key] for key in known.keys() & _FIELDS})
    return None


def first_failure(beats: Mapping[int, Beat]) -> Beat | None:
    """The rank that tells the cause: one whose error is no consequence of another's end."""
    failed = [beat for beat in beats.values() if beat.exit_code]
    causes = [beat for beat in failed if not beat.consequence]
    return min(causes or failed, key=lambda beat: beat.rank, default=None)


def slow_ranks(beats: Mapping[int, Beat], ratio: float) -> list[tuple[Beat, float]]:
    """Ranks whose fixed piece of work takes over `ratio` times the median, and how many times."""
    costs = {rank: beat.busy_seconds for rank, beat in beats.items() if beat.busy_seconds}
    if len(costs) < 2:
        return []
    # The lower median: of two ranks the faster one is the measure.
    median = statistics.median_low(costs.values())
    return [(beats[rank], cost / median) for rank, cost in costs.items() if cost > ratio * median]


@dataclass(frozen=True)
class Hang:
    """Ranks that do nothing any more, and in one line why that is thought."""

    ranks: tuple[int, ...]
    message: str


class HangDetector:
    """A judge of the beats of `world_size` ranks, asked now and then.

    `limits` are seconds by phase; `silent_seconds` is how long a rank may not beat at all.
    """

    def __init__(self, world_size: int, limits: Mapping[str, float], silent_seconds: float) -> None:
        self.world_size = world_size
        self.limits = dict(limits)
        self.silent_seconds = silent_seconds
        self._began = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its last beat, and when it came

    def judge(self, beats: Mapping[int, Beat], now: float | None = None) -> Hang | None:
        """The hang that these beats show, or None."""
        now = time.monotonic() if now is None else now
        for rank, beat in beats.items():
            if self._seen.get(rank, (None, 0.0))[0] != beat.beats:
                self._seen[rank] = (beat.beats, now)
        missing = [rank for rank in range(self.world_size) if rank not in beats]
        if missing and now - self._began > self.limits["start"]:
            return Hang(
                tuple(missing), f"{_ranks(missing)} did not start in {self.limits['start']:.0f} s"
            )
        alive = {rank: beat for rank, beat in beats.items() if beat.exit_code is None}
        silence = {rank: now - self._seen[rank][1] for rank in alive}
        silent = [rank for rank, seconds in silence.items() if seconds > self.silent_seconds]
        if silent:
            return Hang(
                tuple(silent),
                f"{_ranks(silent)} sent no heartbeat for {max(silence[r] for r in silent):.0f} s "
                f"({_where(silent, alive)})",
            )
        over = [
            rank
            for rank, beat in alive.items()
            if beat.phase_seconds + silence[rank] > self.limits[beat.phase]
        ]
        if not over:
            return None
        suspects = _behind(alive) or over
        longest = max(alive[rank].phase_seconds + silence[rank] for rank in over)
        return Hang(
            tuple(suspects),
            f"{_ranks(suspects)} made no progress for {longest:.0f} s ({_where(suspects, alive)})",
        )


def _behind(alive: Mapping[int, Beat]) -> list[int]:
    """Ranks that stand before the others: those wait for them."""
    places = {rank: (beat.step, PHASES.index(beat.phase)) for rank, beat in alive.items()}
    first = min(places.values())
    behind = [rank for rank, place in places.items() if place == first]
    return behind if len(behind) * 2 <= len(places) else []


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{', …' * (len(ranks) > 4)}"


def _where(ranks: Sequence[int], beats: Mapping[int, Beat]) -> str:
    rank = ranks[0]
    beat = beats[rank]
    return f"phase {beat.phase}, step {beat.step}, on {beat.host}"
