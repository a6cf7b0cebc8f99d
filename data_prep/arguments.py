"""The arguments of `megahybrid data …`. Imports nothing heavy."""

import argparse
import os
from typing import Any

LARGEST_VOCABULARY = 2**31  # ids are int32
LARGEST_MIB = 2**30
LONGEST_ROW = 2**24  # pack holds some tens of bytes for each possible length of a document
MOST_WORKERS = 1024


def add_arguments(subparsers: Any) -> None:
    """Adds the `data` command to the subparsers of `megahybrid`; call `run(args)` for it."""
    parser = subparsers.add_parser("data", help="prepare, check and show datasets")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    commands.add_parser("demo", help="the data of pkg:runs/demo.yaml, in build/demo")

    gather = commands.add_parser("gather-stdlib", help="Python's own library as a .jsonl")
    gather.add_argument("output", help=".jsonl to write")

    tokenizer = commands.add_parser(
        "tokenizer",
        help="train a tokenizer, report on one, or adopt one",
        usage="megahybrid data tokenizer INPUT... --output NEW.model --vocab-size N\n"
        "       megahybrid data tokenizer report TOKENIZER INPUT... [--against OTHER]\n"
        "       megahybrid data tokenizer adopt TOKENIZER --output NEW",
    )
    _add_inputs(tokenizer)
    tokenizer.add_argument("--output", help=".model to write")
    tokenizer.add_argument("--vocab-size", type=_from(1, LARGEST_VOCABULARY))
    tokenizer.add_argument("--kind", choices=("bpe", "unigram"), default="bpe")
    tokenizer.add_argument(
        "--sample-mib", type=_from(1, LARGEST_MIB), default=64, help="text to look at"
    )
    tokenizer.add_argument("--special-token", action="append", default=[])
    tokenizer.add_argument(
        "--weight", type=float, action="append", help="share of the text, once for each input"
    )
    tokenizer.add_argument("--digits", choices=("apart", "together"), default="apart")
    tokenizer.add_argument(
        "--spaces", choices=("runs", "single"), default="runs", help="whether runs may be a token"
    )
    tokenizer.add_argument("--against", metavar="OTHER", help="report: compare with this one")
    tokenizer.add_argument("--eod", help="report, adopt: the token that follows every document")

    tokenize = commands.add_parser("tokenize", help="text to shuffled token files")
    _add_inputs(tokenize)
    tokenize.add_argument("--tokenizer", required=True, help=".model or tokenizer.json")
    tokenize.add_argument("--output", required=True, help="new folder")
    tokenize.add_argument("--held-out", type=_fraction, default=0.0, help="fraction of documents")
    tokenize.add_argument("--longest", type=_from(0), default=0, help="longest documents held out")
    tokenize.add_argument(
        "--deduplicate", action="store_true", help="keep only the first of equal texts"
    )
    tokenize.add_argument("--eod", help="the token that follows every document")
    tokenize.add_argument(
        "--keep",
        metavar="FIELD",
        action="append",
        default=[],
        help="keep this field of each row beside the tokens: an id, a url",
    )
    tokenize.add_argument(
        "--workers", type=_from(1, MOST_WORKERS), default=len(os.sched_getaffinity(0))
    )
    tokenize.add_argument(
        "--memory-mib", type=_from(1, LARGEST_MIB), default=256, help="for the shuffle"
    )
    tokenize.add_argument("--shard-tokens", type=_from(1, 2**31 - 1), default=2**30)
    tokenize.add_argument(
        "--max-bad-fraction",
        type=_fraction,
        default=0.05,
        help="of the inputs' bytes that may be lost",
    )

    pack = commands.add_parser("pack", help="rows of whole documents for one length")
    pack.add_argument("path", help="dataset")
    pack.add_argument("--output", required=True, help="new folder; the path of a source in a run")
    pack.add_argument("--length", type=_from(1, LONGEST_ROW), required=True, help="tokens of a row")
    pack.add_argument("--method", choices=("best_fit", "stream"), default="best_fit")
    pack.add_argument("--min-document-tokens", type=_from(1), default=1)
    pack.add_argument("--max-document-tokens", type=_from(1))
    pack.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="for files without a manifest"
    )

    _add_rewriting(commands)

    verify = commands.add_parser("verify", help="read every byte and compare with the checksums")
    verify.add_argument("path")
    verify.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="for files without a manifest"
    )

    inspect = commands.add_parser("inspect", help="what a dataset, or one step of a run, holds")
    inspect.add_argument("path", help="dataset, run file or a run's folder")
    inspect.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="for files without a manifest"
    )
    inspect.add_argument("--tokenizer", help="to show documents as text")
    inspect.add_argument("--documents", type=_from(0), default=3, help="how many to show")
    inspect.add_argument("--picture", metavar="FILE.svg", help="lengths, or mix and rows, drawn")
    inspect.add_argument("--step", type=_from(1), default=1, help="of a run (from 1)")
    inspect.add_argument("--stage", help="count the step within this stage")
    inspect.add_argument("--rows", type=_from(1), default=4, help="rows of the step to show")

    audit = commands.add_parser("audit", help="prove from a run's ledger which tokens it has read")
    audit.add_argument("run_directory", metavar="RUN", help="a run's folder")
    audit.add_argument("other", metavar="RUN2", nargs="?", help="compare with this run")


def _from(lowest: int, highest: int = 2**62) -> Any:
    """Whole numbers from `lowest` to `highest`, as an argument's type."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(
                f"{text[:40]} is not a whole number of at least {lowest}"
            )
        if value > highest:
            raise argparse.ArgumentTypeError(f"{text[:40]} is more than {highest:,}")
        return value

    return whole


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not from 0 to 1")
    return value


def _add_rewriting(commands: Any) -> None:
    merge = commands.add_parser("merge", help="several datasets as one, in order")
    shuffle = commands.add_parser("shuffle", help="documents of datasets in a keyed random order")
    split = commands.add_parser("split", help="a dataset in parts, by hash of the documents")
    for parser, paths in ((merge, "+"), (shuffle, "+"), (split, 1)):
        parser.add_argument("paths", nargs=paths, help="datasets made with one tokenizer")
        parser.add_argument("--output", required=True, help="new folder")
        parser.add_argument("--shard-tokens", type=_from(1, 2**31 - 1), default=2**30)
    for parser in (shuffle, split):
        parser.add_argument("--seed", type=_from(-(2**62)), default=0)
        parser.add_argument(
            "--memory-mib", type=_from(1, LARGEST_MIB), default=256, help="to work in"
        )
    split.add_argument("--held-out", type=_fraction, default=0.0, help="fraction of documents")
    split.add_argument("--longest", type=_from(0), default=0, help="longest documents held out")
    split.add_argument(
        "--deduplicate", action="store_true", help="keep only the first of equal documents"
    )

    imported = commands.add_parser("import", help="a manifest for plain Megatron .bin and .idx")
    imported.add_argument("path", help="folder, prefix or .bin")
    imported.add_argument("--output", required=True, help="new folder")
    imported.add_argument("--tokenizer", help=".model or tokenizer.json that made the ids")
    imported.add_argument("--eod", help="the token that follows every document")
    imported.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="without --tokenizer"
    )
    imported.add_argument("--eod-id", type=_from(0, LARGEST_VOCABULARY), help="without --tokenizer")
    imported.add_argument("--shard-tokens", type=_from(1, 2**31 - 1), default=2**30)

    export = commands.add_parser("export", help="one .bin and .idx that Megatron reads")
    export.add_argument("path")
    export.add_argument("prefix", help="PREFIX.bin and PREFIX.idx are written")
    export.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="for files without a manifest"
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", help="JSON, .parquet, text, folders, globs, hf:NAME, or - for stdin"
    )
    parser.add_argument(
        "--format",
        choices=("auto", "text", "jsonl", "json", "parquet"),
        default="auto",
        help="how every file is read; by default its content says",
    )
    parser.add_argument("--glob", default="**/*", help="which files of a folder")
    parser.add_argument("--field", default="text", help="the text's field of a row")
    parser.add_argument("--seed", type=_from(-(2**62)), default=0)
