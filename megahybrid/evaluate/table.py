"""Held-out losses as tables for a terminal."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from megahybrid.evaluate.loss import TURNS, HeldOutLoss, PositionBucket

NOTHING = "–"


def loss_table(scores: Mapping[str, HeldOutLoss]) -> Table:
    """A row for each set: loss in nats, perplexity, bits and how many tokens were scored."""
    table = _table("set")
    for column in ("loss", "perplexity", "bits/token", "tokens"):
        table.add_column(column, justify="right")
    for name, score in scores.items():
        table.add_row(
            name,
            _number(score.loss, ".4f"),
            _number(score.perplexity, ",.2f"),
            _number(score.bits_per_token, ".4f"),
            f"{score.tokens:,}",
        )
    return table


def reach_table(
    rows: Mapping[int, Mapping[str, HeldOutLoss]],
    sliding: Mapping[str, HeldOutLoss],
    trained_length: int,
) -> Table:
    """Return a table of loss and perplexity of each set, a row for each length.

    The lengths are multiples of the trained one; one more row is for a sliding window.
    """
    table = _table("rows")
    for name in sliding:
        table.add_column(name, justify="right")
        table.add_column("perplexity", justify="right")
    named = {
        f"{length:,} ({length / trained_length:g}×)": scores for length, scores in rows.items()
    }
    for label, scores in (*named.items(), (f"sliding window of {trained_length:,}", sliding)):
        cells = [
            text
            for score in scores.values()
            for text in (_number(score.loss, ".4f"), _number(score.perplexity, ",.2f"))
        ]
        table.add_row(label, *cells)
    return table


def position_table(scores: Mapping[str, HeldOutLoss], trained_length: int) -> Table:
    """A row for each range of positions within documents; one without a token shows no loss.

    A line separates what lies beyond `trained_length` tokens of context.
    """
    table = _table("positions")
    table.columns[0].justify = "right"
    for name in scores:
        table.add_column(name, justify="right")
        table.add_column("tokens", justify="right")
    for buckets in zip(*(score.by_position for score in scores.values()), strict=True):
        cells = [
            text
            for bucket in buckets
            for text in (_number(bucket.loss, ".4f"), f"{bucket.tokens:,}")
        ]
        first = buckets[0]
        ends = first.start < trained_length <= first.stop
        table.add_row(_range(first), *cells, end_section=ends)
    return table


def turn_table(scores: Mapping[str, HeldOutLoss]) -> Table:
    """A row for each turn of the assistant, of the sets that have turns."""
    told = {name: score.by_turn for name, score in scores.items() if score.by_turn}
    table = _table("turn")
    table.columns[0].justify = "right"
    for name in told:
        table.add_column(name, justify="right")
        table.add_column("tokens", justify="right")
    for number in range(1, 1 + max(turns[-1].turn for turns in told.values())):
        cells = []
        for turns in told.values():
            found = next((one for one in turns if one.turn == number), None)
            cells += [
                _number(None if found is None else found.loss, ".4f"),
                f"{found.tokens if found else 0:,}",
            ]
        table.add_row(f"{number} and later" if number == TURNS else str(number), *cells)
    return table


def _table(first_column: str) -> Table:
    table = Table(box=box.HORIZONTALS)
    table.add_column(first_column)
    return table


def _range(bucket: PositionBucket) -> str:
    last = bucket.stop - 1
    return f"{last:,}" if bucket.start == last else f"{bucket.start:,} – {last:,}"


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
