"""`megahybrid data …`: a function for each command, and what it prints.

Everything heavy is imported inside the command that needs it.
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from megahybrid.commands.data_texts import gather, make_chats, tokenize_texts, tokenizer
from megahybrid.errors import EXIT_DONE

if TYPE_CHECKING:
    from megahybrid.data_prep.merge import Split


def data(command: str, **given: Any) -> int:
    """Run the command of this name on what was given; return the exit code. Raises MegahybridError,
    one line, for whatever the user can mend."""
    from megahybrid.data_prep.given_paths import check_paths
    from megahybrid.errors import DataError, from_os_error

    try:
        check_paths(command, given)
        COMMANDS[command](**given)
    except OSError as error:
        if error.filename is None:
            error.filename = given.get("output", command)
        raise from_os_error(error) or DataError(
            f"{error.filename} failed ({error.strerror or error}). Correct the path, then call the "
            "command again."
        ) from None
    return EXIT_DONE


def pack_rows(
    *,
    path: str,
    output: str,
    length: int,
    method: Literal["best_fit", "stream"],
    min_document_tokens: int,
    max_document_tokens: int | None,
    vocab_size: int | None,
) -> None:
    """Make rows of whole documents for one length."""
    from megahybrid.data.dataset import TokenDataset
    from megahybrid.data_prep.pack import pack

    passes = 2 if method == "best_fit" else 1
    with _bar("pack", [path], passes, vocab_size) as progress:
        info = pack(
            path,
            output,
            length,
            method=method,
            min_document_tokens=min_document_tokens,
            max_document_tokens=max_document_tokens,
            vocab_size=vocab_size,
            command=_command(),
            progress=progress,
        )
    print(
        f"{output}: {info.rows:,} rows of {info.length:,}, {info.fill:.2%} full, "
        f"{info.documents:,} documents, {info.tokens:,} tokens, "
        f"{info.entries - info.documents:,} cuts"
    )
    if info.entries > info.documents and TokenDataset(path, vocab_size=vocab_size).masked:
        print(
            "Documents whose targets are marked were cut, perhaps within an answer. `data tokenize "
            f"--max-tokens {length}` leaves none that is longer than a row."
        )


def merge(*, paths: list[str], output: str, shard_tokens: int) -> None:
    """Make one dataset of several, in their order."""
    from pathlib import Path

    from megahybrid.data_prep.rewrite import merge_datasets

    with _bar("merge", paths) as progress:
        made = merge_datasets(
            paths,
            Path(output),
            shard_tokens=shard_tokens,
            command=_command(),
            progress=progress,
        )
    print(f"{output}: {made.documents:,} documents, {made.tokens:,} tokens")


def shuffle(
    *, paths: list[str], output: str, seed: int, memory_mib: int, shard_tokens: int
) -> None:
    """Write the documents of datasets in a keyed random order."""
    _reorder("shuffle", paths, output, seed, memory_mib, shard_tokens, None)


def split(
    *,
    paths: list[str],
    output: str,
    seed: int,
    memory_mib: int,
    shard_tokens: int,
    held_out: float,
    longest: int,
    deduplicate: bool,
) -> None:
    """Write a dataset in parts, by hash of the documents."""
    from megahybrid.data_prep.merge import Split

    parts = Split(held_out, longest, deduplicate)
    _reorder("split", paths, output, seed, memory_mib, shard_tokens, parts)


def _reorder(
    name: str,
    paths: list[str],
    output: str,
    seed: int,
    memory_mib: int,
    shard_tokens: int,
    parts: "Split | None",
) -> None:
    from pathlib import Path

    from megahybrid.data_prep.rewrite import shuffle_datasets

    with _bar(name, paths, 2) as progress:
        made = shuffle_datasets(
            paths,
            Path(output),
            seed=seed,
            split=parts,
            shard_tokens=shard_tokens,
            memory_bytes=memory_mib * 2**20,
            command=_command(),
            progress=progress,
        )
    for part, manifest in made.items():
        where = output if parts is None else f"{output}/{part}"
        print(f"{where}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def import_files(
    *,
    path: str,
    output: str,
    tokenizer: str | None,
    eod: str | None,
    vocab_size: int | None,
    eod_id: int | None,
    shard_tokens: int,
) -> None:
    """Make a dataset of plain Megatron files, with a manifest."""
    from pathlib import Path

    from megahybrid.config.parsing import parse
    from megahybrid.data.manifest import TokenizerInfo
    from megahybrid.data.tokenizer import load_tokenizer
    from megahybrid.data_prep.rewrite import import_dataset
    from megahybrid.errors import DataError

    if tokenizer:
        info = load_tokenizer(tokenizer, eod).info
    elif vocab_size is None or eod_id is None:
        raise DataError(
            "--tokenizer is missing (or --vocab-size and --eod-id, where the tokenizer is not at "
            "hand). Name the one that made the ids."
        )
    else:
        given = {"vocab_size": vocab_size, "eod_id": eod_id}
        info = parse(TokenizerInfo, {"kind": "unknown", "sha256": ""} | given)
    with _bar("import", [path], 1, info.vocab_size) as progress:
        made = import_dataset(
            path,
            Path(output),
            info,
            shard_tokens=shard_tokens,
            command=_command(),
            progress=progress,
        )
    print(f"{output}: {made.documents:,} documents, {made.tokens:,} tokens")


def export_files(*, path: str, prefix: str, vocab_size: int | None) -> None:
    """Write one .bin and .idx that Megatron reads."""
    from pathlib import Path

    from megahybrid.data_prep.rewrite import export_dataset

    with _bar("export", [path], 1, vocab_size) as progress:
        documents, tokens = export_dataset(
            path, Path(prefix), vocab_size=vocab_size, progress=progress
        )
    print(f"{prefix}.bin, .idx: {documents:,} documents, {tokens:,} tokens")


def _bar(name: str, paths: list[str], passes: int = 1, vocab_size: int | None = None) -> Any:
    """A progress bar over so many passes through the tokens of datasets."""
    from megahybrid.data.dataset import TokenDataset
    from megahybrid.data_prep.progress import token_bar

    datasets = [TokenDataset(path, vocab_size=vocab_size) for path in paths]
    tokens = passes * sum(dataset.tokens for dataset in datasets)
    return token_bar(name, tokens, datasets[0].dtype.itemsize)


def _command() -> str:
    from megahybrid.data.manifest import made_by

    return made_by(["megahybrid", *sys.argv[1:]])


def verify(*, path: str, vocab_size: int | None) -> None:
    """Read every byte of a dataset and compare it with the checksums."""
    from megahybrid.data.verify import verify_dataset

    with _bar("verify", [path], 1, vocab_size) as progress:
        dataset = verify_dataset(path, vocab_size=vocab_size, progress=progress)
    print(
        f"{path}: good. {len(dataset.shards)} shards, {dataset.documents:,} documents, "
        f"{dataset.tokens:,} tokens"
    )


def inspect(
    *,
    path: str,
    vocab_size: int | None,
    tokenizer: str | None,
    documents: int,
    picture: str | None,
    step: int,
    stage: str | None,
    rows: int,
) -> None:
    """Show what a dataset, or one step of a run, holds."""
    from megahybrid.data_prep.given_paths import check_picture

    check_picture(picture)
    if path.endswith((".yaml", ".yml")) or os.path.exists(os.path.join(path, "config.yaml")):
        from megahybrid.data_prep.show_batch import show_batch

        show_batch(path, stage, step, rows, tokenizer, picture)
        return
    from megahybrid.data_prep.inspect_dataset import inspect_dataset

    inspect_dataset(path, vocab_size, tokenizer, documents, picture)


def audit_run(*, run_directory: str, other: str | None) -> None:
    """Prove from a run's ledger which tokens it has read."""
    from megahybrid.data_prep.trace import audit, first_difference

    audits = [audit(path) for path in (run_directory, other) if path]
    for found in audits:
        print(
            f"{found.run}: the ledger's {found.steps:,} steps"
            + (f" from step {found.first_step:,} on" if found.first_step > 1 else "")
            + f" are what config and files give. Rows read: sha256 {found.rows[:16]}"
        )
        for name, tokens in found.tokens.items():
            print(
                f"  {name}: {tokens:,} tokens, {found.epochs[name]:.4f} epochs, manifest "
                f"{found.fingerprints[name][:12]}, spans sha256 {found.seen[name][:16]}"
            )
    if len(audits) == 2:
        first, second = audits
        step = first_difference(first, second)
        common = first.by_step.keys() & second.by_step.keys()
        if step is not None:
            print(f"The two runs differ from step {step} on.")
        elif not common:
            print("The two runs have no step in common.")
        else:
            print(
                "Both runs have read the same tokens in the same order in steps "
                f"{min(common):,} to {max(common):,}."
            )


COMMANDS: dict[str, Callable[..., None]] = {
    "gather-stdlib": gather,
    "make-chats": make_chats,
    "tokenizer": tokenizer,
    "tokenize": tokenize_texts,
    "pack": pack_rows,
    "merge": merge,
    "shuffle": shuffle,
    "split": split,
    "import": import_files,
    "export": export_files,
    "verify": verify,
    "inspect": inspect,
    "audit": audit_run,
}
