"""`megahybrid launch tail`: the ranks' logs, merged, the first real error before all else."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megahybrid.heartbeat import first_failure, read_beats
from megahybrid.launch.records import attempts

TRACEBACK = "Traceback (most recent call last)"
# c10d, wherever an address has no name.
NOISE = "The hostname of the client socket cannot be retrieved"
# Errors that only say that another rank is gone.
_CONSEQUENCE = re.compile(
    r"Connection (closed by peer|reset)|Broken pipe|recvValue failed|NCCL|remote process exited"
)


def log_folder(run_directory: Path) -> Path | None:
    """The logs of the newest attempt; None where nothing was started on a cluster."""
    folders = [
        run_directory / "logs" / f"{attempt.job}.{attempt.attempt}"
        for attempt in attempts(run_directory)
    ]
    return next((folder for folder in reversed(folders) if folder.is_dir()), None)


def first_error(run_directory: Path, folder: Path) -> list[str]:
    """Return the first thing that went wrong, in a few lines; empty when nothing did."""
    lines = []
    cause = first_failure(
        {
            r: beat
            for r, beat in read_beats(run_directory).items()
            if beat.exit_code not in (None, 75)
        }
    )
    if cause is not None:
        told = cause.message or f"code {cause.exit_code}"
        lines.append(f"first error: rank {cause.rank} on {cause.host}: {told}")
    found = sorted(_tracebacks(folder), key=lambda one: (one[0], one[1]))
    if found:
        _, source, text = found[0]
        lines += [f"{source} | {line}" for line in text]
    return lines


def _tracebacks(folder: Path) -> Iterator[tuple[bool, str, list[str]]]:
    """Yield (is a consequence, source, lines) of the last traceback of each log."""
    for path in _logs(folder):
        lines = path.read_text(errors="replace").splitlines()
        starts = [n for n, line in enumerate(lines) if TRACEBACK in line]
        if not starts:
            continue
        text = lines[starts[-1] :][:40]
        # A traceback ends with the first line at its own margin: the error itself.
        end = next((n for n, one in enumerate(text[1:], 1) if one and not one[0].isspace()), None)
        text = text[: end + 1] if end else text
        yield bool(_CONSEQUENCE.search(text[-1])), _source(path), text


def _logs(folder: Path) -> list[Path]:
    return sorted(
        [*folder.glob("rank-*.log"), *folder.glob("node-????.log"), *folder.glob("srun.log")]
    )


def _source(path: Path) -> str:
    return path.stem.replace("-", " ", 1)


def tail(run_directory: Path, lines: int) -> list[str]:
    """Return the first real error, then the last `lines` lines of every rank.

    A line that all ranks wrote alike stands once.
    """
    folder = log_folder(run_directory)
    if folder is None:
        return _batch_log(run_directory, lines) or [f"{run_directory} has no logs of a job yet"]
    error = first_error(run_directory, folder)
    shown: dict[str, list[str]] = {}
    for path in _logs(folder):
        said = [x for x in path.read_text(errors="replace").splitlines() if NOISE not in x]
        for line in said[-lines:]:
            shown.setdefault(line, []).append(_source(path))
    merged = [
        f"{sources[0]}{f' (+{len(set(sources)) - 1})' if len(set(sources)) > 1 else ''} | {line}"
        for line, sources in shown.items()
        if line.strip()
    ]
    return [*error, *([""] if error else []), f"{folder}:", *merged]


def _batch_log(run_directory: Path, lines: int) -> list[str]:
    """The end of the newest job's own log: all there is where no ranks were started."""
    logs = list((run_directory / "logs").glob("*.batch.log"))
    if not logs:
        return []
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    return [f"{newest}:", *newest.read_text(errors="replace").splitlines()[-lines:]]


def follow(run_directory: Path, show: Callable[[str], None], alive: Callable[[], bool]) -> None:
    """Shows new lines of all ranks as they come, over attempts, until `alive` says no."""
    seen: dict[Path, int] = {}
    folder = log_folder(run_directory)
    if folder is not None:
        seen = {path: path.stat().st_size for path in _logs(folder)}
    while True:
        going = alive()
        folder = log_folder(run_directory)
        for path in _logs(folder) if folder else []:
            with open(path, "rb") as file:
                file.seek(seen.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            seen[path] = seen.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                show(f"{_source(path)} | {line}")
        if not going:
            return
        time.sleep(2)
