"""Whether the files of a source are those that a saved state was made from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megahybrid.errors import DataError
from megahybrid.printable import shortened

# Of a dataset or a plan; or by length those of the plans of which a row was taken.
Fingerprint = str | dict[str, str]


def same_files(saved: Any, now: Fingerprint | None) -> Fingerprint | None:
    """Return the part of the `saved` fingerprint that the files have now, or None for none of it.

    Of plans by length it is the lengths whose plan is the same; before the first row that is {}.
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        kept = {length: found for length, found in saved.items() if now.get(length) == found}
        return kept if kept or not saved else None
    return now if saved == now else None


def refuse_other_files(
    name: str,
    path: Path,
    saved: Any,
    now: Fingerprint,
    says: tuple[str, str] = ("as when the run began", "Restore the files, or start a new run"),
) -> None:
    """Raise DataError unless the files of source `name` are those of the `saved` fingerprint.
    `says`: who has them otherwise, and what to do about it."""
    if isinstance(saved, Mapping) != isinstance(now, Mapping):
        was, has = ("plans", "path") if isinstance(saved, Mapping) else ("path", "plans")
        raise DataError(
            f"data.sources.{name}.{has} is not what the run has read this source by ({was}). Name "
            f"{was} again, or give the new files another name."
        )
    if not (isinstance(saved, Mapping) and isinstance(now, Mapping)):
        if saved != now:
            raise DataError(
                f"data.sources.{name} at {path} has manifest {str(now)[:12]}, not "
                f"{str(saved)[:12]} {says[0]}. {says[1]}."
            )
        return
    for length, found in saved.items():
        where = f"data.sources.{name}.plans"
        if length not in now:
            raise DataError(
                f"{where} lacks '{shortened(str(length), 20)}', of which the run has read rows. "
                "Name that plan again."
            )
        if now[length] != found:
            raise DataError(
                f"{where}.{length} of {path} has fingerprint {now[length][:12]}, not "
                f"{str(found)[:12]} {says[0]}. {says[1]}."
            )
