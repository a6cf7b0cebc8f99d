"""`megahybrid data …`: prepare, check and show datasets."""

import argparse
import os
from typing import Any

from megahybrid.cli.arguments import given
from megahybrid.cli.chats import CHAT_TEMPLATES, add_chat
from megahybrid.data_prep.limits import LARGEST_MIB, LARGEST_VOCABULARY, LONGEST_ROW, MOST_WORKERS
from megahybrid.errors import EXIT_DONE


def add_data_commands(subparsers: Any) -> None:
    """Add `data` with its own commands."""
    parser = subparsers.add_parser("data", help="prepare, check and show datasets")
    parser.set_defaults(run=_data)
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the data of pkg:runs/demo.yaml, in build/demo")
    demo.add_argument(
        "--chats", action="store_true", help="and of pkg:runs/demo_chat.yaml, in build/demo_chat"
    )

    gather = commands.add_parser("gather-stdlib", help="Python's own library as a .jsonl")
    gather.add_argument("output", help=".jsonl to write")

    chats = commands.add_parser("make-chats", help="small conversations to try things with")
    chats.add_argument("output", help=".jsonl to write")
    chats.add_argument(
        "--count", type=_from(1, 20_000), default=2000, help="conversations (default: 2000)"
    )
    chats.add_argument("--seed", type=_from(0), default=1, help="of what they say (default: 1)")

    tokenizer = commands.add_parser(
        "tokenizer",
        help="train a tokenizer, report on one, or adopt one",
        usage="megahybrid data tokenizer INPUT... --output NEW.model --vocab-size N\n"
        "       megahybrid data tokenizer report TOKENIZER INPUT... [--against OTHER]\n"
        "       megahybrid data tokenizer adopt TOKENIZER --output NEW",
    )
    _add_inputs(tokenizer)
    tokenizer.add_argument("--output", help=".model to write")
    tokenizer.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="tokens of the vocabulary"
    )
    tokenizer.add_argument(
        "--kind", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: bpe)"
    )
    tokenizer.add_argument(
        "--sample-mib", type=_from(1, LARGEST_MIB), default=64, help="MiB of text to train on"
    )
    tokenizer.add_argument(
        "--special-token", action="append", default=[], help="text that is one token; repeatable"
    )
    tokenizer.add_argument(
        "--weight", type=float, action="append", help="share of the text, given once for each input"
    )
    tokenizer.add_argument(
        "--digits", choices=("apart", "together"), default="apart", help="whether digits may merge"
    )
    tokenizer.add_argument(
        "--spaces",
        choices=("runs", "single"),
        default="runs",
        help="whether runs of spaces may merge",
    )
    tokenizer.add_argument(
        "--chat",
        choices=CHAT_TEMPLATES,
        metavar="TEMPLATE",
        help="train, adopt: reserve the special tokens of a chat template: "
        + ", ".join(CHAT_TEMPLATES),
    )
    tokenizer.add_argument("--against", metavar="OTHER", help="report: compare with this one")
    tokenizer.add_argument("--eod", help="report, adopt: the token that follows every document")

    tokenize = commands.add_parser("tokenize", help="turn text into shuffled token files")
    _add_inputs(tokenize)
    tokenize.add_argument("--tokenizer", required=True, help=".model or tokenizer.json")
    tokenize.add_argument("--output", required=True, help="new folder")
    tokenize.add_argument("--held-out", type=_fraction, default=0.0, help="share held out, 0 to 1")
    tokenize.add_argument(
        "--longest", type=_from(0), default=0, help="how many longest to hold out"
    )
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
        "--memory-mib",
        type=_from(1, LARGEST_MIB),
        default=256,
        help="MiB of memory for the shuffle",
    )
    tokenize.add_argument("--shard-tokens", type=_from(1, 2**31 - 1), default=2**30)
    tokenize.add_argument(
        "--max-bad-fraction",
        type=_fraction,
        default=0.05,
        help="share of the inputs' bytes that may be unreadable (default: 0.05)",
    )

    add_chat(tokenize)

    pack = commands.add_parser("pack", help="plan rows of whole documents for one length")
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
    verify.add_argument("path", help="dataset")
    verify.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="for files without a manifest"
    )

    inspect = commands.add_parser("inspect", help="show a dataset, or one step of a run")
    inspect.add_argument("path", help="dataset, run file or a run's folder")
    inspect.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="for files without a manifest"
    )
    inspect.add_argument("--tokenizer", help="to show documents as text")
    inspect.add_argument("--documents", type=_from(0), default=3, help="how many to show")
    inspect.add_argument("--picture", metavar="FILE.svg", help="draw lengths, or mix and rows")
    inspect.add_argument("--step", type=_from(1), default=1, help="step of a run, from 1")
    inspect.add_argument("--stage", help="count the step within this stage")
    inspect.add_argument("--rows", type=_from(1), default=4, help="rows of the step to show")

    audit = commands.add_parser("audit", help="prove from a run's ledger which tokens it read")
    audit.add_argument("run_directory", metavar="RUN", help="a run's folder")
    audit.add_argument("other", metavar="RUN2", nargs="?", help="compare with this run")


def _data(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.data import data

    if arguments.data_command == "demo":
        return _demo(arguments.chats)
    return data(arguments.data_command, **given(arguments))


def _demo(chats: bool) -> int:
    from megahybrid.data_prep.demo import make_demo

    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers())
    make_demo(
        lambda words: _data(parser.parse_args(["data", *words])),
        lambda line: print(line, flush=True),
        chats=chats,
    )
    return EXIT_DONE


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
    merge = commands.add_parser("merge", help="write several datasets as one, in order")
    shuffle = commands.add_parser("shuffle", help="shuffle the documents of datasets by a seed")
    split = commands.add_parser("split", help="split a dataset by hash of the documents")
    for parser, paths in ((merge, "+"), (shuffle, "+"), (split, 1)):
        parser.add_argument("paths", nargs=paths, help="datasets made with one tokenizer")
        parser.add_argument("--output", required=True, help="new folder")
        parser.add_argument("--shard-tokens", type=_from(1, 2**31 - 1), default=2**30)
    for parser in (shuffle, split):
        parser.add_argument("--seed", type=_from(-(2**62)), default=0)
        parser.add_argument(
            "--memory-mib", type=_from(1, LARGEST_MIB), default=256, help="MiB of memory"
        )
    split.add_argument("--held-out", type=_fraction, default=0.0, help="share held out, 0 to 1")
    split.add_argument("--longest", type=_from(0), default=0, help="how many longest to hold out")
    split.add_argument(
        "--deduplicate", action="store_true", help="keep only the first of equal documents"
    )

    imported = commands.add_parser("import", help="add a manifest to plain Megatron .bin and .idx")
    imported.add_argument("path", help="folder, prefix or .bin")
    imported.add_argument("--output", required=True, help="new folder")
    imported.add_argument("--tokenizer", help=".model or tokenizer.json that made the ids")
    imported.add_argument("--eod", help="the token that follows every document")
    imported.add_argument(
        "--vocab-size", type=_from(1, LARGEST_VOCABULARY), help="without --tokenizer"
    )
    imported.add_argument("--eod-id", type=_from(0, LARGEST_VOCABULARY), help="without --tokenizer")
    imported.add_argument("--shard-tokens", type=_from(1, 2**31 - 1), default=2**30)

    export = commands.add_parser("export", help="write one .bin and .idx that Megatron reads")
    export.add_argument("path", help="dataset")
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
        help="format of every file (default: by its content)",
    )
    parser.add_argument("--glob", default="**/*", help="which files of a folder")
    parser.add_argument("--field", default="text", help="field of a row that holds the text")
    parser.add_argument("--seed", type=_from(-(2**62)), default=0)
