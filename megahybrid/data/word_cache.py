"""Encoding each distinct word once: for tokenizers whose ids of a word depend on no other word.

Text repeats its words, so looking them up is several times faster than encoding them again. That is
right only where no token and no rule of the tokenizer reaches across the cut, which is read off the
tokenizer itself here; one that is not understood is not cut.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from megahybrid.data.token_file import Array

MOST_WORDS = 2**18  # kept of pieces, and of words within them, at some 200 bytes each
LONGEST_WORD = 64  # characters of a word that is kept; longer ones seldom come again

# Every pattern gives pieces that together are the text. Only a space that follows another character
# begins a piece; what a tokenizer does with it looks forwards alone.
SPACE = re.compile(r" *[^ ]+| +")
# U+2581 is sentencepiece's own sign for a space, so its runs may go on across a cut.
SPACE_SIGN = "\u2581"
# No token of `'s|'t|…| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` has a space after others.
ANY_SPACE = re.compile(r"\s*\S+|\s+")
# `[^\s\p{L}\p{N}]+[\r\n]*` has line ends after others, but no " ".
PLAIN_SPACE = re.compile(r"\s*\S+(?:[^\S ]\s*\S+)*(?:[^\S ]\s*\Z)?|\s+")
# Python counts these as white space, other libraries do not.
SEPARATORS = re.compile("[\x1c-\x1f]")

GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel
)
NOTHING = re.compile(r"(?!)")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_SPLITS = {
    rf"{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|{_REST}"
    for contractions in (_CONTRACTIONS, r"'(?i:[sdmt]|ll|ve|re)")
    for digits in ("", "{1,3}")
}


class SplitPatterns(NamedTuple):
    """The patterns by which a text may be cut.

    pieces: at some places where the tokenizer cuts, found fast; words: of an ASCII piece exactly
    what the tokenizer makes of it, where that can be said in `re` and the piece has nothing of
    `added`, which the tokenizer looks for before.
    """

    pieces: re.Pattern[str]
    words: re.Pattern[str] | None = None
    added: re.Pattern[str] = NOTHING


class WordCache:
    """Encodes texts piece by piece, through bounded tables of pieces and words already met.

    `encode` gives the ids of texts; texts in which `whole` finds anything are not cut.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[list[int]]],
        dtype: np.dtype[Any],
        cuts: SplitPatterns,
        whole: re.Pattern[str],
    ) -> None:
        self._encode, self._dtype = encode, dtype
        self._find, self._whole = cuts.pieces.findall, whole.search
        self._find_words = cuts.words.findall if cuts.words else None
        self._added = cuts.added.search
        self._pieces: dict[str, bytes] = {}
        self._words: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """Ids of each text, as the tokenizer gives them for the whole."""
        pieces = [[text] if self._whole(text) else self._find(text) for text in texts]
        raw = self._cached_ids(self._pieces, pieces, self._encode_pieces)
        return [np.frombuffer(item, self._dtype) for item in raw]

    def _cached_ids(
        self,
        kept: dict[str, bytes],
        parted: list[list[str]],
        encode_new: Callable[[list[str]], Iterable[bytes]],
    ) -> list[bytes]:
        """Return the ids of each list of strings, joined.

        `encode_new` gives those of the strings that are not yet kept.
        """
        new = list({piece for part in parted for piece in part if piece not in kept})
        if new:
            kept.update(zip(new, encode_new(new), strict=True))
        raw = [b"".join(map(kept.__getitem__, part)) for part in parted]
        for piece in new:
            if len(piece) > LONGEST_WORD:
                del kept[piece]
        if len(kept) > MOST_WORDS:
            kept.clear()
        return raw

    def _encode_pieces(self, pieces: list[str]) -> Iterable[bytes]:
        if (find := self._find_words) is None:
            return self._encode_words(pieces)
        added = self._added
        parted = [
            find(piece) if piece.isascii() and not added(piece) else [piece] for piece in pieces
        ]
        return self._cached_ids(self._words, parted, self._encode_words)

    def _encode_words(self, pieces: list[str]) -> Iterator[bytes]:
        encoded = self._encode(pieces)
        ends = np.cumsum([len(ids) for ids in encoded]) * self._dtype.itemsize
        raw = np.fromiter(chain.from_iterable(encoded), self._dtype).tobytes()
        return (raw[begin:end] for begin, end in pairwise([0, *ends.tolist()]))


def sentencepiece_splits(raw: bytes, pieces: Sequence[str]) -> SplitPatterns | None:
    """Return how texts for this model file may be cut, or None where they may not.

    Merges of a BPE are tokens, so where no token has a space after another character none reaches
    across a cut there. The normaliser must leave the text alone. (A unigram model sums in single
    precision over the whole text, and has no such places.)
    """
    trainer, normaliser = _messages(raw, 2), _messages(raw, 3)
    settings = (
        trainer.get(3, 1) == 2  # BPE
        and trainer.get(35, 0) == 1  # byte_fallback: unknown characters in a row are not one id
        and not trainer.get(24, 0)  # treat_whitespace_as_suffix
        and not normaliser.get(2, b"")  # precompiled_charsmap
        and not normaliser.get(3, 1)  # add_dummy_prefix
        and not normaliser.get(4, 1)  # remove_extra_whitespaces
        and normaliser.get(5, 1) == 1  # escape_whitespaces
    )
    crosses = re.compile(f"[^{SPACE_SIGN}]{SPACE_SIGN}").search
    return SplitPatterns(SPACE) if settings and not any(map(crosses, pieces)) else None


def sentencepiece_kinds(raw: bytes) -> list[int]:
    """Return for each piece of a model file whether it is normal (1), control (3), …"""
    pieces = (value for number, value in _fields(raw) if number == 1)
    return [dict(_fields(piece)).get(3, 1) for piece in pieces]


def _messages(raw: bytes, number: int) -> dict[int, Any]:
    """Fields by number of the last message `number` within a protobuf message."""
    found: dict[int, Any] = {}
    for field, value in _fields(raw):
        if field == number and isinstance(value, bytes):
            found = dict(_fields(value))
    return found


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message: whole numbers, or bytes."""
    position = 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = raw[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(raw):
        field, kind = divmod(number(), 8)
        if kind == 0:
            yield field, number()
            continue
        size = {1: 8, 2: -1, 5: 4}[kind]
        size = number() if size < 0 else size
        yield field, raw[position : position + size]
        position += size


def hugging_face_splits(text: str) -> SplitPatterns | None:
    """Return how texts for this tokenizer.json may be cut, or None where they may not.

    Known are byte-level BPEs with the splits of GPT-2, and of GPT-4 and its like.
    """
    value = json.loads(text)
    model, normaliser = value["model"], value.get("normalizer")
    added = [token for token in value.get("added_tokens", ()) if not token["special"]]
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or (normaliser is not None and normaliser.get("type") != "NFC")
        or any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        or any(any(map(str.isspace, token["content"])) for token in added)
    ):
        return None
    found = _splits(value.get("pre_tokenizer"))
    if found is None or not added:
        return found
    names = "|".join(re.escape(token["content"]) for token in added)
    return found._replace(added=re.compile(names))


def _splits(value: Any) -> SplitPatterns | None:
    parts = value["pretokenizers"] if value and value["type"] == "Sequence" else [value]
    digits = [part for part in parts if part and part["type"] == "Digits"]
    *splits, last = [part for part in parts if part not in digits] or [None]
    if not last or last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    regex = last.get("use_regex", True)
    if not splits:
        return SplitPatterns(ANY_SPACE, None if digits else _ascii(GPT2_SPLIT)) if regex else None
    known = all(
        part["type"] == "Split"
        and part["pattern"].get("Regex") in KNOWN_SPLITS
        and part["behavior"] == "Isolated"
        and not part["invert"]
        for part in splits
    )
    if not known or len(splits) > 1 or regex:
        return None
    return SplitPatterns(PLAIN_SPACE, None if digits else _ascii(splits[0]["pattern"]["Regex"]))


def _ascii(split: str) -> re.Pattern[str]:
    """A tokenizer's split for ASCII text, where its classes of Unicode are plain ranges."""
    inside = re.sub(
        r"\[[^\]]*\]",
        lambda found: found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"),
        split,
    )
    return re.compile(inside.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"), re.ASCII)
