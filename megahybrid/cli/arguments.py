"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[argparse.Namespace], int]


def described(
    commands: argparse._SubParsersAction, name: str, text: str
) -> argparse.ArgumentParser:
    """Add a command, or a command of a command, whose help is `text` in the list and on its own."""
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def command(
    commands: argparse._SubParsersAction, name: str, run: Run, text: str
) -> argparse.ArgumentParser:
    """Add a command that `run` carries out."""
    parser = described(commands, name, text)
    parser.set_defaults(run=run)
    return parser


# What the parser keeps beside the values of a command.
_OF_THE_PARSER = ("command", "verb", "data_command", "run", "words")


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of a command by name, as its function takes them."""
    return {name: value for name, value in vars(arguments).items() if name not in _OF_THE_PARSER}


def run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="fields to change, by dotted name: parallel.tensor=4",
    )


def checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint's folder, or a run's (its newest one)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--tensor",
        type=int,
        metavar="N",
        help="cut the model over N ranks, started here or by torchrun or srun "
        "(default: this process alone)",
    )


def context_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="share each text among N ranks (times those of --tensor), for lengths that one "
        "cannot hold",
    )


def changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="SCHEME.FIELD=VALUE",
        help="look at the model with a scheme changed: local.window=null",
    )


def named_data(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help=f"{what}, again for each one; NAME is what a suite calls it",
    )
