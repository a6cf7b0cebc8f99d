"""The parent of local ranks: start them, watch them, and start them again where that is wanted."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megahybrid.config.site import Watchdog
from megahybrid.errors import EXIT_DO_NOT_RESTART, EXIT_DONE, EXIT_RESUME, EXIT_USER_MISTAKE, tell
from megahybrid.heartbeat import STACKS_SIGNAL, HangDetector, clear, read_beats, remove_empty_stacks
from megahybrid.train.stop import SAVE_NOW, STOP_NOW

# What another attempt would only repeat, or what was asked for.
FINAL = (EXIT_DONE, EXIT_USER_MISTAKE, EXIT_RESUME, EXIT_DO_NOT_RESTART)


def forget_requests(directory: Path) -> None:
    """Remove requests to an earlier attempt: they are not for this one."""
    clear(directory)
    for name in (STOP_NOW, SAVE_NOW):
        with contextlib.suppress(OSError):
            (directory / name).unlink()


def train_local(
    command: Sequence[str],
    processes: int,
    directory: Path,
    max_restarts: int,
    watchdog: Watchdog | None = None,
) -> int:
    """Runs `python *command` as `processes` ranks until they are done; returns the exit code.

    After a failure they are started again, `max_restarts` times at most, and go on from the newest
    checkpoint. With restarts wanted, ranks that hang (by `watchdog`'s limits) count as failed.
    """
    from megahybrid.parallel.local_launch import launch_local

    logs = directory / "logs"
    started = time.perf_counter()
    for restart in range(max_restarts + 1):
        forget_requests(directory)
        hung = _watch(directory, processes, watchdog or Watchdog()) if max_restarts else _never
        failure = launch_local(command, processes, logs, hung=hung, stacks_signal=STACKS_SIGNAL)
        remove_empty_stacks(logs)
        if failure is None:
            print(f"Run {directory} is complete ({time.perf_counter() - started:.0f} s).")
            return EXIT_DONE
        tell(failure.message)
        if failure.exit_code in FINAL or failure.stop_asked or restart == max_restarts:
            return failure.exit_code
        print(
            f"megahybrid: starting again ({restart + 1} of --max-restarts={max_restarts}).",
            file=sys.stderr,
            flush=True,
        )
    raise AssertionError("unreachable")


def _never() -> None:
    return None


def _watch(
    directory: Path, processes: int, watchdog: Watchdog
) -> Callable[[], tuple[int, str] | None]:
    watch = HangDetector(processes, watchdog.limits.model_dump(), watchdog.silent)

    def hung() -> tuple[int, str] | None:
        hang = watch.judge(read_beats(directory))
        return None if hang is None else (hang.ranks[0], hang.message)

    return hung
