"""The report's tables and pictures for a tracker such as wandb."""

from pathlib import Path

from megahybrid.errors import MegahybridError
from megahybrid.report.answer_charts import by_length_parts, needle_parts
from megahybrid.report.answers import draw_answers, draw_results
from megahybrid.report.evaluation_files import EvaluationFile, newest_evaluations, read_evaluations
from megahybrid.report.parts import Cell, Chart, Part, Table
from megahybrid.report.plots import draw_all
from megahybrid.report.record import RunRecord, read_record
from megahybrid.report.sections import sections
from megahybrid.train.listeners import ListenerFailed
from megahybrid.train.listeners.wandb_listener import Tracked, send


def tracked(directory: Path, suite: str | None, step: int) -> Tracked:
    """Tables and pictures by name: of one suite at one step, or with None of the whole report.

    The pictures are written to `report/` in the run's directory.
    """
    record = read_record(directory)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    if suite is None:
        pictures = draw_all(record, folder) + draw_answers(directory, folder)
        return tables(record, newest_evaluations(directory)), {
            f"report/{picture.path.stem}": picture.path for picture in pictures
        }
    results = [one for one in read_evaluations(directory) if (one.name, one.step) == (suite, step)]
    found = [(record, results)]
    named = _named([*needle_parts(found), *by_length_parts(found)])
    return {f"suite/{name}": table for name, table in named.items()}, {
        f"suite/{picture.path.stem}": picture.path for picture in draw_results(results, folder)
    }


def tables(
    record: RunRecord, results: list[EvaluationFile]
) -> dict[str, tuple[list[str], list[list[Cell]]]]:
    """Every table of the page, by section and chart."""
    found = {}
    for section in sections([record], [results], [read_evaluations(record.directory)]):
        for name, table in _named(section.parts).items():
            found[f"report/{section.id}/{name}"] = table
    return found


def _named(parts: list[Part]) -> dict[str, tuple[list[str], list[list[Cell]]]]:
    found = {}
    for number, part in enumerate(parts):
        table = part.table if isinstance(part, Chart) else part if isinstance(part, Table) else None
        if table is not None and table.rows:
            name = part.id if isinstance(part, Chart) else f"table-{number}"
            # A column has one type there.
            words = [
                any(isinstance(row[place], str) for row in table.rows)
                for place in range(len(table.head))
            ]
            rows: list[list[Cell]] = [
                [
                    str(cell) if word and cell is not None else _number(cell)
                    for cell, word in zip(row, words, strict=True)
                ]
                for row in table.rows
            ]
            found[name] = (list(table.head), rows)
    return found


def _number(cell: Cell) -> Cell:
    return float(cell) if isinstance(cell, int) else cell


def send_report(directory: Path, mode: str) -> None:
    """Adds everything to the run's wandb run. Raises MegahybridError, one line, where it fails."""
    record = read_record(directory)
    project = record.config.log.wandb_project if record.config else "megahybrid"
    try:
        send(directory, record.name, mode, project, record.steps[-1].tokens,
             tracked(directory, None, 0))  # fmt: skip
    except ListenerFailed as error:
        raise MegahybridError(f"--wandb={mode}: {error}. The report itself was written.") from None
