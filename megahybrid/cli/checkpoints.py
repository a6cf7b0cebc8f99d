"""`megahybrid checkpoint …`: the commands of checkpoints that are there."""

import argparse
from pathlib import Path

from megahybrid.cli.arguments import command, described


def add_stored_commands(commands: argparse._SubParsersAction) -> None:
    """Add `checkpoint` with its own commands."""
    text = "list, show, verify, compare, average, fuse, collapse and resize checkpoints"
    parser = command(commands, "checkpoint", _checkpoint, text)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    listed = described(verbs, "list", "a run's checkpoints, newest first")
    listed.add_argument("run_directory", type=Path, metavar="RUN", help="a run's folder")
    show = described(verbs, "show", "what one checkpoint holds")
    _one(show)
    verify = described(verbs, "verify", "read every byte; of a run's folder: every checkpoint's")
    verify.add_argument("path", type=Path, metavar="PATH", help="a checkpoint's folder or a run's")
    diff = described(verbs, "diff", "which parameters changed from A to B, and by how much")
    for name in ("a", "b"):
        help_text = "a checkpoint's folder, or a run's (its newest one)"
        diff.add_argument(name, type=Path, metavar=name.upper(), help=help_text)
    diff.add_argument("--moments", action="store_true", help="the optimizer's moments as well")
    diff.add_argument("--rows", type=int, default=20, metavar="N", help="lines at most")
    mean = described(verbs, "average", "the mean of several checkpoints' weights")
    mean.add_argument("paths", type=Path, nargs="+", metavar="CHECKPOINT")
    mean.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    mean.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help="of each (default: the same)"
    )
    fused = described(
        verbs, "fuse", "give layers a second view of their keys, to begin with unused"
    )
    _one(fused)
    fused.add_argument(
        "--plan", type=Path, required=True, metavar="YAML", help="a run file with fused layers"
    )
    one_view = described(verbs, "collapse", "leave one view of keys to heads that use one of two")
    _one(one_view)
    one_view.add_argument(
        "--analysis", type=Path, metavar="JSON", help="a result of analyse: shares by token"
    )
    one_view.add_argument(
        "--within", type=float, metavar="X", help="of 0 or 1: the mean share of such a head (0.01)"
    )
    for verb in (fused, one_view):
        verb.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="folder to write to"
        )
    grown = described(verbs, "resize-vocab", "rows for the tokens that a new tokenizer adds")
    _one(grown)
    for name, wanted, text in (
        ("--tokenizer", True, "the new tokenizer: the old one's tokens, and more behind them"),
        ("--out", True, "folder to write to"),
        ("--old-tokenizer", False, "what the model was trained with (default: the run's own)"),
    ):
        grown.add_argument(name, type=Path, required=wanted, metavar="PATH", help=text)
    for verb in (listed, show, verify, diff):
        verb.add_argument("--json", action="store_true", help="print JSON")


def _one(parser: argparse.ArgumentParser) -> None:
    help_text = "a checkpoint's folder, or a run's (its newest one)"
    parser.add_argument("path", type=Path, metavar="CHECKPOINT", help=help_text)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from megahybrid.commands import checkpoint

    match arguments.verb:
        case "list":
            return checkpoint.list_checkpoints(arguments.run_directory, as_json=arguments.json)
        case "show":
            return checkpoint.show(arguments.path, as_json=arguments.json)
        case "verify":
            return checkpoint.verify_checkpoints(arguments.path, as_json=arguments.json)
        case "diff":
            return checkpoint.diff(
                arguments.a,
                arguments.b,
                moments=arguments.moments,
                rows=arguments.rows,
                as_json=arguments.json,
            )
        case "resize-vocab":
            from megahybrid.commands.resize_vocab import resize_vocab

            return resize_vocab(
                arguments.path, arguments.tokenizer, arguments.out, arguments.old_tokenizer
            )
        case "average":
            return checkpoint.write_average(arguments.paths, arguments.out, arguments.shares)
        case "fuse":
            return checkpoint.fuse(arguments.path, arguments.plan, arguments.out)
        case "collapse":
            return checkpoint.collapse(
                arguments.path, arguments.out, arguments.analysis, arguments.within
            )
    raise AssertionError(arguments.verb)
