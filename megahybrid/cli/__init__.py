"""The command line. Parsing imports nothing heavy; each command imports what it needs."""

import functools
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megahybrid import __version__
from megahybrid.cli.checkpoints import add_stored_commands
from megahybrid.cli.data import add_data_commands
from megahybrid.cli.launch import add_launch_commands
from megahybrid.cli.models import add_checkpoint_commands, add_interop_commands
from megahybrid.cli.parser import Parser, called, finish
from megahybrid.cli.runs import add_run_commands, add_study_command
from megahybrid.cli.start import add_start_commands
from megahybrid.errors import EXIT_DONE, MegahybridError, from_exception, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one line and code 2."""
    _print_any_name()
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in ([], ["data"], ["checkpoint"], ["launch"]):
        words = [*words, "--help"]
    parsed, rest = parser.parse_known_args(words)
    parsed.words = words  # for ranks that are started with the same command
    # argparse ends a list of overrides at the first option, and takes an optional suite only ahead
    # of it; both may stand behind it as well.
    if rest and "suite" in parsed and parsed.suite is None and not rest[0].startswith("-"):
        parsed.suite = Path(rest.pop(0))
    strays = [word for word in rest if word.startswith("-") or "=" not in word]
    if strays or (rest and "overrides" not in parsed):
        called(parser, parsed).refuse(strays or rest)
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        return parsed.run(parsed)
    except MegahybridError as error:
        tell(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left (`| head`): nothing is wrong and nothing is owed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The last net: whatever refuses a path or a value with more to say stands closer to it.
        known = from_exception(error)
        if known is None:
            raise
        tell(str(known))
        return known.exit_code


def _print_any_name() -> None:
    """A name or a text that the terminal's encoding lacks is printed with escapes: it ends no
    command half-way."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@functools.cache  # of fifty parsers, which take longer to make than many a command
def _parser() -> Parser:
    parser = Parser(
        prog="megahybrid",
        description="Pretrain long-context language models whose layers differ in how they see "
        "position.",
    )
    parser.add_argument("--version", action="version", version=f"megahybrid {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_start_commands(commands)
    add_run_commands(commands)
    add_checkpoint_commands(commands)
    add_study_command(commands)
    add_interop_commands(commands)
    add_stored_commands(commands)
    add_data_commands(commands)
    add_launch_commands(commands)
    finish(parser)
    return parser
