"""Charts of the data that a run has read: tokens by source and by row length in each stage."""

from collections.abc import Callable, Sequence

from megahybrid.report.figures import axis, colour, layout
from megahybrid.report.parts import Cell, Chart, Part, Table
from megahybrid.report.record import RunRecord, StageRecord


def data_parts(records: Sequence[RunRecord]) -> list[Part]:
    """Return the tokens of each stage as two bars: by source, and by length of the row."""
    return [
        _mix(
            records, "data-sources", "Tokens by source",
            "Where the tokens of each stage came from, as counted while training.", by_source,
        ),
        _mix(
            records, "data-lengths", "Tokens by row length",
            "How long the rows were that the tokens came in. Long rows cost more and teach "
            "distance; short ones keep what the model can already do.", by_length,
        ),
    ]  # fmt: skip


def by_source(record: RunRecord) -> list[dict[str, int]]:
    """Tokens of each source in each stage."""
    counted: dict[str, int] = {}
    found = []
    for stage in record.stages:
        total = stage.steps[-1].source_tokens
        found.append({name: n - counted.get(name, 0) for name, n in total.items()})
        counted = total
    return found


def by_length(record: RunRecord) -> list[dict[str, int]]:
    """Tokens in rows of each length in each stage."""
    return [_lengths(stage) for stage in record.stages]


def _lengths(stage: StageRecord) -> dict[str, int]:
    found: dict[int, int] = {}
    before = stage.begin
    for step in stage.steps:
        found[step.length] = found.get(step.length, 0) + step.tokens - before
        before = step.tokens
    return {f"{length:,}": tokens for length, tokens in sorted(found.items())}


def _mix(
    records: Sequence[RunRecord],
    name: str,
    title: str,
    says: str,
    count: Callable[[RunRecord], list[dict[str, int]]],
) -> Part:
    labels: list[str] = []
    mixes: list[dict[str, int]] = []
    for record in records:
        for stage, mix in zip(record.stages, count(record), strict=True):
            labels.append(f"{record.name}: {stage.name}" if len(records) > 1 else stage.name)
            mixes.append(mix)
    names = list(dict.fromkeys(one for mix in mixes for one in mix))
    data = [
        {
            "type": "bar", "orientation": "h", "name": one, "y": labels,
            "x": [mix.get(one, 0) for mix in mixes], "marker": {"color": colour(index)},
            "customdata": [mix.get(one, 0) / max(1, sum(mix.values())) for mix in mixes],
            "hovertemplate": "%{x:,} tokens (%{customdata:.1%})",
        }
        for index, one in enumerate(names)
    ]  # fmt: skip
    plan = layout(
        axis("tokens", exponentformat="B"), {"type": "category", "autorange": "reversed"},
        barmode="stack", hovermode="closest", height=150 + 34 * len(labels),
    )  # fmt: skip
    rows: list[list[Cell]] = [
        [label, one, mix[one], 100 * mix[one] / max(1, sum(mix.values()))]
        for label, mix in zip(labels, mixes, strict=True)
        for one in names
        if one in mix
    ]
    table = Table(("stage", title.rsplit(" by ", 1)[1], "tokens", "% of the stage"), rows)
    return Chart(name, title, says, {"data": data, "layout": plan}, table)
