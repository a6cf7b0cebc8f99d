"""Writing shards: tokens stream to disk, the index and the manifest follow when they are known."""

import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megahybrid.data.document_metadata import NOTHING, MetadataWriter
from megahybrid.data.manifest import (
    BLOCK_BYTES,
    MANIFEST_NAME,
    LengthBin,
    Manifest,
    ShardEntry,
    TokenizerInfo,
    sync_folder,
    write_durably,
)
from megahybrid.data.target_mask import MaskBits
from megahybrid.data.token_file import Array, index_bytes
from megahybrid.errors import DataError

SHARD_TOKENS = 2**30


def check_shard_tokens(shard_tokens: int) -> None:
    """Raises DataError where the format cannot hold shards of this size."""
    if not 1 <= shard_tokens < 2**31:
        raise DataError(
            f"shard_tokens={shard_tokens} is not from 1 to {2**31 - 1} (lengths are 32 bits). "
            f"Use {SHARD_TOKENS} or less."
        )


class TokenWriter:
    """Writes documents into a new folder; `close` publishes the manifest, last.

    A document lies in one shard. One longer than `shard_tokens` gets a shard of its own, as several
    sequences of at most `shard_tokens` under one document index entry. Used as a context manager,
    an exception leaves no manifest, so no reader takes the folder for complete.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: TokenizerInfo,
        *,
        sources: Sequence[Mapping[str, Any]] = (),
        command: str = "",
        shard_tokens: int = SHARD_TOKENS,
        block_bytes: int = BLOCK_BYTES,
        has_metadata: bool = False,
    ) -> None:
        """Make the folder.

        has_metadata: documents come with metadata (JSON objects), kept beside the tokens.
        """
        check_shard_tokens(shard_tokens)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise DataError(f"{self.folder} is not empty. Name a new folder, or remove this one.")
        self.tokenizer, self.shard_tokens, self.block_bytes = tokenizer, shard_tokens, block_bytes
        self._sources, self._command = tuple(map(dict, sources)), command
        self._dtype, self._has_metadata = np.dtype(tokenizer.dtype), has_metadata
        self._shards: list[ShardEntry] = []
        self._histogram = np.zeros((64, 2), np.int64)
        self._shard: _Shard | None = None

    def add(
        self,
        tokens: Array | Sequence[int],
        counts: Array | Sequence[bool] | None = None,
        *,
        eod_counts: bool = False,
    ) -> None:
        """Appends one document; eod is added here and must not be in `tokens`.

        `counts` says of each of `tokens` whether it counts as a target, `eod_counts` the same of
        eod: where an answer ends, its end is to be learnt. Without `counts` all count, eod too.
        """
        body = np.asarray(tokens, dtype=np.int64)
        if counts is not None:
            if len(counts) != len(body):
                raise DataError(
                    f"counts has {len(counts)} entries, not one per token ({len(body)}, eod left "
                    "out). Say with eod_counts whether eod counts."
                )
            counts = np.append(np.asarray(counts, bool), eod_counts)
        lengths = np.asarray([len(body) + 1], np.int64)
        self.add_documents(np.append(body, self.tokenizer.eod_id), lengths, counts)

    def add_documents(
        self,
        tokens: Array,
        lengths: Array,
        counts: Array | None = None,
        metadata_lines: Sequence[bytes] | None = None,
    ) -> None:
        """Appends documents that lie one after another in `tokens`, each ending with eod.

        `counts` says of each token whether it counts as a target; without it all do. Raises
        DataError when an id is beyond the vocabulary or eod is anywhere but at the ends.
        """
        lengths = np.asarray(lengths, np.int64)
        if len(lengths) == 0:
            return
        self._check(tokens, lengths)
        for name, given, unit, number in (
            ("counts", counts, "token", len(tokens)),
            ("metadata_lines", metadata_lines or None, "document", len(lengths)),
        ):
            if given is not None and len(given) != number:
                raise DataError(f"{name} has {len(given)} entries, not one per {unit} ({number}).")
        _check_metadata(metadata_lines or ())
        bins = np.frexp(lengths)[1] - 1
        self._histogram[:, 0] += np.bincount(bins, minlength=64)
        # Sums of one call stay far below 2**53, so counting in float64 is exact.
        self._histogram[:, 1] += np.bincount(bins, lengths, minlength=64).astype(np.int64)
        tokens = tokens.astype(self._dtype, copy=False)
        ends = np.cumsum(lengths)
        first = begin = 0
        while first < len(lengths):
            room = self.shard_tokens - (self._shard.tokens if self._shard else 0)
            stop = int(np.searchsorted(ends, begin + room, side="right"))
            if stop <= first:
                if self._shard is not None:
                    self._finish_shard()
                    continue
                stop = first + 1  # longer than any shard: alone in one
            shard = self._shard = self._shard or _Shard(self, len(self._shards))
            end = int(ends[stop - 1])
            shard.append(tokens[begin:end], lengths[first:stop])
            shard.mask.add(end - begin, None if counts is None else counts[begin:end])
            if self._has_metadata:
                shard.add_metadata(
                    metadata_lines[first:stop] if metadata_lines else [NOTHING] * (stop - first)
                )
            first, begin = stop, end

    def add_long(
        self,
        pieces: Iterable[Array],
        length: int,
        metadata: bytes = NOTHING,
        counts: Iterable[Array] | None = None,
    ) -> None:
        """Appends one document of `length` tokens, eod included, that comes in pieces.

        `counts` are as `add_documents` has them, in pieces as large as those of the tokens. Raises
        DataError as `add_documents` does.
        """
        _check_metadata([metadata])
        if self._shard is not None and self._shard.tokens + length > self.shard_tokens:
            self._finish_shard()
        shard = self._shard = self._shard or _Shard(self, len(self._shards))
        done = 0
        marked = zip(pieces, repeat(None) if counts is None else counts, strict=counts is not None)
        for tokens, counted in marked:
            if not len(tokens):
                continue
            done += len(tokens)
            last = done == length
            self._check_ids(tokens)
            self._check_eod(tokens, np.asarray([len(tokens)][: int(last)], np.int64))
            shard.write(tokens)
            shard.mask.add(len(tokens), counted)
        if done != length:
            raise DataError(f"document lengths sum to {length}, not {done} (tokens).")
        shard.enter(np.asarray([length], np.int64))
        shard.add_metadata([metadata or NOTHING])
        self._histogram[length.bit_length() - 1] += (1, length)

    def _check(self, tokens: Array, lengths: Array) -> None:
        if int(lengths.sum()) != len(tokens) or int(lengths.min()) < 1:
            raise DataError(f"document lengths sum to {lengths.sum()}, not {len(tokens)} (tokens).")
        self._check_ids(tokens)
        self._check_eod(tokens, np.cumsum(lengths))

    def _check_ids(self, tokens: Array) -> None:
        vocab_size = self.tokenizer.vocab_size
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside vocab_size={vocab_size}. "
                "Tokenize with the tokenizer that the dataset names."
            )

    def _check_eod(self, tokens: Array, ends: Array) -> None:
        eod = self.tokenizer.eod_id
        if not np.array_equal(np.flatnonzero(tokens == eod) + 1, ends):
            raise DataError(
                f"eod_id={eod} must be at the end of every document and nowhere else. "
                "Encode text without special tokens."
            )

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.finish())
            self._shard = None

    def close(self) -> Manifest:
        """Finishes the last shard and publishes the manifest."""
        self._finish_shard()
        manifest = Manifest(
            tokenizer=self.tokenizer,
            dtype=self._dtype.name,
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            length_histogram=tuple(
                LengthBin(min_tokens=2**power, documents=int(documents), tokens=int(tokens))
                for power, (documents, tokens) in enumerate(self._histogram)
                if documents
            ),
            shards=tuple(self._shards),
            sources=self._sources,
            command=self._command,
        )
        write_durably(self.folder / MANIFEST_NAME, manifest.dump().encode())
        self.manifest = manifest
        return manifest

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.file.close()


def _check_metadata(metadata_lines: Sequence[bytes]) -> None:
    for metadata in metadata_lines:
        if b"\n" in metadata:
            raise DataError(
                f"metadata {metadata[:60]!r} is not one line. Write each as one JSON object."
            )


class _Shard:
    """The shard being written."""

    def __init__(self, writer: TokenWriter, number: int) -> None:
        self.folder, self.name = writer.folder, f"shard-{number:05d}"
        self.dtype, self.block_bytes = writer._dtype, writer.block_bytes
        self.sequence_tokens = writer.shard_tokens
        self.file: BinaryIO = open(self.folder / f"{self.name}.bin.tmp", "wb")  # noqa: SIM115
        self.tokens = 0
        self.lengths, self.document_index = array("i"), array("q", [0])
        self.checksums: list[int] = []
        self.crc, self.crc_bytes = 0, 0
        # Tokens written at a time and which of them count; None: all. Held until the shard ends.
        self.mask = MaskBits()
        has_metadata = writer._has_metadata
        self.metadata_writer = (
            MetadataWriter(self.folder / f"{self.name}.jsonl") if has_metadata else None
        )

    def append(self, tokens: Array, lengths: Array) -> None:
        self.write(tokens)
        self.enter(lengths)

    def write(self, tokens: Array) -> None:
        packed = np.ascontiguousarray(tokens).astype(self.dtype.newbyteorder("<"), copy=False)
        data = packed.data.cast("B")
        self.file.write(data)
        self._checksum(data)
        self.tokens += len(tokens)

    def add_metadata(self, metadata_lines: Sequence[bytes]) -> None:
        """Add one line of metadata for each of the documents just written."""
        if self.metadata_writer is not None:
            self.metadata_writer.add(metadata_lines)

    def enter(self, lengths: Array) -> None:
        """Enters documents, whose tokens are written, into the index."""
        if int(lengths.max()) <= self.sequence_tokens:
            first = len(self.lengths)
            self.lengths.frombytes(lengths.astype(np.int32).tobytes())
            entries = np.arange(first + 1, first + len(lengths) + 1, dtype=np.int64)
            self.document_index.frombytes(entries.tobytes())
            return
        rest = int(lengths[0])
        while rest:
            self.lengths.append(min(rest, self.sequence_tokens))
            rest -= self.lengths[-1]
        self.document_index.append(len(self.lengths))

    def _checksum(self, data: memoryview) -> None:
        while len(data):
            part = data[: self.block_bytes - self.crc_bytes]
            self.crc = zlib.crc32(part, self.crc)
            self.crc_bytes += len(part)
            data = data[len(part) :]
            if self.crc_bytes == self.block_bytes:
                self.checksums.append(self.crc)
                self.crc = self.crc_bytes = 0

    def finish(self) -> ShardEntry:
        if self.crc_bytes:
            self.checksums.append(self.crc)
        self._publish(self.file, f"{self.name}.bin")
        index = open(self.folder / f"{self.name}.idx.tmp", "wb")  # noqa: SIM115
        for part in index_bytes(
            self.dtype.name,
            np.frombuffer(self.lengths, np.int32),
            np.frombuffer(self.document_index, np.int64),
        ):
            index.write(part)
        self._publish(index, f"{self.name}.idx")
        return ShardEntry(
            bin=f"{self.name}.bin",
            idx=f"{self.name}.idx",
            documents=len(self.document_index) - 1,
            tokens=self.tokens,
            bytes=self.tokens * self.dtype.itemsize,
            block_bytes=self.block_bytes,
            crc32=tuple(self.checksums),
            mask_crc32=self._finish_mask(),
            notes_crc32=self.metadata_writer.finish() if self.metadata_writer else None,
        )

    def _finish_mask(self) -> int | None:
        data = self.mask.finish()
        if data is None:
            return None
        write_durably(self.folder / f"{self.name}.mask", data)
        return zlib.crc32(data)

    def _publish(self, file: BinaryIO, name: str) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(self.folder / f"{name}.tmp", self.folder / name)
        sync_folder(self.folder)
