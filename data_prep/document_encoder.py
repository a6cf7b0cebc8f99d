"""Encoding documents: each becomes tokens, and the keys that say where it goes."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data_prep.items import EMPTY, BadDocument, BadText, Document, LongDocument
from megahybrid.data_prep.long_text import encode_pieces, slices
from megahybrid.data_prep.unit_files import RunWriter

BATCH_CHARACTERS = 2**20
LONG_CHARACTERS = 4 * 2**20  # from here on a text is encoded in pieces


class DocumentEncoder:
    """The encoder of one unit: documents go in and are encoded in batches.

    `bad`: the documents that were left out; `empty`: how many had no text.
    """

    def __init__(self, seed: int, tokenizer: Tokenizer, writer: RunWriter) -> None:
        self.seed, self.tokenizer, self.writer = seed, tokenizer, writer
        self.bad: list[BadDocument] = []
        self.empty = 0
        self.eod = tokenizer.info.eod_id
        self.end = np.asarray([self.eod], writer.dtype)
        self.waiting: list[Document] = []
        self.characters = 0

    def leave_out(self, item: BadDocument) -> None:
        """Count an item that is no document."""
        if item.reason == EMPTY:
            self.empty += 1
        else:
            self.bad.append(item)

    def add(self, document: Document) -> None:
        """Encode a document, now or with others."""
        if len(document.text) >= LONG_CHARACTERS:
            pieces = slices(document.text)
            self.add_long(LongDocument(document.name, pieces, document.metadata, document.size))
            return
        self.waiting.append(document)
        self.characters += len(document.text)
        if self.characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encode what waits."""
        waiting, self.waiting, self.characters = self.waiting, [], 0
        if not waiting:
            return
        for document, ids in zip(
            waiting, self.tokenizer.encode_arrays([item.text for item in waiting]), strict=True
        ):
            if (ids == self.eod).any():
                self.leave_out(bad_of(document, "eod inside", document.text[:80]))
                continue
            digest = document_hash(self.seed)
            digest.update(document.text.encode())
            tokens = np.concatenate((ids, self.end))
            self.writer.add(tokens, document_keys(digest), document.metadata)

    def add_long(self, document: LongDocument) -> None:
        """Encodes a document piece by piece, straight to disk; takes it back if it is bad."""
        self.flush()
        digest = document_hash(self.seed)

        def hashed() -> Iterable[str]:
            for piece in document.pieces:
                digest.update(piece.encode())
                yield piece

        begin = self.writer.begin_long()
        try:
            for ids in encode_pieces(self.tokenizer, hashed()):
                if (ids == self.eod).any():
                    raise BadText("eod inside")
                self.writer.add_piece(ids)
        except (BadText, UnicodeEncodeError) as error:
            reason = str(error) if isinstance(error, BadText) else "lone surrogate"
            self.writer.drop_long(begin)
            absent = error.absent if isinstance(error, BadText) else 0.0
            self.leave_out(replace(bad_of(document, reason, ""), absent=absent))
            return
        self.writer.add_piece(self.end)
        self.writer.end_long(begin, document_keys(digest), document.metadata)


def document_hash(seed: int) -> hashlib.blake2b:
    """The keyed hash that a document's content is fed to."""
    return hashlib.blake2b(digest_size=16, key=str(seed).encode())


def document_keys(digest: hashlib.blake2b) -> tuple[int, int]:
    """Key and split of a document."""
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def bad_of(
    document: Document | LongDocument, reason: str, beginning: str, *, size: float | None = None
) -> BadDocument:
    """A document that cannot be used after all; size: the bytes lost, if not all of its own."""
    file, _, offset = document.name.rpartition(":")
    lost = document.size if size is None else size
    return BadDocument(file, int(offset), reason, beginning.encode(), lost)
