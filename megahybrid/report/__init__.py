"""What a run did, as pictures and one page. Reads the run's directory and nothing else."""

from pathlib import Path


def write_report(directory: Path) -> list[Path]:
    """Writes `report/` in a run's directory: report.html, then each picture. Returns their paths.

    Raises MegahybridError when the directory holds no run, or one without a single step.
    """
    from megahybrid.report.answers import draw_answers
    from megahybrid.report.page import page
    from megahybrid.report.plots import draw_all
    from megahybrid.report.record import read_record

    record = read_record(directory)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    pictures = draw_all(record, folder) + draw_answers(directory, folder)
    html = folder / "report.html"
    # The overview repeats two of the others.
    shown = [picture for picture in pictures if picture.path.stem != "overview"]
    html.write_text(page(record, shown), encoding="utf-8")
    return [html, *(picture.path for picture in pictures)]


__all__ = ["write_report"]
