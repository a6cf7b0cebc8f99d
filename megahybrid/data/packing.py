"""Plans: rows of whole documents for one length, as another kind of source.

A plan is a folder with `plan.json` and three plain arrays, little endian: `rows.i64` (first entry
of each row, then the number of entries), `starts.i64` and `lengths.i32` (the tokens of the dataset
that an entry covers). `megahybrid data pack` writes it. A run that names it as a source's path gets
its rows in the keyed order of each epoch, with the same promises as a stream of blocks: each row
once an epoch, the cursor is one number, nothing depends on ranks, workers or resumes.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megahybrid.data.order import Cursor, Permutation, Span
from megahybrid.data.token_file import Array
from megahybrid.errors import DataError

PLAN_NAME = "plan.json"
PLAN_FORMAT = "megahybrid-plan"
FILES = {"rows.i64": "<i8", "starts.i64": "<i8", "lengths.i32": "<i4"}

Method = Literal["best_fit", "stream"]


@dataclass(frozen=True)
class PlanInfo:
    """`plan.json`. dataset: path of the dataset, relative to the plan's folder."""

    dataset: str
    dataset_fingerprint: str
    method: str
    length: int
    min_document_tokens: int
    max_document_tokens: int | None
    rows: int
    entries: int
    documents: int
    tokens: int
    crc32: dict[str, int]
    command: str

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.tokens / max(1, self.rows * self.length)

    def dump(self) -> str:
        """The file's text."""
        return json.dumps({"format": PLAN_FORMAT, "version": 1} | asdict(self), indent=1) + "\n"


class PackPlan:
    """An opened plan. Costs a few kilobytes: the arrays are mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / PLAN_NAME
        try:
            raw = path.read_bytes()
            value = json.loads(raw)
            if (value.pop("format"), value.pop("version")) != (PLAN_FORMAT, 1):
                raise ValueError
            self.info = PlanInfo(**value)
            numbers = (self.info.length, self.info.rows, self.info.entries, self.info.tokens)
            if not all(type(n) is int for n in numbers) or self.info.length < 1:
                raise ValueError
            self.dataset = folder / self.info.dataset
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}). Check the path.").because(
                error
            ) from None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise _damaged(path, "is not a plan of this version") from None
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        counts = (self.info.rows + 1, self.info.entries, self.info.entries)
        self._rows, self._starts, self._lengths = (
            self._map(name, dtype, count)
            for (name, dtype), count in zip(FILES.items(), counts, strict=True)
        )
        if int(self._rows[0]) != 0 or int(self._rows[-1]) != self.info.entries:
            raise _damaged(folder / "rows.i64", f"does not span {self.info.entries} entries")

    def _map(self, name: str, dtype: str, count: int) -> Array:
        path = self.folder / name
        expected = count * np.dtype(dtype).itemsize
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}). Pack again.").because(
                error
            ) from None
        if found != expected:
            raise _damaged(path, f"has {found} bytes, not {expected} (plan.json)")
        return np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)

    @property
    def cuts(self) -> int:
        """Places inside documents where a row ends and another goes on."""
        return self.info.entries - self.info.documents

    def check_dataset(self, path: Path, fingerprint: str) -> None:
        """Raises DataError unless the dataset at `path` is the one that was packed."""
        if self.info.dataset_fingerprint != fingerprint:
            raise DataError(
                f"{self.folder} was packed for a dataset with fingerprint "
                f"{self.info.dataset_fingerprint[:12]}, but {path} has {fingerprint[:12]}. Run "
                "`megahybrid data pack` again."
            )

    def check_contents(self, dataset_tokens: int) -> None:
        """Compares every byte with the checksums, and every entry with the dataset's size."""
        for name in FILES:
            with open(self.folder / name, "rb") as file:
                crc = 0
                while data := file.read(2**24):
                    crc = zlib.crc32(data, crc)
            if crc != self.info.crc32.get(name):
                raise _damaged(
                    self.folder / name, f"has crc32 {crc}, not {self.info.crc32.get(name)}"
                )
        for first in range(0, self.info.entries, 2**20):
            starts = np.asarray(self._starts[first : first + 2**20])
            lengths = np.asarray(self._lengths[first : first + 2**20])
            if (
                (starts < 0).any()
                or (lengths < 1).any()
                or (starts + lengths > dataset_tokens).any()
            ):
                raise _damaged(self.folder, "has entries beyond its dataset")

    def row(self, index: int, dataset_tokens: int) -> tuple[Span, ...]:
        """The spans of one row. Raises DataError when they cannot be of this dataset."""
        first, stop = int(self._rows[index]), int(self._rows[index + 1])
        if 0 <= first < stop <= self.info.entries:
            starts = self._starts[first:stop].tolist()
            lengths = self._lengths[first:stop].tolist()
            spans = tuple(zip(starts, lengths, strict=True))
            if sum(lengths) <= self.info.length and all(
                start >= 0 and size > 0 and start + size <= dataset_tokens for start, size in spans
            ):
                return spans
        raise _damaged(self.folder, f"has a row {index} that cannot be")


class PackedOrder:
    """The endless order of a plan's rows. A row of k times the plan's length has k of them."""

    def __init__(self, plan: PackPlan, dataset_tokens: int, *, seed: int, name: str) -> None:
        if not plan.info.rows:
            raise DataError(f"data.sources.{name} holds no rows. Leave it out of the run.")
        self.plan, self.name, self._dataset_tokens = plan, name, dataset_tokens
        self.tokens = plan.info.rows * plan.info.length
        self._permutation = lru_cache(maxsize=4)(
            lambda epoch: Permutation(plan.info.rows, seed, name, epoch)
        )

    def start(self) -> Cursor:
        """The cursor before the first row: [rows taken, 0]."""
        return [[0, 0]]

    def take(
        self, cursor: Sequence[Sequence[int]], length: int, rows: int
    ) -> tuple[list[tuple[Span, ...]], Cursor]:
        """The next `rows` rows as spans, one for each document, and the cursor after them."""
        packs, rest = divmod(length, self.plan.info.length)
        if rest or not packs:
            raise DataError(
                f"data.sources.{self.name} is packed for a length of {self.plan.info.length}, of "
                f"which the stage's {length} is not a multiple. Pack it for this length."
            )
        n = cursor[0][0]
        taken = []
        for _ in range(rows):
            spans: tuple[Span, ...] = ()
            for number in range(n, n + packs):
                epoch, index = divmod(number, self.plan.info.rows)
                spans += self.plan.row(self._permutation(epoch)(index), self._dataset_tokens)
            n += packs
            taken.append(spans)
        return taken, [[n, 0]]

    take_once = take

    def rows_left(self, cursor: Cursor, served: int, length: int) -> int:
        """Return how many rows of `length` the first epoch still has after `served` tokens."""
        return (self.tokens - served) // length

    def epochs(self, cursor: Cursor, served: int) -> dict[str, float]:
        """Return by the source's name how many times over it has been served."""
        return {self.name: served / self.tokens}

    def served_in_words(self, served: int, length: int) -> str:
        """What was served, where no row of `length` is left."""
        return f"{served:,} of its {self.tokens:,} tokens served, no further row of {length}"

    def check(self, cursor: Any) -> Cursor:
        """The cursor, if it can be one of this order; else DataError."""
        if (
            isinstance(cursor, list)
            and len(cursor) == 1
            and isinstance(cursor[0], list)
            and len(cursor[0]) == 2
            and all(type(number) is int for number in cursor[0])
            and cursor[0][0] >= 0 == cursor[0][1]
        ):
            return [list(cursor[0])]
        raise DataError(
            f"the saved cursor of data.sources.{self.name} is not one of a packed source. "
            "Resume with the data section and the files of the run that wrote it."
        )


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}. Run `megahybrid data pack` again.")
