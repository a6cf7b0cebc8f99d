"""What happened to a run on the cluster, as files in its folder: no accounting database is needed.

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
        """Whether the caps may count it: what Slurm did to it is no failure of the run."""
        return self.interruption is None or self.interruption.counts

    @property
    def failed(self) -> bool:
        """Neither done nor stopped in order; an attempt nobody ended counts as lost."""
        return self.counts and self.code not in (EXIT_DONE, EXIT_RESUME)

    @property
    def progressed(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
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
    """What a later line says of an attempt. TERM says that Slurm ended it, though nobody may have
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


def last_submission(run_directory: Path) -> dict[str, Any]:
    """The newest submission's line, or nothing."""
    found = [line for line in read_records(run_directory) if line.get("event") == "submit"]
    return found[-1] if found else {}


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
    """Whether a manifest's first lines name the step; what follows may be many megabytes."""
    try:
        with open(manifest, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    stated = re.search(rb'"step":\s*(\d+)\s*[,}]', head)
    return stated is None or int(stated[1]) == step


def ledger_tail(run_directory: Path, nbytes: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The lines at the end of the ledger, the newest first."""
    try:
        with open(run_directory / "ledger.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - nbytes))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def measured(run_directory: Path) -> dict[str, float | None]:
    """What the run has shown of itself: seconds of a save and of a step (the longest of the
    last ones), and tokens per hour; None where nothing was measured yet."""
    saves: list[float] = []
    steps: list[float] = []
    rates: list[float] = []
    validations: list[float] = []
    for line in ledger_tail(run_directory):
        if line.get("kind") == "event" and line.get("event") == "save":
            with contextlib.suppress(KeyError, TypeError, ValueError):
                saves.append(float(line["detail"]["seconds"]))
        elif line.get("kind") == "step" and len(steps) < 200:
            seconds = line.get("seconds") or {}
            validations.append(float(seconds.get("evaluate") or 0))
            steps.append(sum(v for k, v in seconds.items() if k not in ("save", "evaluate")))
            if line.get("tokens_per_second"):
                rates.append(float(line["tokens_per_second"]) * 3600)
    rates.sort()
    return {
        "save_seconds": max(saves[:10], default=None),
        "step_seconds": max(steps, default=None),
        "evaluate_seconds": max(validations, default=None),
        "tokens_per_hour": rates[len(rates) // 2] if rates else None,
    }


def stop_lead(run_directory: Path, least: int) -> int:
    """Seconds before the time limit at which to stop: twice what the longest save, step and
    validation took, with a minute for Slurm's own coarse clock, and never under `least`."""
    known = measured(run_directory)
    longest = (known[name] or 0 for name in ("save_seconds", "step_seconds", "evaluate_seconds"))
    needed = 60 + 2 * sum(longest)
    return max(least, int(needed) + 1)
