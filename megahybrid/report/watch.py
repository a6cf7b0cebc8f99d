"""`megahybrid watch`: the report of a run, served to this machine while the run goes on.

The page asks after what it shows; the server answers as soon as a ledger or a result has changed,
and the page puts what is new in place. Nothing is written and nothing is taken in.
"""

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.printable import printable
from megahybrid.report.http import is_loopback, server
from megahybrid.report.page import content, packed, page, read_runs
from megahybrid.report.record import RunRecord
from megahybrid.train.ledger import LEDGER_NAME, read_ledger
from megahybrid.train.results import EVALUATIONS

WAIT_SECONDS = 20.0  # the longest a page waits for an answer that something has changed
LOOK_SECONDS = 1.0  # between two looks at the files
REST = 4  # times as long as a drawing took, until the next one


class Watched:
    """The runs as a page asks for them: drawn again only when a file of theirs has changed."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = list(directories)
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._drawn: tuple[str, dict[str, Any]] | None = None
        self._rest_until = 0.0

    def version(self) -> str:
        """Changes whenever a ledger grows or a result is written."""
        marks = []
        for directory in self.directories:
            kept = sorted((directory / EVALUATIONS).glob("step-*.json"))
            for path in (directory / LEDGER_NAME, directory / "samples.txt", *kept):
                try:
                    told = path.stat()
                except OSError:
                    continue
                marks.append(f"{path.name}:{told.st_size}:{told.st_mtime_ns}")
        return f"{hash(tuple(marks)) & 0xFFFFFFFFFFFF:x}"

    def page(self) -> str:
        """The whole page, which then follows."""
        with self._lock:  # one drawing at a time, whoever asks
            return page(read_runs(self.directories), live="live.json")

    def state(self, after: str) -> dict[str, Any]:
        """What a page that shows version `after` needs; waits a while for news."""
        until = time.monotonic() + WAIT_SECONDS
        while not self.closing.is_set() and self.version() == after and time.monotonic() < until:
            self.closing.wait(LOOK_SECONDS)
        if after:
            self.closing.wait(self._rest_until - time.monotonic())
        version = self.version()
        with self._lock:  # several pages, one drawing
            if self._drawn is None or self._drawn[0] != version:
                began = time.monotonic()
                self._drawn = version, self._state(version)
                # A long ledger takes seconds to draw: the run's machine has better things to do.
                self._rest_until = time.monotonic() + REST * (time.monotonic() - began)
            return self._drawn[1]

    def _state(self, version: str) -> dict[str, Any]:
        records = read_runs(self.directories)
        main, figures, data = content(records)
        ended = all(_ended(record) for record in records)
        step = max(record.steps[-1].step for record in records)
        return {
            "version": version,
            "status": f"ended at step {step:,}" if ended else f"live · step {step:,}",
            "ended": False,  # an ended run may be taken up again while its page is open
            "main": main,
            "figures": figures,
            "data": packed(json.dumps(data, allow_nan=False).encode()),
        }


def _ended(record: RunRecord) -> bool:
    return getattr(record.ledger.lines[-1], "event", "") == "end"


def check_host(host: str, allow_others: bool) -> None:
    """Raises ConfigError for an address that other machines reach, unless they may."""
    if not is_loopback(host) and not allow_others:
        raise ConfigError(
            f"--host={host} lets other machines read the run (only 127.0.0.1 does not). "
            "Add --allow-others if they may; better, forward the port: ssh -L 8800:localhost:8800."
        )


def _wait_for_steps(directories: Sequence[Path]) -> None:
    for directory in directories:
        told = False
        while not read_ledger(directory / LEDGER_NAME).steps:
            if not told:
                print(printable(f"waiting for the first step of {directory}"), flush=True)
            told = True
            time.sleep(LOOK_SECONDS)


def watch(directories: Sequence[Path], *, host: str, port: int, allow_others: bool) -> int:
    """Serve until Ctrl-C or TERM. Raises MegahybridError, one line, for what the user can mend."""
    check_host(host, allow_others)
    _wait_for_steps(directories)  # a folder without a run is told now, not in the browser
    watched = Watched(directories)
    with server(watched, host, port) as serving:
        place = serving.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        print(printable(f"http://{shown}:{place}/   (Ctrl-C ends it)"), flush=True)

        def stop(_: int, __: FrameType | None) -> None:
            watched.closing.set()
            # shutdown() waits for the loop that this handler interrupts.
            threading.Thread(target=serving.shutdown).start()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            serving.serve_forever(poll_interval=0.2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return EXIT_DONE
