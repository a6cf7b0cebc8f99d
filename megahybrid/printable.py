"""Text that others wrote, made fit to be shown: what would act instead of being read is escaped."""

import re

# C0 and C1 controls and DEL move a terminal's cursor or change its state; the controls of writing
# direction make a line read as another one; half a surrogate pair cannot be encoded at all.
_ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_ACTING_ON_A_PAGE = re.compile(_ACTING.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def printable(text: str, *, lines: bool = False) -> str:
    """Return text with control characters written as escapes; `lines` keeps its line breaks and
    tabs."""
    return (_ACTING_ON_A_PAGE if lines else _ACTING).sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
