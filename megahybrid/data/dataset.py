"""`TokenDataset`: all shards of one source as one long row of tokens, never loaded whole."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.data.document_metadata import DocumentMetadata
from megahybrid.data.integrity import BlockChecks, UnchangedFiles, ends_crc
from megahybrid.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from megahybrid.data.packing import PLAN_NAME, PackPlan
from megahybrid.data.shard_files import ShardFiles
from megahybrid.data.target_mask import TargetMask, mask_path
from megahybrid.data.token_file import Array, ShardIndex
from megahybrid.errors import DataError

CHECKED_INDEX_BYTES = 2**28  # indexes up to this size in sum are read and checked at open (0.3 s)


class TokenDataset:
    """A folder prepared by `megahybrid data tokenize`, or plain Megatron files (no manifest).

    `path` is the folder, or one `.bin`/`.idx` or their common prefix, or the folder of a plan.
    `vocab_size` is the model's: a dataset with a larger one is refused, and a file without a
    manifest has no other. `eod_id` is only for files without a manifest; without it their document
    boundaries come from the index.

    Open costs memory and time in proportion to the number of shards; indexes of more than
    CHECKED_INDEX_BYTES in sum are only checked at both ends (`verify_dataset` reads everything).
    Of the checksums a few are tried at open, others while reading (`BlockChecks`).
    Raises DataError for whatever is missing, truncated, damaged or does not agree.
    """

    def __init__(
        self, path: str | Path, *, vocab_size: int | None = None, eod_id: int | None = None
    ) -> None:
        self.path = Path(path)
        self.plan: PackPlan | None = None
        if (self.path / PLAN_NAME).exists():
            self.plan = PackPlan(self.path)
            self.path = self.plan.dataset
        self.manifest: Manifest | None = None
        if (self.path / MANIFEST_NAME).exists():
            self.manifest, self.fingerprint = read_manifest(self.path)
            shards = self._listed_shards(self.manifest)
            tokenizer = self.manifest.tokenizer
            if vocab_size is not None and tokenizer.vocab_size > vocab_size:
                raise DataError(
                    f"model.vocab_size={vocab_size} is smaller than the tokenizer's of {self.path} "
                    f"({tokenizer.vocab_size}). Use model.vocab_size={tokenizer.vocab_size}."
                )
            self.vocab_size = tokenizer.vocab_size
            self.eod_id: int | None = tokenizer.eod_id
        else:
            shards = self._found_shards()
            self.fingerprint = _fingerprint(shards)
            if vocab_size is None:
                raise DataError(
                    f"{self.path} has no {MANIFEST_NAME}, so its vocabulary is unknown. "
                    "Tell it (--vocab-size), or prepare the data with `megahybrid data tokenize`."
                )
            self.vocab_size, self.eod_id = vocab_size, eod_id
        if self.plan is not None:
            self.plan.check_dataset(self.path, self.fingerprint)
            self.fingerprint = self.plan.fingerprint
        self.shards = [shard for shard in shards if shard.tokens]
        if sum(20 * shard.sequences for shard in self.shards) <= CHECKED_INDEX_BYTES:
            for shard in self.shards:
                shard.check_contents()
        self._masks = _open_masks(self.shards, self.manifest)
        self.masked = any(self._masks)  # whether a shard says which of its targets count
        entries = {} if self.manifest is None else {e.bin: e for e in self.manifest.shards}
        self._metadata = [
            DocumentMetadata(shard, crc32)
            if (entry := entries.get(shard.bin_path.name)) is not None
            and (crc32 := entry.notes_crc32) is not None
            else None
            for shard in self.shards
        ]
        self.has_metadata = any(
            self._metadata
        )  # whether more than tokens is known of the documents
        self.documents = sum(shard.documents for shard in self.shards)
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + shard.tokens)
        self.tokens = self.starts[-1]
        dtype = self.dtype = self.shards[0].dtype if self.shards else np.dtype("<u2")
        # Read as unsigned, a negative id is a huge one: a single maximum checks both ends.
        self._unsigned = np.dtype(f"<u{dtype.itemsize}")
        self._check_ids = self.vocab_size <= np.iinfo(self._unsigned).max
        self._item = dtype.itemsize
        self._unchanged = UnchangedFiles(self.shards)
        self._files = ShardFiles(self.shards)
        self._checks = BlockChecks(self.shards, self.manifest, self._files.read)
        self._checks.check_random_blocks()

    def _listed_shards(self, manifest: Manifest) -> list[ShardIndex]:
        present = {entry.name for entry in self.path.iterdir()}
        listed = {name for shard in manifest.shards for name in (shard.bin, shard.idx)}
        extra = sorted(
            name for name in present - listed if name.endswith((".bin", ".idx", ".bin.tmp"))
        )
        if extra:
            raise DataError(
                f"{self.path} holds {extra[0]}, which its {MANIFEST_NAME} does not list "
                f"({len(manifest.shards)} shards). Remove it, or prepare the data again."
            )
        shards = []
        for entry in manifest.shards:
            shard = ShardIndex.open(self.path / entry.bin, self.path / entry.idx)
            for what, found, expected in (
                ("dtype", shard.dtype.name, manifest.dtype),
                ("tokens", shard.tokens, entry.tokens),
                ("documents", shard.documents, entry.documents),
            ):
                if found != expected:
                    raise DataError(
                        f"{shard.idx_path}: {what}={found} is not what {MANIFEST_NAME} says "
                        f"({expected}). Copy or prepare the data again."
                    )
            shards.append(shard)
        return shards

    def _found_shards(self) -> list[ShardIndex]:
        """Shards of a folder or prefix without a manifest, in the order of their names."""
        if self.path.is_dir():
            stems = sorted(entry.with_suffix("") for entry in self.path.glob("*.idx"))
        else:
            ends = self.path.suffix in (".bin", ".idx")
            stems = [self.path.with_suffix("") if ends else self.path]
            if not stems[0].with_name(stems[0].name + ".idx").exists():
                stems = []
        if not stems:
            way_out = "Prepare the data with `megahybrid data tokenize`, or correct the path."
            if (self.path / "train" / MANIFEST_NAME).exists():
                way_out = f"Did you mean {self.path / 'train'}?"
            raise DataError(
                f"{self.path} is not a dataset: no {MANIFEST_NAME} and no .idx. {way_out}"
            )
        shards = [
            ShardIndex.open(stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx"))
            for stem in stems
        ]
        for shard in shards:
            if shard.dtype != shards[0].dtype:
                raise DataError(
                    f"{shard.idx_path} has dtype {shard.dtype.name}, not {shards[0].dtype.name} as "
                    f"{shards[0].idx_path.name}. Give each its own source."
                )
        return shards

    def read(self, start: int, length: int, check_ids: bool = True) -> Array:
        """Tokens start … start + length - 1 in the file's dtype.

        Raises DataError when an id is not below vocab_size, unless the caller checks that.
        """
        tokens = np.empty(length, self.dtype)
        self.read_into(start, tokens)
        if (
            check_ids
            and self._check_ids
            and length
            and int(tokens.view(self._unsigned).max()) >= self.vocab_size
        ):
            self._refuse_id(start, tokens)
        return tokens

    def read_into(self, start: int, tokens: Array) -> None:
        """Fills `tokens`, of the dataset's dtype, with those from `start` on; ids unchecked."""
        starts = self.starts
        number = bisect_right(starts, start) - 1
        first, checks = start - starts[number], self._checks
        checks.tokens_until_check -= len(tokens)
        if checks.tokens_until_check < 0:
            checks.check(number, first)
        while start + len(tokens) > starts[number + 1]:
            part = tokens[: starts[number + 1] - start]
            self._files.read_into(number, first * self._item, part)
            tokens, number, first = tokens[len(part) :], number + 1, 0
            start = starts[number]
        self._files.read_into(number, first * self._item, tokens)

    @property
    def masks(self) -> list[TargetMask]:
        """The masks of the shards that say which of their targets count."""
        return [mask for mask in self._masks if mask is not None]

    def counted_targets(self) -> int:
        """How many tokens count as targets, over all shards."""
        masks = zip(self.shards, self._masks, strict=True)
        return sum(shard.tokens if mask is None else mask.counted() for shard, mask in masks)

    def uncounted(self, start: int, length: int) -> Array:
        """Offsets from `start` of tokens, of `length`, that do not count as targets."""
        found, done = [np.zeros(0, np.int64)], 0
        while done < length and self.masked:
            number = bisect_right(self.starts, start + done) - 1
            first = start + done - self.starts[number]
            size = min(length - done, self.shards[number].tokens - first)
            mask = self._masks[number]
            if mask is not None:
                found.append(mask.uncounted(first, size) + done)
            done += size
        return np.concatenate(found)

    def counts(self, start: int, length: int) -> Array:
        """Return of `length` tokens from `start` whether each counts as a target."""
        found = np.ones(length, bool)
        found[self.uncounted(start, length)] = False
        return found

    def check_unchanged(self, spans: Iterable[tuple[int, int]]) -> None:
        """Raises DataError when a file that holds one of the spans changed since the open.

        Size, time of change and inode are compared.
        """
        numbers: set[int] = set()
        for start, length in spans:
            first = bisect_right(self.starts, start) - 1
            numbers.add(first)
            if start + length > self.starts[first + 1]:
                numbers.update(range(first + 1, bisect_right(self.starts, start + length - 1)))
        for number in numbers:
            self._unchanged.check(number)

    def _refuse_id(self, start: int, tokens: Array) -> None:
        index = int(np.argmax(tokens.view(self._unsigned) >= self.vocab_size))
        number = bisect_right(self.starts, start + index) - 1
        shard = self.shards[number]
        raise DataError(
            f"{shard.bin_path} has token id {tokens[index]} at token "
            f"{start + index - self.starts[number]}, not below vocab_size={self.vocab_size}. "
            "Run `megahybrid data verify`, or name the tokenizer that made the data."
        )

    def document_ends(self, start: int, tokens: Array) -> Array:
        """Return which of `tokens` (read at `start`) end their document, as ascending indices.

        They are found by eod; by the index in a file without one.
        """
        if self.eod_id is not None:
            return np.flatnonzero(tokens == self.eod_id)
        found = []
        stop = start + len(tokens)
        while start < stop:
            number = bisect_right(self.starts, start) - 1
            origin = self.starts[number]
            end = min(stop, self.starts[number + 1])
            # The document after the last token of a range begins one token later.
            begins = self.shards[number].document_starts_between(
                start + 1 - origin, end + 1 - origin
            )
            found.append(begins + (origin - 1 - (stop - len(tokens))))
            if end == self.starts[number + 1]:
                found.append(np.asarray([end - 1 - (stop - len(tokens))]))
            start = end
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def document_spans(self, min_tokens: int = 1) -> Iterator[tuple[int, int]]:
        """First token and length, eod included, of each document of at least `min_tokens`."""
        for number, shard in enumerate(self.shards):
            for first in range(0, shard.documents, 2**16):
                begins, lengths = shard.document_spans(first, first + 2**16)
                for index in np.flatnonzero(lengths >= max(1, min_tokens)):
                    yield self.starts[number] + int(begins[index]), int(lengths[index])

    def document(self, index: int) -> Array:
        """Tokens of document `index`, eod included."""
        return self.read(*self.document_span(index))

    def document_span(self, index: int) -> tuple[int, int]:
        """First token and length, eod included, of document `index`."""
        for number, shard in enumerate(self.shards):
            if index < shard.documents:
                begins, lengths = shard.document_spans(index, index + 1)
                return self.starts[number] + int(begins[0]), int(lengths[0])
            index -= shard.documents
        raise IndexError(index)

    def metadata(self, index: int) -> dict[str, Any]:
        """Return what is known of document `index` beside its tokens."""
        for shard, metadata in zip(self.shards, self._metadata, strict=True):
            if index < shard.documents:
                return {} if metadata is None else metadata.of(index)
            index -= shard.documents
        raise IndexError(index)

    def document_at(self, token: int) -> int:
        """Index of the document that token `token` belongs to."""
        number = bisect_right(self.starts, token) - 1
        before = self.shards[number].documents_before(token - self.starts[number] + 1)
        return sum(shard.documents for shard in self.shards[:number]) + before - 1

    @property
    def shard_metadata(self) -> list[DocumentMetadata | None]:
        """The document metadata of each shard."""
        return self._metadata

    def check_tokenizer(self, sha256: str, name: str = "data.tokenizer") -> None:
        """Raises DataError unless the data was made with the tokenizer of this hash."""
        if self.manifest is not None and self.manifest.tokenizer.sha256 != sha256:
            raise DataError(
                f"{name} has sha256 {sha256[:12]}, but {self.path} was made with "
                f"{self.manifest.tokenizer.sha256[:12]}. Name the tokenizer that made the data, or "
                "tokenize it again."
            )


def _fingerprint(shards: list[ShardIndex]) -> str:
    facts: list[Any] = []
    for shard in shards:
        ends = [ends_crc(shard.bin_path), ends_crc(shard.idx_path)]
        facts.append((shard.bin_path.name, shard.dtype.name, shard.tokens, shard.sequences, *ends))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _open_masks(shards: list[ShardIndex], manifest: Manifest | None) -> list[TargetMask | None]:
    listed = {} if manifest is None else {shard.bin: shard.mask_crc32 for shard in manifest.shards}
    masks: list[TargetMask | None] = []
    for shard in shards:
        crc32 = listed.get(shard.bin_path.name)
        path = mask_path(shard)
        if crc32 is None and path.exists():
            raise DataError(
                f"{path} marks targets that do not count, but no {MANIFEST_NAME} lists it. "
                "Remove it, or prepare the data again."
            )
        masks.append(None if crc32 is None else TargetMask(shard, crc32))
    return masks
