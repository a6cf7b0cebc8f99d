"""What a run did, as pictures and one page. Reads the run's directory and nothing else."""

from collections.abc import Sequence
from pathlib import Path

from megahybrid.errors import ConfigError, from_os_error
from megahybrid.plain_file import refuse_other_than_file

PAGE = "report.html"


def write_report(directory: Path) -> list[Path]:
    """Writes `report/` in a run's directory: the page, then each picture. Returns their paths.

    Raises MegahybridError when the directory holds no run, or one without a single step.
    """
    from megahybrid.report.answers import draw_answers
    from megahybrid.report.plots import draw_all
    from megahybrid.report.record import read_record

    record = read_record(directory)
    folder = directory / "report"
    try:
        folder.mkdir(exist_ok=True)
        pictures = draw_all(record, folder) + draw_answers(directory, folder)
    except OSError as error:
        raise from_os_error(error) or error from None
    return [write_page([directory]), *(picture.path for picture in pictures)]


def write_page(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one page about one run or several side by side; returns its path.

    `out` defaults to `report/report.html` in the run's directory, and with several runs to
    `report.html` in the current one.
    """
    from megahybrid.report.page import page, read_runs

    records = read_runs(directories)
    if out is None:
        out = directories[0] / "report" / PAGE if len(directories) == 1 else Path(PAGE)
    text = page(records)
    refuse_other_than_file(out, "--out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out={out} cannot be written ({error.strerror}). Name a file that can be."
        ) from None
    return out


__all__ = ["write_page", "write_report"]
