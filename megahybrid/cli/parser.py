"""The parser of every command: argparse's, with a hint where a word is nearly right, and with
defaults and an example in every help text."""

import argparse
import difflib
from collections.abc import Iterable, Iterator
from typing import NoReturn

from megahybrid.cli.examples import EXAMPLES, HELP

LONGEST = 100  # characters of a word that is compared: that takes the product of both


def near(word: str, known: Iterable[str]) -> str:
    """ " Did you mean train?" where one of the known words is like this one, or nothing."""
    if len(word) > LONGEST:
        return ""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """A parser that says what may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Write how the command is used and what is wrong; ends with code 2."""
        argument, _, rest = message.partition(": invalid choice: ")
        if rest:
            word = rest.split(" (choose from", 1)[0].strip("'\"")
            name = argument.removeprefix("argument ")
            known = self._choices(name)
            if name == "COMMAND":
                message = f"{word} is no command.{near(word, known)} {self.prog} --help lists them."
            else:
                message = f"{name}: {word} is not one of {', '.join(known)}.{near(word, known)}"
        super().error(message)

    def _choices(self, name: str) -> list[str]:
        for action in self._actions:
            names = (action.metavar, action.dest, "/".join(action.option_strings))
            if action.choices is not None and name in names:
                return [str(choice) for choice in action.choices]
        return []

    def refuse(self, words: list[str]) -> NoReturn:
        """Refuse words that are no options of this command, with what may have been meant."""
        options = [o for action in self._actions for o in action.option_strings]
        hint = near(words[0].partition("=")[0], options) if words[0].startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join(words)}.{hint}")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each default that says something, and an example whose lines stay."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help is None or "default" in action.help or action.nargs == 0
        # 0 is a default like another; it equals False.
        nothing = action.default is None or action.default is False or action.default in ([], "")
        if told or nothing or action.default == argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


def commands_of(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every parser with the words that lead to it, the first one's none."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands_of(child, (*words, name))


def finish(parser: argparse.ArgumentParser) -> None:
    """Give every command's help its defaults and its example."""
    for words, child in commands_of(parser):
        child.formatter_class = _Help
        for action in child._actions:
            if action.help is None:
                action.help = HELP.get(action.dest)
        examples = EXAMPLES.get(" ".join(words), ())
        if examples:
            head = "example" + "s" * (len(examples) > 1)
            child.epilog = "\n".join([f"{head}:", *(f"  {line}" for line in examples)])


def called(parser: Parser, parsed: argparse.Namespace) -> Parser:
    """The parser of the command that was called."""
    words = [getattr(parsed, name, None) for name in ("command", "verb", "data_command")]
    named = tuple(word for word in words if word)
    found = dict(commands_of(parser)).get(named, parser)
    return found if isinstance(found, Parser) else parser
