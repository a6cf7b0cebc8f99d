"""Encoding a text of any length in pieces, so that the ids are those of the whole."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from megahybrid.data.token_file import Array
from megahybrid.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 2**16  # sentencepiece needs twice as long per character at a million
SLICE_CHARACTERS = 2**20
PIECES = 16  # encoded in one call
WINDOW = 256  # characters on both sides of a cut that must encode to the same ids cut and uncut
CANDIDATES = 64


@dataclass(frozen=True)
class _Cut:
    """The left piece ends before `stop`, the right one begins at `resume`."""

    stop: int
    resume: int


def encode_pieces(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Array]:
    """Ids of the text that `texts` are together, a piece of about PIECE_CHARACTERS at a time.

    It is cut where the ids around the cut are the same with and without it: before a word where
    there are any (no token of the usual tokenizers reaches across), else where CANDIDATES tries
    find such a place. Only a text without any (one letter a million times) is cut all the same: it
    still decodes to itself.
    """
    pieces = cut_text(tokenizer, texts)
    while some := list(islice(pieces, PIECES)):
        yield from tokenizer.encode_arrays(some)


def cut_text(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """The pieces that a long text is encoded in. What is held does not grow with the text."""
    held, begin = "", 0
    for text in texts:
        held, begin = held[begin:] + text, 0
        while len(held) - begin >= 2 * PIECE_CHARACTERS:
            cut = _find_cut(tokenizer, held, begin + PIECE_CHARACTERS)
            yield held[begin : cut.stop]
            begin = cut.resume
    if begin < len(held):
        yield held[begin:]


def slices(text: str) -> Iterator[str]:
    """A text in slices of SLICE_CHARACTERS."""
    for start in range(0, len(text), SLICE_CHARACTERS):
        yield text[start : start + SLICE_CHARACTERS]


def _find_cut(tokenizer: Tokenizer, text: str, near: int) -> _Cut:
    stop = min(len(text) - WINDOW, near + PIECE_CHARACTERS // 2)
    words = (
        position
        for position in range(near, stop)
        if text[position] in " \n"
        and not text[position - 1].isspace()
        and not text[position + 1].isspace()
    )
    for position in chain(islice(words, CANDIDATES), range(near, min(stop, near + CANDIDATES))):
        left, right = text[position - WINDOW : position], text[position : position + WINDOW]
        tries = [left + right, left, right]
        # A tokenizer that puts a space before every text must not be given that space twice.
        drop = right.startswith(" ")
        whole, *parts = tokenizer.encode(tries + [right[1:]] * drop)
        if whole == parts[0] + parts[1]:
            return _Cut(position, position)
        if drop and whole == parts[0] + parts[2]:
            return _Cut(position, position + 1)
    return _Cut(near, near)
