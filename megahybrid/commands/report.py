"""`megahybrid report`: plots and one page about runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.printable import printable


def report(
    runs: Sequence[Path],
    *,
    page_alone: bool = False,
    out: Path | None = None,
    wandb: Literal["offline", "online"] | None = None,
) -> int:
    """Write each run's report; with `page_alone` one page, to `out`, on which they stand side by
    side. `wandb` adds tables and pictures to the run's page there. Prints what was written."""
    from megahybrid.report import write_page, write_report

    if out is not None and not page_alone:
        raise ConfigError(f"--out={out} is for the page alone. Add --html.")
    if page_alone:
        print(printable(str(write_page(list(runs), out))))
    for run in runs:
        for path in [] if page_alone else write_report(run):
            print(printable(str(path)))
        if wandb:
            from megahybrid.report.tracker_page import send_report

            send_report(run, wandb)
    return EXIT_DONE
