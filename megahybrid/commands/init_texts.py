"""What a folder of text holds, looked at before anything is made of it: bytes, scripts, lengths."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from megahybrid.data_prep.document_encoder import document_hash, document_keys
from megahybrid.data_prep.documents import BadText, Document, Item, LongDocument, read_unit
from megahybrid.data_prep.survey import survey
from megahybrid.errors import DataError
from megahybrid.printable import shortened

LOOK_BYTES = 64 * 2**20
# So few documents are held out one by one: a share drawn by their hashes may take none of them, or
# a third of the text.
FEW_DOCUMENTS = 200
SEEDS = 64
LEAST_HELD_OUT, MOST_HELD_OUT = 0.01, 0.12  # of the text

# Where the letters of a script begin, by Unicode's blocks; what no name stands for is no letter.
BLOCKS = (
    (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"), (0x007B, ""),
    (0x00C0, "Latin"), (0x0250, ""), (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0530, "Armenian"),
    (0x0590, "Hebrew"), (0x0600, "Arabic"), (0x0700, "other"), (0x0750, "Arabic"),
    (0x0780, "other"), (0x0900, "Devanagari"), (0x0980, "Bengali"), (0x0A00, "other"),
    (0x0B80, "Tamil"), (0x0C00, "Telugu"), (0x0C80, "other"), (0x0E00, "Thai"), (0x0E80, "other"),
    (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "other"), (0x1E00, "Latin"),
    (0x1F00, "Greek"), (0x2000, ""), (0x2C00, "other"), (0x3000, ""), (0x3040, "Kana"),
    (0x3100, "other"), (0x3400, "Han"), (0xA000, "other"), (0xAC00, "Hangul"), (0xD7B0, ""),
    (0xF900, "Han"), (0xFB00, "other"), (0xFE00, ""), (0xFE70, "Arabic"), (0xFF00, ""),
    (0xFF66, "Kana"), (0xFFA0, "Hangul"), (0xFFE0, ""), (0x10000, "other"), (0x1F000, ""),
    (0x20000, "Han"), (0x323B0, ""),
)  # fmt: skip
# Scripts whose signs are syllables or words: a token holds one or two of them.
SYLLABLES = ("Han", "Kana", "Hangul")
_STARTS = np.asarray([start for start, _ in BLOCKS])


@dataclass(frozen=True)
class HeldOut:
    """A share of the documents that `tokenize` takes apart with this seed, and what it is."""

    fraction: float
    seed: int
    documents: int
    share: float  # of the text


@dataclass(frozen=True)
class Texts:
    """What was found; where a part of much text was looked at, the rest in its proportion."""

    files: int
    bytes: int
    documents: int
    characters: int
    scripts: dict[str, float]  # shares of the letters, the largest first
    lengths: tuple[int, ...]  # characters of the documents that were looked at, the shortest first
    signs: int  # different characters
    words: int  # different words
    whole: bool
    held_out: HeldOut | None

    @property
    def median(self) -> int:
        """Characters of the middle document."""
        return int(statistics.median(self.lengths))

    @property
    def longest(self) -> int:
        """Characters of the longest document that was looked at."""
        return self.lengths[-1]

    def characters_per_token(self, vocab_size: int) -> float:
        """An estimate for a BPE vocabulary that is trained on this text.

        English novels have 2.7 characters at 1,024 tokens, 3.5 at 4,096 and 4.4 at 16,384; of
        scripts whose signs are syllables or words a token holds 1 to 1.5.
        """
        syllables = sum(self.scripts.get(name, 0.0) for name in SYLLABLES)
        doublings = np.log2(vocab_size) - 10
        letters = min(2.7 + 0.38 * doublings, 4.6)
        signs = 1.0 + 0.08 * max(0.0, doublings)
        return float(1 / ((1 - syllables) / letters + syllables / signs))

    def tokens(self, vocab_size: int) -> int:
        """An estimate of all tokens, an end of document for each included."""
        return int(self.characters / self.characters_per_token(vocab_size)) + self.documents


def look(folder: str) -> Texts:
    """Look at the documents of a folder, all of them up to LOOK_BYTES of text.

    Raises DataError where there is no text in it.
    """
    try:
        found = survey([folder])
    except DataError as error:
        # What it advises are options of the commands that come later.
        wrong = str(error).partition(" Narrow it by")[0].partition(" Correct the path")[0]
        raise DataError(f"{wrong} Name a folder of text (--data).") from None
    units = [unit for source in found.units() for unit in source]
    size = sum(file.size for file in found.files)
    # Another order than that of the names, in which kinds of text lie together.
    units.sort(key=lambda unit: hashlib.blake2b(str(unit.ranges[0].path).encode()).digest())
    texts: list[str] = []
    looked = held = 0.0
    for item in chain.from_iterable(map(read_unit, units)):
        text = _text(item)
        read = len(text.encode())
        looked += min(item.size, read) if isinstance(item, LongDocument) else item.size
        if text and not text.isspace():
            texts.append(text)
            held += read
        if held >= LOOK_BYTES:
            break
    if not texts:
        raise DataError(
            f"--data={shortened(folder, 200)} holds no document with text in it. Name a folder of "
            "text files or .jsonl (`megahybrid data tokenize --help` says what is read)."
        )
    whole = held < LOOK_BYTES
    return _described(texts, len(found.files), 1.0 if whole else max(1.0, size / looked), whole)


def _text(item: Item) -> str:
    """A document's text, of a long one as much as is looked at; nothing of a bad one."""
    if isinstance(item, Document):
        return item.text
    if not isinstance(item, LongDocument):
        return ""
    pieces, size = [], 0
    try:
        for piece in item.pieces:
            pieces.append(piece)
            size += len(piece)
            if size >= LOOK_BYTES:
                break
    except BadText:
        return ""
    return "".join(pieces)


def _described(texts: Sequence[str], files: int, scale: float, whole: bool) -> Texts:
    counts: Counter[str] = Counter()
    signs: set[int] = set()
    words: set[str] = set()
    for text in texts:
        points = np.frombuffer(text.encode("utf-32-le", "replace"), "<u4")
        blocks = np.bincount(np.searchsorted(_STARTS, points, side="right") - 1)
        for index in np.flatnonzero(blocks):
            counts[BLOCKS[index][1]] += int(blocks[index])
        signs.update(np.unique(points).tolist())
        words.update(text.split())
    del counts[""]
    letters = sum(counts.values())
    return Texts(
        files=files,
        bytes=int(scale * sum(len(text.encode()) for text in texts)),
        documents=int(scale * len(texts)),
        characters=int(scale * sum(map(len, texts))),
        scripts={name: count / letters for name, count in counts.most_common()},
        lengths=tuple(sorted(map(len, texts))),
        signs=len(signs),
        words=len(words),
        whole=whole,
        held_out=_held_out(texts, scale),
    )


def _held_out(texts: Sequence[str], scale: float) -> HeldOut | None:
    """The documents to hold out: of many a share, of few the ones that a seed draws. None where
    that would take too much of the text."""
    if len(texts) > FEW_DOCUMENTS:
        fraction = max(0.001, round(min(0.02, 200 / (scale * len(texts))), 3))
        return HeldOut(fraction, 0, round(fraction * scale * len(texts)), fraction)
    total = sum(map(len, texts))
    for seed in range(SEEDS):
        draws = sorted((drawn(seed, text), len(text)) for text in texts)
        taken = 0
        for number, ((draw, length), (after, _)) in enumerate(pairwise(draws), start=1):
            taken += length
            # Rounded up to what one writes, and still short of the next document.
            fraction = round(draw + 0.002, 3)
            if LEAST_HELD_OUT <= taken / total <= MOST_HELD_OUT and draw < fraction < after:
                return HeldOut(fraction, seed, number, taken / total)
    return None


def drawn(seed: int, text: str) -> float:
    """Where the hash of `tokenize` puts a document, from 0 to 1."""
    digest = document_hash(seed)
    digest.update(text.encode())
    return document_keys(digest)[1] / 2**64
