"""A source with a plan for each length: rows of one dataset, packed apart for each length, in an
order of their own with a cursor of their own.

The cursor of such a source is {length: cursor of its plan}, of those lengths alone of which a row
was taken: a length that is added for a later stage changes nothing of the steps before it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megahybrid.config.base import few
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import MANIFEST_NAME
from megahybrid.data.order import Cursor, Span
from megahybrid.data.packing import PLAN_NAME, PackedOrder, PackPlan
from megahybrid.errors import DataError
from megahybrid.printable import shortened

Plans = Mapping[int, PackPlan]
Cursors = dict[str, Cursor]  # JSON has no keys that are numbers


def open_plans(
    name: str, paths: Mapping[int, str], vocab_size: int | None = None
) -> tuple[TokenDataset, Plans]:
    """Return the dataset that the plans of source `name` are of, and the plans by length.

    Raises DataError, a line for each plan that is none, is of another length or another dataset, or
    cuts documents whose targets are marked.
    """
    plans, lines = _opened(name, sorted(paths.items()))
    if lines:
        raise DataError(*lines)
    first = next(iter(plans.values()))
    dataset = TokenDataset(first.dataset, vocab_size=vocab_size)
    first.check_dataset(dataset.path, dataset.fingerprint)
    if dataset.masked and (lines := _cuts(name, plans)):
        raise DataError(*lines)
    return dataset, plans


def _opened(name: str, paths: Sequence[tuple[int, str]]) -> tuple[dict[int, PackPlan], list[str]]:
    plans: dict[int, PackPlan] = {}
    lines = []
    for length, path in paths:
        field = _field(name, length)
        shown = f"{field}={shortened(path, 200)}"
        if not (Path(path) / PLAN_NAME).exists():
            data = path if (Path(path) / MANIFEST_NAME).exists() else "DATASET"
            lines.append(
                f"{shown} is no plan (no {PLAN_NAME} in it). Make one with `megahybrid data pack "
                f"{data} --length {length} --output PLAN`."
            )
            continue
        plan = PackPlan(Path(path))
        if plan.info.length != length:
            lines.append(
                f"{shown} is packed for a length of {plan.info.length}. Name it under that length, "
                f"or pack one for {length}."
            )
        if plans:
            first = next(iter(plans))
            if plan.info.dataset_fingerprint != plans[first].info.dataset_fingerprint:
                lines.append(
                    f"{shown} is of another dataset ({plan.dataset}) than {_field(name, first)} "
                    f"({plans[first].dataset}). Give each dataset a source of its own."
                )
        plans[length] = plan
    return plans, lines


def _cuts(name: str, plans: Plans) -> list[str]:
    """A line for each plan that cuts a conversation, where no turn would know of it."""
    return [
        f"{_field(name, length)}={plan.folder} has {plan.cuts:,} cuts inside documents whose "
        "targets are marked, perhaps inside an answer. Pack it with "
        f"--method best_fit --max-document-tokens {length}: longer ones are a longer length's."
        for length, plan in plans.items()
        if plan.cuts
    ]


def _field(name: str, length: int | str) -> str:
    return f"data.sources.{name}.plans.{length}"


class LengthPlansOrder:
    """The endless order of the rows of each length: that of its own plan, as of a source that is
    called `NAME.plans.LENGTH` and stands alone."""

    def __init__(self, plans: Plans, dataset_tokens: int, *, seed: int, name: str) -> None:
        self.name = name
        self.orders = {
            length: PackedOrder(plan, dataset_tokens, seed=seed, name=f"{name}.plans.{length}")
            for length, plan in plans.items()
        }

    def start(self) -> Cursors:
        """The cursor before the first row: of no length yet."""
        return {}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each plan by length."""
        return {str(n): order.plan.fingerprint for n, order in self.orders.items()}

    def read_from(self, cursor: Mapping[str, Cursor]) -> dict[str, str]:
        """The fingerprints of the plans that a cursor stands in."""
        return {length: self.fingerprints[length] for length in cursor}

    def take(
        self, cursor: Mapping[str, Cursor], length: int, rows: int
    ) -> tuple[list[tuple[Span, ...]], Cursors]:
        """The next `rows` rows of the plan for `length`, and the cursor after them."""
        order = self._order(length)
        taken, after = order.take(cursor.get(str(length), order.start()), length, rows)
        return taken, {**cursor, str(length): after}

    take_once = take

    def rows_left(self, cursor: Mapping[str, Cursor], served: int, length: int) -> int:
        """Return how many rows of `length` no row was taken of yet, the first time through."""
        return max(0, self._order(length).plan.info.rows - self._taken(cursor, length))

    def epochs(self, cursor: Mapping[str, Cursor], served: int) -> dict[str, float]:
        """Return how many times over each plan of which a row was taken has been served."""
        return {
            f"{self.name}.plans.{length}": self._taken(cursor, length)
            / self.orders[int(length)].plan.info.rows
            for length in cursor
            if int(length) in self.orders
        }

    def served_in_words(self, served: int, length: int) -> str:
        """What was served, where no row of `length` is left."""
        return f"all {self._order(length).plan.info.rows:,} rows of its plan for {length} served"

    def _taken(self, cursor: Mapping[str, Cursor], length: int | str) -> int:
        found = cursor.get(str(length))
        return found[0][0] if found else 0

    def _order(self, length: int) -> PackedOrder:
        if length not in self.orders:
            raise DataError(
                f"data.sources.{self.name}.plans has none for the stage's {length} "
                f"({few(map(str, sorted(self.orders)))}). Make one with `megahybrid data pack`."
            )
        return self.orders[length]

    def check(self, cursor: Any) -> Cursors:
        """The cursor, if it can be one of this order; else DataError."""
        if not isinstance(cursor, dict):
            raise DataError(
                f"the saved cursor of data.sources.{self.name} is not one of plans by length. "
                "Resume with the data section and the files of the run that wrote it."
            )
        found = {}
        for length, inner in cursor.items():
            order = self.orders.get(int(length)) if str(length).isdecimal() else None
            if order is None:
                raise DataError(
                    f"data.sources.{self.name}.plans lacks '{shortened(str(length), 20)}', of "
                    "which the run has read rows. Name that plan again."
                )
            found[str(length)] = order.check(inner)
        return found
