"""The loss: how much of the inputs could not be used, in bytes on disk and rows of hub datasets."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megahybrid.data_prep.items import EMPTY, BadDocument
from megahybrid.errors import DataError

NO_CHAT = ("list of messages", "list of conversations")  # in reasons of what is no conversation
# Reasons of what is a conversation, of which nothing can be learnt.
FAULTS = (
    *("prompt only", "empty answer", "empty conversation", "unknown role", "unbalanced"),
    *("content that is", "tools are", "message that is", "message without"),
)
ENOUGH_TO_JUDGE = 10_000  # rows of a hub dataset, whose number is not known, to judge it early


class Refused(DataError):
    """The inputs are not made into datasets: another call may ask for something else."""


@dataclass(frozen=True)
class Loss:
    """Bytes on disk and rows, how many of them are lost, and the number of empty documents.

    Nothing is lost of an empty document. Bytes that are named by a header but not there count in
    both.
    """

    bytes: int = 0
    lost_bytes: int = 0
    rows: int = 0
    lost_rows: int = 0
    empty: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.bytes + other.bytes,
            self.lost_bytes + other.lost_bytes,
            self.rows + other.rows,
            self.lost_rows + other.lost_rows,
            self.empty + other.empty,
        )

    @property
    def fraction(self) -> float:
        """Share of the bytes that is lost, or of the rows where that is more."""
        return max(_share(self.lost_bytes, self.bytes), _share(self.lost_rows, self.rows))

    def __str__(self) -> str:
        parts = [f"{_percent(self.lost_bytes, self.bytes)} of the bytes on disk"] * bool(self.bytes)
        parts += [f"{_percent(self.lost_rows, self.rows)} of the rows"] * bool(self.rows)
        return " and ".join(parts) or "nothing"

    def is_sure_to_exceed(self, limit: float, bytes_in_all: int) -> bool:
        """Return whether a part of the work shows already that more than `limit` will be lost."""
        absent = 0 if not self.bytes else max(0, self.bytes - bytes_in_all)
        rows = self.rows >= ENOUGH_TO_JUDGE and self.lost_rows > limit * self.rows
        return rows or self.lost_bytes > limit * (bytes_in_all + absent)


def loss_of(size: int, rows: int | None, bad: Iterable[BadDocument], empty: int) -> Loss:
    """The loss of `size` bytes, or of so many `rows` in their stead."""
    listed = list(bad)
    lost = sum(item.size for item in listed)
    if rows is not None:
        return Loss(rows=rows, lost_rows=round(lost), empty=empty)
    absent = sum(item.absent for item in listed)
    total = round(size + absent)
    return Loss(total, min(total, round(lost)), empty=empty)


def refuse_nothing(documents: int, bad: Mapping[str, int], loss: Loss) -> None:
    """Raises Refused where there is no document at all."""
    if documents == 0:
        counted = dict(bad) | ({EMPTY: loss.empty} if loss.empty else {})
        raise Refused(f"the inputs hold no document ({_reasons(counted)}). {_way_out(bad)}")


def refuse_loss(
    bad: Mapping[str, int], loss: Loss, limit: float, listing: str, *, so_far: bool = False
) -> None:
    """Raises Refused where more than `limit` is lost. so_far: not all is read yet."""
    if loss.fraction > limit:
        missing = any("no text field" in why for why in bad) or _field(bad) == "--chat"
        field = f"Correct {_field(bad)}, or see" if missing else "See"
        raise Refused(
            f"max_bad_fraction={limit} is less than what is lost{so_far * ' so far'}: {loss} "
            f"({_reasons(bad)}). "
            f"{field} {listing}, or raise the limit: the same command then goes on."
        )


def _way_out(bad: Mapping[str, int]) -> str:
    """What to do where nothing is left, by what is wrong with most."""
    most = max(bad, key=lambda why: bad[why], default="")
    if re.fullmatch(r"longer than [0-9,]+ tokens", most):
        return "Raise --max-tokens, or keep their beginnings with --long-chats cut."
    if most.startswith(FAULTS):
        return "Correct the conversations: messages of user and assistant in turn, an answer last."
    return f"Check {_field(bad)} and the files."


def _field(bad: Mapping[str, int]) -> str:
    """The option that names the field of what was found not to be there."""
    return "--chat" if any(name in why for why in bad for name in NO_CHAT) else "--field"


def _reasons(bad: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in bad.items()) or "none bad"


def _share(lost: int, total: int) -> float:
    return lost / total if total else float(lost > 0)


def _percent(lost: int, total: int) -> str:
    share = _share(lost, total)
    shown = f"{share:.2%}" if not lost or share >= 5e-5 else "less than 0.01%"
    return f"{shown} ({lost:,} of {total:,})"
