"""Rows of .parquet files: the only door to pyarrow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from megahybrid.data_prep.items import Fields
from megahybrid.errors import DataError

BATCH_ROWS = 256
MAX_ROW_GROUP_BYTES = 2**32  # unpacked; pyarrow holds a column chunk at a time


@dataclass(frozen=True)
class BadRow:
    """A row, or all that follows, that cannot be used."""

    reason: str


class Row(NamedTuple):
    """One row: its number in the file, its text, and the other fields that were asked for.

    size: bytes on disk (of a hub dataset: rows) that it takes up, or that are lost.
    """

    number: int
    text: str | BadRow
    more: Mapping[str, Any] = MappingProxyType({})
    size: float = 1.0


def row_group_ranges(path: Path, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First and last + 1 of row groups that make about `unit_bytes` on disk, and that size.

    A file whose footer cannot be read is one range; reading it names the fault.
    """
    size = path.stat().st_size
    try:
        metadata = _parquet().ParquetFile(path).metadata
        groups = metadata.num_row_groups
        rows = max(1, metadata.num_rows)
        sizes = [size * metadata.row_group(i).num_rows // rows for i in range(groups)]
    except DataError:
        raise
    except Exception:  # pyarrow raises many kinds for damage
        yield 0, 1, size
        return
    start = held = 0
    for group in range(groups):
        if group > start and held + sizes[group] > unit_bytes:
            yield start, group, held
            start, held = group, 0
        held += sizes[group]
    if groups:
        yield start, groups, held


def read_rows(
    path: str | BinaryIO, start: int, stop: int, size: float, fields: Fields
) -> Iterator[Row]:
    """Yield the rows of row groups start … stop - 1, with the kept columns that there are.

    All of them together take up `size` bytes on disk. There is one BadRow for a row without text,
    one for the rest of a row group that is damaged, and one for all rows where the column is
    missing.
    """
    parquet = _parquet()
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        metadata = file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        names = file.schema_arrow.names
    except Exception:
        yield Row(0, BadRow("broken parquet"), size=size)
        return
    row, rows = sum(counts[:start]), sum(counts[start:stop])
    if fields.text not in names:
        yield Row(row, BadRow(fields.missing), size=size)
        return
    rate = size / rows if rows else 0.0
    kept = [name for name in fields.kept if name in names]
    columns = [name for name in fields.columns if name in names]
    for group in range(start, min(stop, len(counts))):
        if metadata.row_group(group).total_byte_size > MAX_ROW_GROUP_BYTES:
            yield Row(row, BadRow("decompression bomb"), size=counts[group] * rate)
        else:
            found = 0
            try:
                for values in _group_rows(file, group, columns, counts[group]):
                    more = {name: _kept(values[name]) for name in kept}
                    yield Row(row + found, _text(values, fields), more, rate)
                    found += 1
            except _BrokenGroup:
                broken = BadRow("broken parquet")
                yield Row(row + found, broken, size=(counts[group] - found) * rate)
        row += counts[group]


class _BrokenGroup(Exception):
    """A row group that gives no more rows."""


def _group_rows(
    file: Any, group: int, columns: Sequence[str], rows: int
) -> Iterator[dict[str, Any]]:
    try:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
            read = [batch.column(name) for name in columns]
            for index in range(batch.num_rows):
                yield {name: column[index] for name, column in zip(columns, read, strict=True)}
            rows -= batch.num_rows
    except Exception:  # pyarrow raises many kinds for damage
        raise _BrokenGroup from None
    if rows:
        raise _BrokenGroup


def _text(values: Mapping[str, Any], fields: Fields) -> str | BadRow:
    try:
        if fields.chat:
            row = {name: _kept(value) for name, value in values.items()}
            text = fields.value(row, sparse=True)
        else:
            text = values[fields.text].as_py()
        if isinstance(text, bytes):  # what some writers call text
            text = text.decode("utf-8")
    except UnicodeDecodeError:
        return BadRow("broken utf-8")
    return text if isinstance(text, str) else BadRow(fields.missing)


def _kept(value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):  # nanoseconds, broken UTF-8
        return None


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "inputs in .parquet need the package pyarrow, which is not installed. "
            "Run `pip install megahybrid[data]`."
        ) from None
    return pyarrow.parquet
