"""Progress bars: bytes, speed, tokens and the time left, where somebody looks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]


def byte_bars(quiet: bool | None = None) -> Progress:
    """Bars of bytes on the standard error; by default only where that is a terminal."""
    return Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty() if quiet is None else quiet,
    )


@contextmanager
def token_bar(name: str, tokens: int, item_bytes: int) -> Iterator[Advance]:
    """A bar over the bytes of so many tokens; gives what is called with each number of bytes."""
    with byte_bars() as bars:
        task = bars.add_task(name, total=tokens * item_bytes, tokens="")
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            bars.update(task, completed=done, tokens=f"{done / item_bytes / 1e6:,.1f} M tokens")

        yield advance
