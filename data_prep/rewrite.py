"""Datasets from datasets: split, merge, shuffle, import from and export to plain Megatron files.

Tokens are copied in pieces of bounded size and checked on the way; the tokenizer stays the same.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import Manifest, TokenizerInfo
from megahybrid.data.token_file import DTYPE_CODES, HEADER, MAGIC, Array
from megahybrid.data.token_writer import SHARD_TOKENS, TokenWriter
from megahybrid.data_prep.document_encoder import document_hash, document_keys
from megahybrid.data_prep.fresh import fresh_folder, scratch_folder
from megahybrid.data_prep.merge import Merge, Split, runs_of
from megahybrid.data_prep.unit_files import RunWriter, UnitResult
from megahybrid.errors import DataError

PIECE_TOKENS = 2**22
Progress = Callable[[int], None]


def nothing(done_bytes: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class DocumentBatch:
    """Whole documents one after another (pieces is None), or one too long to hold."""

    tokens: Array
    lengths: Array
    pieces: Iterator[Array] | None = None
    metadata_lines: tuple[bytes, ...] = ()
    counts: Array | None = None  # of each token whether it is a target; None: all are
    counts_of_pieces: Iterator[Array] | None = None


def refuse_masks(dataset: TokenDataset) -> None:
    """Raises DataError where some targets do not count: Megatron's format has no word for it."""
    if dataset.masks:
        raise DataError(
            f"{dataset.path} marks targets that do not count ({dataset.masks[0].path.name}), which "
            "Megatron's files would lose. Train on it with `megahybrid train`."
        )


def refuse_plan(dataset: TokenDataset) -> None:
    """Raises DataError for a plan: it names rows of a dataset and holds no documents itself."""
    if dataset.plan is not None:
        raise DataError(
            f"{dataset.plan.folder} is a plan of rows, not a dataset. Name its dataset, "
            f"{dataset.path.resolve()}."
        )


def parts_of(dataset: TokenDataset, eod_id: int) -> Iterator[DocumentBatch]:
    """Every document in order, ending with eod; added where a foreign file has none."""
    for number, shard in enumerate(dataset.shards):
        origin = dataset.starts[number]
        for first in range(0, shard.documents, 2**16):
            starts, lengths = shard.document_spans(first, first + 2**16)
            keep = lengths > 0
            metadata_lines = [b""] * len(lengths)
            if (known := dataset.shard_metadata[number]) is not None:
                metadata_lines = known.lines(first, first + len(lengths))
            kept = [metadata_lines[index] for index in np.flatnonzero(keep)]
            yield from _parts(dataset, starts[keep] + origin, lengths[keep], kept, eod_id)


def _parts(
    dataset: TokenDataset, starts: Array, lengths: Array, metadata_lines: list[bytes], eod_id: int
) -> Iterator[DocumentBatch]:
    begin = 0
    while begin < len(starts):
        ends = np.cumsum(lengths[begin:])
        stop = begin + int(np.searchsorted(ends, PIECE_TOKENS, side="right"))
        if stop == begin:
            long = _long(dataset, int(starts[begin]), int(lengths[begin]), eod_id)
            yield replace(long, metadata_lines=(metadata_lines[begin],))
            begin += 1
            continue
        size = int(ends[stop - begin - 1])
        tokens = dataset.read(int(starts[begin]), size)
        counts = dataset.counts(int(starts[begin]), size) if dataset.masked else None
        tokens, sizes, counts = _with_eod(tokens, lengths[begin:stop], counts, eod_id)
        lines = tuple(metadata_lines[begin:stop])
        yield DocumentBatch(tokens, sizes, metadata_lines=lines, counts=counts)
        begin = stop


def _with_eod(
    tokens: Array, lengths: Array, counts: Array | None, eod_id: int
) -> tuple[Array, Array, Array | None]:
    ends = np.cumsum(lengths)
    missing = tokens[ends - 1] != eod_id
    if missing.any():
        tokens = np.insert(tokens, ends[missing], eod_id)
        counts = None if counts is None else np.insert(counts, ends[missing], True)
        lengths = lengths + missing
    return tokens, lengths, counts


def _long(dataset: TokenDataset, start: int, length: int, eod_id: int) -> DocumentBatch:
    missing = int(dataset.read(start + length - 1, 1)[0]) != eod_id

    def pieces() -> Iterator[Array]:
        for first in range(0, length, PIECE_TOKENS):
            yield dataset.read(start + first, min(PIECE_TOKENS, length - first))
        if missing:
            yield np.asarray([eod_id], dataset.dtype)

    def counts() -> Iterator[Array]:
        for first in range(0, length, PIECE_TOKENS):
            yield dataset.counts(start + first, min(PIECE_TOKENS, length - first))
        if missing:
            yield np.ones(1, bool)

    return DocumentBatch(
        np.zeros(0, dataset.dtype),
        np.asarray([length + missing]),
        pieces(),
        counts_of_pieces=counts() if dataset.masked else None,
    )


def open_alike(paths: Sequence[str | Path]) -> tuple[list[TokenDataset], TokenizerInfo]:
    """The datasets, which must have been made with one tokenizer."""
    datasets = [TokenDataset(path) for path in paths]
    infos = []
    for dataset in datasets:
        refuse_plan(dataset)
        if dataset.manifest is None:
            raise DataError(
                f"{dataset.path} has no manifest of its own. Import it first with "
                "`megahybrid data import`."
            )
        infos.append(dataset.manifest.tokenizer)
        if infos[-1] != infos[0]:
            raise DataError(
                f"{dataset.path} was made with tokenizer {infos[-1].sha256[:12]}, but "
                f"{datasets[0].path} with {infos[0].sha256[:12]}. Tokenize one of them again."
            )
    return datasets, infos[0]


def _copy(part: DocumentBatch, writer: TokenWriter) -> None:
    if part.pieces is None:
        writer.add_documents(
            part.tokens, part.lengths, part.counts, metadata_lines=part.metadata_lines
        )
    else:
        length, line = int(part.lengths[0]), part.metadata_lines[0]
        writer.add_long(part.pieces, length, line, part.counts_of_pieces)


def _sources(datasets: Sequence[TokenDataset]) -> list[dict[str, object]]:
    return [
        {"path": str(d.path), "documents": d.documents, "fingerprint": d.fingerprint}
        for d in datasets
    ]


def merge_datasets(
    paths: Sequence[str | Path],
    output: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    command: str = "",
    progress: Progress = nothing,
) -> Manifest:
    """All documents of several datasets, one dataset after another."""
    datasets, info = open_alike(paths)
    options: dict[str, Any] = {
        "sources": _sources(datasets),
        "has_metadata": any(dataset.has_metadata for dataset in datasets),
        "command": command,
        "shard_tokens": shard_tokens,
    }
    with fresh_folder(output) as folder, TokenWriter(folder, info, **options) as writer:
        for dataset in datasets:
            for part in parts_of(dataset, info.eod_id):
                _copy(part, writer)
                progress(int(part.lengths.sum()) * dataset.dtype.itemsize)
    return writer.manifest


def import_dataset(
    path: str | Path,
    output: Path,
    tokenizer: TokenizerInfo,
    *,
    shard_tokens: int = SHARD_TOKENS,
    command: str = "",
    progress: Progress = nothing,
) -> Manifest:
    """A plain Megatron dataset with a manifest, checksums, and eod after every document."""
    dataset = TokenDataset(path, vocab_size=tokenizer.vocab_size)
    options: dict[str, Any] = {
        "sources": _sources([dataset]),
        "has_metadata": dataset.has_metadata,
        "command": command,
        "shard_tokens": shard_tokens,
    }
    with fresh_folder(output) as folder, TokenWriter(folder, tokenizer, **options) as writer:
        for part in parts_of(dataset, tokenizer.eod_id):
            _copy(part, writer)
            progress(int(part.lengths.sum()) * dataset.dtype.itemsize)
    return writer.manifest


def shuffle_datasets(
    paths: Sequence[str | Path],
    output: Path,
    *,
    seed: int = 0,
    split: Split | None = None,
    shard_tokens: int = SHARD_TOKENS,
    memory_bytes: int = 2**28,
    command: str = "",
    progress: Progress = nothing,
) -> dict[str, Manifest]:
    """All documents in an order keyed by (seed, tokens), external; parts as `tokenize` has them.

    Without a split OUTPUT itself is the dataset; with one, OUTPUT/train and the parts held out.
    """
    datasets, info = open_alike(paths)
    names = ["train"]
    if split is not None:
        names += ["held_out"] * (split.held_out > 0) + ["held_out_long"] * (split.longest > 0)
    options: dict[str, Any] = {
        "sources": _sources(datasets),
        "has_metadata": any(dataset.has_metadata for dataset in datasets),
        "command": command,
        "shard_tokens": shard_tokens,
    }
    with (
        fresh_folder(output) as folder,
        scratch_folder(output.with_name(output.name + ".runs")) as work,
    ):
        results = [
            _keyed(dataset, info, work, number, seed, progress)
            for number, dataset in enumerate(datasets)
        ]
        writers = {
            name: TokenWriter(folder / name if split else folder, info, **options) for name in names
        }
        merge = Merge(runs_of(work, results), split or Split(0, 0), writers, memory_bytes, progress)
        merge.run()
        manifests = {name: writer.close() for name, writer in writers.items()}
        if split is not None:
            merge.refuse_empty_parts(manifests)
        return manifests


def _keyed(
    dataset: TokenDataset,
    info: TokenizerInfo,
    work: Path,
    number: int,
    seed: int,
    progress: Progress,
) -> UnitResult:
    """Runs of a dataset's documents, sorted by a hash of their tokens."""
    dtype = np.dtype(info.dtype)
    with RunWriter(work, number, dtype, has_counts=dataset.masked) as writer:
        for part in parts_of(dataset, info.eod_id):
            if part.pieces is None:
                ends = np.cumsum(part.lengths)[:-1]
                documents = np.split(part.tokens, ends)
                counts: list[Array] | list[None] = [None] * len(documents)
                if part.counts is not None:
                    counts = np.split(part.counts, ends)
                for tokens, metadata, which in zip(
                    documents, part.metadata_lines, counts, strict=True
                ):
                    digest = document_hash(seed)
                    digest.update(np.ascontiguousarray(tokens).data)
                    writer.add(tokens, document_keys(digest), metadata, which)
            else:
                digest = document_hash(seed)
                begin = writer.begin_long()
                marks: Iterator[Array | None] = part.counts_of_pieces or repeat(None)
                for tokens, which in zip(part.pieces, marks, strict=False):
                    digest.update(np.ascontiguousarray(tokens).data)
                    writer.add_piece(np.ascontiguousarray(tokens), which)
                writer.end_long(begin, document_keys(digest), part.metadata_lines[0])
            progress(int(part.lengths.sum()) * dtype.itemsize)
        return writer.finish(dataset.tokens * dtype.itemsize, [])


def export_dataset(
    path: str | Path, prefix: Path, *, vocab_size: int | None = None, progress: Progress = nothing
) -> tuple[int, int]:
    """One PREFIX.bin and PREFIX.idx with every shard, as Megatron reads; documents and tokens."""
    dataset = TokenDataset(path, vocab_size=vocab_size)
    refuse_plan(dataset)
    refuse_masks(dataset)
    item = dataset.dtype.itemsize
    paths = [prefix.with_name(f"{prefix.name}.{end}") for end in ("bin", "idx")]
    for target in paths:
        if target.exists():
            raise DataError(f"{target} exists already. Name another prefix, or remove it.")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # The .idx appears last: Megatron looks for both, and a killed export leaves none of it.
    temporary = [path.with_name(path.name + ".tmp") for path in paths]
    with open(temporary[0], "wb") as file:
        for shard in dataset.shards:
            with open(shard.bin_path, "rb") as source:
                while data := source.read(2**24):
                    file.write(data)
                    progress(len(data))
    sequences = sum(shard.sequences for shard in dataset.shards)
    with open(temporary[1], "wb") as file:
        code = DTYPE_CODES[dataset.dtype.name]
        file.write(HEADER.pack(MAGIC, 1, code, sequences, dataset.documents + 1))
        for shard in dataset.shards:
            for first in range(0, shard.sequences, 2**20):
                file.write(np.ascontiguousarray(shard.lengths()[first : first + 2**20]).data)
        for number, shard in enumerate(dataset.shards):
            for first in range(0, shard.sequences, 2**20):
                pointers = shard.pointers()[first : first + 2**20]
                file.write((pointers + dataset.starts[number] * item).astype("<i8").data)
        before = 0
        for shard in dataset.shards:
            for first in range(0, shard.documents, 2**20):
                stop = min(shard.documents, first + 2**20)
                file.write((shard.document_index()[first:stop] + before).astype("<i8").data)
            before += shard.sequences
        file.write(np.asarray([sequences], "<i8").data)
    for made, target in zip(temporary, paths, strict=True):
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, target)
    return dataset.documents, dataset.tokens
