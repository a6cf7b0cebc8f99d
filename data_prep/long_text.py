"""Encoding a text of any length in pieces, so that the ids are those of the whole."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from megahybrid.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 2**20
WINDOW = 256  # characters on both sides of a cut that must encode to the same ids cut and uncut
CANDIDATES = 64


@dataclass(frozen=True)
class _Cut:
    """The left piece ends before `stop`, the right one begins at `resume`."""

    stop: int
    resume: int


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Ids of the text that `pieces` are together, a piece of about PIECE_CHARACTERS at a time.

    It is cut where the ids around the cut are the same with and without it: before a word where
    there are any (no token of the usual tokenizers reaches across), else where CANDIDATES tries
    find such a place. Only a text without any (one letter a million times) is cut all the same: it
    still decodes to itself.
    """
    text = ""
    for piece in pieces:
        text += piece
        while len(text) >= 2 * PIECE_CHARACTERS:
            cut = _find_cut(tokenizer, text, PIECE_CHARACTERS)
            yield tokenizer.encode([text[: cut.stop]])[0]
            text = text[cut.resume :]
    if text:
        yield tokenizer.encode([text])[0]


def slices(text: str) -> Iterator[str]:
    """A text in pieces of PIECE_CHARACTERS."""
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def _find_cut(tokenizer: Tokenizer, text: str, near: int) -> _Cut:
    stop = min(len(text) - WINDOW, near + 2**16)
    words = (
        place
        for place in range(near, stop)
        if text[place] in " \n" and not text[place - 1].isspace() and not text[place + 1].isspace()
    )
    for place in chain(islice(words, CANDIDATES), range(near, min(stop, near + CANDIDATES))):
        left, right = text[place - WINDOW : place], text[place : place + WINDOW]
        tries = [left + right, left, right]
        # A tokenizer that puts a space before every text must not be given that space twice.
        drop = right.startswith(" ")
        whole, *parts = tokenizer.encode(tries + [right[1:]] * drop)
        if whole == parts[0] + parts[1]:
            return _Cut(place, place)
        if drop and whole == parts[0] + parts[2]:
            return _Cut(place, place + 1)
    return _Cut(near, near)
