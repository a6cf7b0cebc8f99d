"""Commands for a beginning: init, schema, and completion for a shell."""

import argparse
from pathlib import Path

from megahybrid.cli.arguments import command
from megahybrid.errors import EXIT_DONE, ConfigError

SHELLS = ("bash", "zsh", "fish")
SIZES = ("tiny", "10m", "150m", "1b", "8b")


def add_start_commands(commands: argparse._SubParsersAction) -> None:
    """Add init, schema and completion."""
    init = command(commands, "init", _init, "from a folder of text to a run file and what follows")
    init.add_argument("target", type=Path, metavar="DIR", help="folder to make, with run.yaml")
    init.add_argument("--data", required=True, metavar="FOLDER", help="texts to train on")
    init.add_argument(
        "--size",
        metavar="SIZE",
        help=f"of the model: {', '.join(SIZES)} (default: what text and machine carry)",
    )
    init.add_argument(
        "--plan",
        default="rnope_swa",
        metavar="PLAN",
        help="layers: a name under configs/models/schemes, such as rope, nope, rnope_swa",
    )
    init.add_argument(
        "--lengths",
        metavar="N,N,…",
        help="tokens of a row in each stage: 2k,8k,32k (default: by size and documents)",
    )
    init.add_argument(
        "--chat", metavar="FILE", help="conversations for a last stage: .jsonl with messages"
    )
    init.add_argument(
        "--template",
        metavar="NAME",
        help="with --chat: chatml (default), llama3, cohere or plain",
    )
    init.add_argument(
        "--chat-field", metavar="FIELD", help="with --chat: what holds the messages (messages)"
    )
    schema = command(
        commands, "schema", _schema, "print the JSON schema by which editors check run files"
    )
    schema.add_argument(
        "kind",
        nargs="?",
        choices=("run", "suite", "site", "study"),
        default="run",
        help="kind of file",
    )
    completion = command(
        commands, "completion", _completion, "print what makes a shell complete our commands"
    )
    completion.add_argument("shell", choices=SHELLS, help="shell that is to complete them")


def _init(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.init import init

    return init(
        arguments.target,
        data=arguments.data,
        size=arguments.size,
        plan=arguments.plan,
        lengths=arguments.lengths,
        chat=arguments.chat,
        template=arguments.template,
        chat_field=arguments.chat_field,
    )


def _schema(arguments: argparse.Namespace) -> int:
    from megahybrid.config.schema import schema_text

    print(schema_text(arguments.kind), end="")
    return EXIT_DONE


def _completion(arguments: argparse.Namespace) -> int:
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise ConfigError(
            "completion needs the package argcomplete, which is not installed. "
            "Run `pip install argcomplete`."
        ) from None
    print(shellcode(["megahybrid"], shell=arguments.shell))
    return EXIT_DONE
