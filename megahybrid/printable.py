"""Text of files and names as a terminal may show it."""

import unicodedata

# Marks that turn the direction of what follows: a name could show as another.
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, *, lines: bool = False) -> str:
    """Return text with control characters written as escapes; `lines` keeps line breaks and tabs.

    A control character, a line or paragraph separator, a mark of direction and a byte that was no
    UTF-8 (a lone surrogate) become `\\n`, `\\x1b`, `\\u2028` and the like: text of a file moves no
    cursor, sets no title, begins no line and can always be encoded.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(character if character in kept else _escaped(character) for character in text)


def shortened(text: str, most: int = 80) -> str:
    """Return printable text of at most `most` characters.

    A longer text loses its middle, because a path is told by both of its ends.
    """
    text = printable(text)
    if len(text) <= most:
        return text
    tail = (most - 3) // 2
    return text[: most - 3 - tail] + "..." + text[-tail:]


def _escaped(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNS:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
