"""Context gain as tables for a terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from megahybrid.evaluate.context_gain import ContextGain
from megahybrid.ledger import GainBucket

NOTHING = "–"


def gain_table(gains: Mapping[str, Sequence[ContextGain]]) -> Table:
    """A row for each set and context: the gain with its 95 % interval, and of what it is a mean."""
    table = Table(box=box.HORIZONTALS)
    for column in ("set", "context", "gain", "95 %", "bits/byte", "loss", "tokens", "documents"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, told in gains.items():
        for gain in told:
            table.add_row(
                name,
                f"{gain.context:,}",
                _signed(gain.gain),
                _interval(gain.low, gain.high),
                _signed(gain.gain_bits_per_byte),
                NOTHING if gain.loss is None else f"{gain.loss:.4f}",
                f"{gain.tokens:,}",
                f"{gain.documents:,}",
            )
    return table


def gain_positions_table(gains: Sequence[ContextGain]) -> Table:
    """A row for each range of positions of one set; a gain, interval and documents per context."""
    table = Table(box=box.HORIZONTALS)
    table.add_column("positions", justify="right")
    for gain in gains:
        table.add_column(f"beyond {gain.context:,}", justify="right")
        table.add_column("95 %", justify="right")
        table.add_column("documents", justify="right")
    by_place = [{(one.start, one.stop): one for one in gain.by_position} for gain in gains]
    for start, stop in sorted({place for known in by_place for place in known}):
        cells = [text for known in by_place for text in _cells(known.get((start, stop)))]
        table.add_row(f"{start:,} – {stop - 1:,}", *cells)
    return table


def _cells(bucket: GainBucket | None) -> tuple[str, str, str]:
    if bucket is None:
        return ("", "", "")
    return (_signed(bucket.gain), _interval(bucket.low, bucket.high), f"{bucket.documents:,}")


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.4f}"


def _interval(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"{low:+.4f} … {high:+.4f}"
