"""`megahybrid data …`: everything heavy is imported inside the command that needs it."""

import argparse
import os
import sys
from typing import Any


def run(args: argparse.Namespace) -> int:
    """Runs the chosen command; returns the exit code. MegahybridError is the caller's to show."""
    from megahybrid.data_prep.given_paths import check_paths
    from megahybrid.errors import DataError, from_os_error

    command = {
        "demo": _demo,
        "gather-stdlib": _gather,
        "tokenizer": _tokenizer,
        "tokenize": _tokenize,
        "pack": _pack,
        "merge": _merge,
        "shuffle": _shuffle,
        "split": _shuffle,
        "import": _import,
        "export": _export,
        "verify": _verify,
        "inspect": _inspect,
        "audit": _audit,
    }[args.data_command]
    try:
        check_paths(args)
        command(args)
    except OSError as error:
        if error.filename is None:
            error.filename = getattr(args, "output", args.data_command)
        raise from_os_error(error) or DataError(
            f"{error.filename} failed ({error.strerror or error}). Correct the path, then call the "
            "command again."
        ) from None
    return 0


def _demo(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.arguments import add_arguments
    from megahybrid.data_prep.demo import make_demo

    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    make_demo(lambda words: run(parser.parse_args(["data", *words])), _tell)


def _tell(line: str) -> None:
    print(line, flush=True)


def _gather(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.gather_stdlib import gather_stdlib

    documents, size = gather_stdlib(args.output)
    print(f"{args.output}: {documents:,} documents, {size / 1e6:.1f} MB")


def _tokenizer(args: argparse.Namespace) -> None:
    from megahybrid.errors import DataError

    special = {"report": _tokenizer_report, "adopt": _tokenizer_adopt}.get(args.inputs[0])
    if special is not None and not os.path.exists(args.inputs[0]):
        special(args)
        return
    for name in ("output", "vocab_size"):
        if getattr(args, name) is None:
            raise DataError(f"--{name.replace('_', '-')} is missing. See `data tokenizer --help`.")
    from megahybrid.data_prep.vocabulary import train_tokenizer

    info = train_tokenizer(
        args.inputs,
        args.output,
        args.vocab_size,
        kind=args.kind,
        sample_bytes=args.sample_mib * 2**20,
        seed=args.seed,
        text_field=args.field,
        format=args.format,
        pattern=args.glob,
        special_tokens=args.special_token,
        weights=args.weight,
        digits_apart=args.digits == "apart",
        space_runs=args.spaces == "runs",
        tell=print,
    )
    print(
        f"{args.output}: {info.kind}, vocab_size={info.vocab_size}, eod_id={info.eod_id}, "
        f"sha256 {info.sha256[:12]}"
    )


def _tokenizer_report(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.tokenizer_report import print_report, report
    from megahybrid.errors import DataError

    _, *inputs = args.inputs
    if len(inputs) < 2:
        raise DataError("tokenizer report needs a tokenizer and inputs. Name both.")
    sources, used = report(
        inputs[0],
        inputs[1:],
        against=args.against,
        eod=args.eod,
        sample_bytes=args.sample_mib * 2**20,
        seed=args.seed,
        text_field=args.field,
        format=args.format,
        pattern=args.glob,
        tell=print,
    )
    print_report(inputs[0], sources, used, against=args.against, eod=args.eod)


def _tokenizer_adopt(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.tokenizer_report import adopt
    from megahybrid.errors import DataError

    if len(args.inputs) != 2 or not args.output:
        raise DataError("tokenizer adopt needs one tokenizer and --output. Name both.")
    info, changed = adopt(args.inputs[1], args.output, args.eod)
    print(
        f"{args.output}: {info.kind}, vocab_size={info.vocab_size}, eod_id={info.eod_id}, "
        f"sha256 {info.sha256[:12]}"
    )
    for text in changed:
        print(f"not lossless: {text!r} does not come back as it was")


def _tokenize(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.tokenize import tokenize

    report = tokenize(
        args.inputs,
        args.tokenizer,
        args.output,
        held_out=args.held_out,
        longest=args.longest,
        deduplicate=args.deduplicate,
        seed=args.seed,
        text_field=args.field,
        format=args.format,
        kept=args.keep,
        pattern=args.glob,
        eod=args.eod,
        workers=args.workers,
        memory_bytes=args.memory_mib * 2**20,
        shard_tokens=args.shard_tokens,
        max_bad_fraction=args.max_bad_fraction,
        quiet=not sys.stderr.isatty(),
        tell=print,
    )
    for part, documents in report.documents.items():
        print(f"{report.output}/{part}: {documents:,} documents, {report.tokens[part]:,} tokens")
    if report.duplicates:
        print(f"{report.duplicates:,} copies of documents left out")
    if report.kept:
        told = ", ".join(f"{name} of {count:,} rows" for name, count in report.kept.items())
        print(f"kept beside the tokens: {told}")
    if report.loss.empty:
        print(f"{report.loss.empty:,} documents without text left out")
    if report.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.bad.items())
        count = sum(report.bad.values())
        # How much a file was cut by, nothing in it may say.
        least = "at least " if any(reason.startswith("truncated") for reason in report.bad) else ""
        print(f"{report.output}/quarantine.jsonl: {count:,} bad ({reasons})")
        print(f"lost: {least}{report.loss}")


def _pack(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.pack import pack

    passes = 2 if args.method == "best_fit" else 1
    with _bar("pack", [args.path], passes, args.vocab_size) as progress:
        info = pack(
            args.path,
            args.output,
            args.length,
            method=args.method,
            min_document_tokens=args.min_document_tokens,
            max_document_tokens=args.max_document_tokens,
            vocab_size=args.vocab_size,
            command=_command(),
            progress=progress,
        )
    print(
        f"{args.output}: {info.rows:,} rows of {info.length:,}, {info.fill:.2%} full, "
        f"{info.documents:,} documents, {info.tokens:,} tokens, "
        f"{info.entries - info.documents:,} cuts"
    )


def _merge(args: argparse.Namespace) -> None:
    from pathlib import Path

    from megahybrid.data_prep.rewrite import merge_datasets

    with _bar("merge", args.paths) as progress:
        made = merge_datasets(
            args.paths,
            Path(args.output),
            shard_tokens=args.shard_tokens,
            command=_command(),
            progress=progress,
        )
    print(f"{args.output}: {made.documents:,} documents, {made.tokens:,} tokens")


def _shuffle(args: argparse.Namespace) -> None:
    from pathlib import Path

    from megahybrid.data_prep.merge import Split
    from megahybrid.data_prep.rewrite import shuffle_datasets

    split = None
    if args.data_command == "split":
        split = Split(args.held_out, args.longest, args.deduplicate)
    with _bar(args.data_command, args.paths, 2) as progress:
        made = shuffle_datasets(
            args.paths,
            Path(args.output),
            seed=args.seed,
            split=split,
            shard_tokens=args.shard_tokens,
            memory_bytes=args.memory_mib * 2**20,
            command=_command(),
            progress=progress,
        )
    for part, manifest in made.items():
        name = args.output if split is None else f"{args.output}/{part}"
        print(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def _import(args: argparse.Namespace) -> None:
    from pathlib import Path

    from megahybrid.config.base import parse
    from megahybrid.data.manifest import TokenizerInfo
    from megahybrid.data.tokenizer import load_tokenizer
    from megahybrid.data_prep.rewrite import import_dataset
    from megahybrid.errors import DataError

    if args.tokenizer:
        info = load_tokenizer(args.tokenizer, args.eod).info
    elif args.vocab_size is None or args.eod_id is None:
        raise DataError(
            "--tokenizer is missing (or --vocab-size and --eod-id, where the tokenizer is not at "
            "hand). Name the one that made the ids."
        )
    else:
        given = {"vocab_size": args.vocab_size, "eod_id": args.eod_id}
        info = parse(TokenizerInfo, {"kind": "unknown", "sha256": ""} | given)
    with _bar("import", [args.path], 1, info.vocab_size) as progress:
        made = import_dataset(
            args.path,
            Path(args.output),
            info,
            shard_tokens=args.shard_tokens,
            command=_command(),
            progress=progress,
        )
    print(f"{args.output}: {made.documents:,} documents, {made.tokens:,} tokens")


def _export(args: argparse.Namespace) -> None:
    from pathlib import Path

    from megahybrid.data_prep.rewrite import export_dataset

    with _bar("export", [args.path], 1, args.vocab_size) as progress:
        documents, tokens = export_dataset(
            args.path, Path(args.prefix), vocab_size=args.vocab_size, progress=progress
        )
    print(f"{args.prefix}.bin, .idx: {documents:,} documents, {tokens:,} tokens")


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


def _verify(args: argparse.Namespace) -> None:
    from megahybrid.data.verify import verify_dataset

    with _bar("verify", [args.path], 1, args.vocab_size) as progress:
        dataset = verify_dataset(args.path, vocab_size=args.vocab_size, progress=progress)
    print(
        f"{args.path}: good. {len(dataset.shards)} shards, {dataset.documents:,} documents, "
        f"{dataset.tokens:,} tokens"
    )


def _inspect(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.given_paths import check_picture

    path = args.path
    check_picture(args.picture)
    if path.endswith((".yaml", ".yml")) or os.path.exists(os.path.join(path, "config.yaml")):
        from megahybrid.data_prep.show_batch import show_batch

        show_batch(path, args.stage, args.step, args.rows, args.tokenizer, args.picture)
        return
    from megahybrid.data_prep.inspect_dataset import inspect_dataset

    inspect_dataset(path, args.vocab_size, args.tokenizer, args.documents, args.picture)


def _audit(args: argparse.Namespace) -> None:
    from megahybrid.data_prep.trace import audit, first_difference

    audits = [audit(path) for path in (args.run_directory, args.other) if path]
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
