"""The history of a run on the cluster, as files in its folder: no accounting database is needed.

slurm/attempts.jsonl holds one line when a job is submitted, when an attempt begins and when it
ends, with the node failures seen between. A batch host that loses power writes no end.
"""

import contextlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megahybrid.errors import EXIT_DONE, EXIT_RESUME
from megahybrid.launch.interruption import LIMIT_SLACK_SECONDS, Interruption
from megahybrid.launch.job import FOLDER
from megahybrid.ledger import LEDGER_NAME, Line, SaveEvent, StepLine, newest_lines

RECORDS = "attempts.jsonl"


@dataclass
class AttemptRecord:
    """One start of the ranks, as the records tell it. `code` is None while it goes on or when
    nobody was left to write it."""

    job: str
    attempt: int
    nodes: list[str] = field(default_factory=list)
    started: float = 0.0
    ended: float | None = None
    code: int | None = None
    step: int | None = None
    checkpoint: int | None = None
    reason: str = ""
    checkpoint_before: int | None = None
    interruption: Interruption | None = None

    @property
    def counts(self) -> bool:
        """True where the caps may count it: what Slurm did to it is no failure of the run."""
        return self.interruption is None or self.interruption.counts

    @property
    def failed(self) -> bool:
        """True where it neither finished nor stopped in order; one nobody ended counts as lost."""
        return self.counts and self.code not in (EXIT_DONE, EXIT_RESUME)

    @property
    def progressed(self) -> bool:
        """True where it left a newer checkpoint than it found."""
        return (self.checkpoint or -1) > (self.checkpoint_before or -1)


def records_file(run_directory: Path) -> Path:
    """The records of a run."""
    return run_directory / FOLDER / RECORDS


def record(run_directory: Path, event: str, **facts: Any) -> None:
    """Appends one line and forces it to disk."""
    path = records_file(run_directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time_unix": round(time.time(), 1), **facts}) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # A line that a power cut tore must not swallow this one.
        end = os.fstat(descriptor).st_size
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            line = "\n" + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    except OSError as error:  # from a descriptor it does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def read_records(run_directory: Path) -> list[dict[str, Any]]:
    """Every whole line, in order."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in records_file(run_directory).read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def attempts(run_directory: Path, *, since_submit: bool = False) -> list[AttemptRecord]:
    """The attempts in their order; `since_submit`: those that began after the last submission or
    requeue by hand."""
    found: list[AttemptRecord] = []
    for line in read_records(run_directory):
        match line.get("event"):
            case "submit" | "requeue" if since_submit:
                found = []
            case "start":
                found.append(
                    AttemptRecord(
                        line["job"],
                        line["attempt"],
                        line["nodes"],
                        line["time_unix"],
                        checkpoint_before=line["checkpoint"],
                    )
                )
            case "signal" | "interrupted" | "end":
                for one in found:
                    if (one.job, one.attempt) == (line["job"], line["attempt"]):
                        _go_on(one, line)
    # What a lost attempt left is what the next one found.
    for one, following in itertools.pairwise(found):
        if one.code is None:
            one.checkpoint = following.checkpoint_before
            one.reason = one.reason or "lost: nobody was left to write its end"
    return found


def _go_on(one: AttemptRecord, line: dict[str, Any]) -> None:
    """Complete an attempt by a later line. TERM says that Slurm ended it, though nobody may have
    been left to ask why."""
    match line["event"]:
        case "signal":
            left = line.get("seconds_left")
            at_limit = left is not None and left < LIMIT_SLACK_SECONDS
            one.interruption = Interruption.TIME_LIMIT if at_limit else Interruption.ENDED
        case "interrupted":
            one.interruption = Interruption(line["how"])
        case "end":
            one.ended, one.code = line["time_unix"], line["code"]
            one.step, one.checkpoint = line["step"], line["checkpoint"]
            one.reason = line["reason"]
            how = line.get("interruption")
            one.interruption = None if how is None else Interruption(how)
            return
    one.reason = f"{one.interruption}, before its end was written"


def jobs(run_directory: Path) -> list[str]:
    """Numbers of all jobs ever submitted for the run, the newest last."""
    return [
        job
        for line in read_records(run_directory)
        if line.get("event") == "submit"
        for job in line.get("jobs", [])
    ]


def newest_checkpoint(run_directory: Path) -> int | None:
    """Step of the newest published checkpoint: one with a manifest that is of its name's step."""
    found = {
        int(path.parent.name.removeprefix("step-")): path
        for path in (run_directory / "checkpoints").glob("step-*/manifest.json")
        if path.parent.name.removeprefix("step-").isdigit()
    }
    # A folder that was renamed or copied is passed over by the run as well.
    return next((step for step in sorted(found, reverse=True) if _says(found[step], step)), None)


def _says(manifest: Path, step: int) -> bool:
    """Return True where a manifest's first lines name the step; the rest may be many megabytes."""
    try:
        with open(manifest, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    stated = re.search(rb'"step":\s*(\d+)\s*[,}]', head)
    return stated is None or int(stated[1]) == step


def newest_ledger_lines(run_directory: Path) -> Iterator[Line]:
    """The lines at the end of the run's ledger, the newest first."""
    return newest_lines(run_directory / LEDGER_NAME)


@dataclass(frozen=True)
class Measured:
    """Times that the ledger holds: the longest of the last saves, steps and validations, and the
    pace; None where nothing was measured yet."""

    save_seconds: float | None
    step_seconds: float | None  # without saving and validation
    evaluate_seconds: float | None
    tokens_per_hour: float | None  # median


def measured(run_directory: Path) -> Measured:
    """Read what the newest 200 steps of the ledger, and the saves among them, took."""
    saves: list[float] = []
    steps: list[StepLine] = []
    for line in newest_ledger_lines(run_directory):
        if isinstance(line, StepLine):
            steps += [line] if len(steps) < 200 else []
        elif isinstance(line.content, SaveEvent) and line.content.seconds is not None:
            saves.append(line.content.seconds)
    work = (
        sum(v for k, v in line.seconds.items() if k not in ("save", "evaluate")) for line in steps
    )
    rates = sorted(line.tokens_per_second * 3600 for line in steps if line.tokens_per_second)
    return Measured(
        save_seconds=max(saves[:10], default=None),
        step_seconds=max(work, default=None),
        evaluate_seconds=max((line.seconds.get("evaluate", 0.0) for line in steps), default=None),
        tokens_per_hour=rates[len(rates) // 2] if rates else None,
    )


def stop_lead(run_directory: Path, least: int) -> int:
    """Seconds before the time limit at which to stop: twice what the longest save, step and
    validation took, with a minute for Slurm's own coarse clock, and never under `least`."""
    known = measured(run_directory)
    longest = (known.save_seconds, known.step_seconds, known.evaluate_seconds)
    needed = 60 + 2 * sum(seconds or 0 for seconds in longest)
    return max(least, int(needed) + 1)
