"""`megahybrid init`: from a folder of text to a run file and the commands that follow."""

import os
from pathlib import Path

from megahybrid.commands.init_chats import look_at_chats
from megahybrid.commands.init_file import SCHEMA_FILE, commands, findings, run_file
from megahybrid.commands.init_machine import this_machine
from megahybrid.commands.init_recipe import read_lengths, recipe
from megahybrid.commands.init_texts import look
from megahybrid.config.check import check_run
from megahybrid.config.parsing import parse
from megahybrid.config.run import RunConfig
from megahybrid.config.schema import schema_text
from megahybrid.config.yaml_file import parse_yaml
from megahybrid.data_prep.given_paths import check_paths
from megahybrid.errors import EXIT_DONE, ConfigError, DataError, PathError
from megahybrid.printable import shortened
from megahybrid.run_folder import holds_run, refuse_foreign_run_folder

RUN_FILE = "run.yaml"


def init(
    target: Path,
    *,
    data: str,
    size: str | None = None,
    plan: str = "rnope_swa",
    lengths: str | None = None,
    chat: str | None = None,
    template: str | None = None,
    chat_field: str | None = None,
) -> int:
    """Look at the text in `data`, write `target`/run.yaml with its schema, and print what was found
    and the commands that follow: tokenizer, tokens and training, and of the conversations in
    `chat`, where they are given, their tokens, rows and what is asked of the model in the end.

    `size` and `lengths` are chosen by the text and this machine when left out. Raises
    MegahybridError, one line, before anything is written: for a folder that holds a run or one of
    the files, for text that is none or too little for the size, for a size that this machine's
    memory cannot hold.
    """
    wanted = None if lengths is None else read_lengths(lengths)
    for option, value in (("template", template), ("chat-field", chat_field)):
        if chat is None and value is not None:
            raise ConfigError(
                f"--{option}={shortened(value, 60)} is for conversations. Name their file with "
                "--chat, or leave it out."
            )
    _refuse_target(target, data)
    texts, machine = look(data), this_machine()
    chats = None
    if chat is not None:
        chats = look_at_chats(chat, template or "chatml", chat_field or "messages")
    found = recipe(data, target, texts, machine, chats, size=size, plan=plan, lengths=wanted)
    text = run_file(data, str(target), texts, machine, found)
    # What is promised of the file is tried on the file.
    run = parse(RunConfig, parse_yaml(text, RUN_FILE))
    check_run(run, machine.ranks)
    assert run == found.run
    _write(target, text)
    print("\n".join(findings(data, texts, machine, found)))
    print(f"\n{target / RUN_FILE} is written; every line of it is yours to change. Then:\n")
    print("\n".join(f"  {line}" for line in commands(data, str(target), texts, found)))
    return EXIT_DONE


def _refuse_target(target: Path, data: str) -> None:
    """Raise MegahybridError for a folder that cannot become this run's."""
    said = shortened(str(target), 200)
    if target.exists() and not target.is_dir():
        raise PathError(f"{said} is a file, no folder. Name a new folder.")
    for place in (target, target / "run"):
        if holds_run(place):
            raise ConfigError(
                f"{shortened(str(place), 200)} holds a run. Name a new folder, or go on with that "
                "run by `megahybrid train`."
            )
    for name in (RUN_FILE, SCHEMA_FILE, "tokenizer.model", "data", "chats"):
        if os.path.lexists(target / name):
            raise ConfigError(
                f"{shortened(str(target / name), 200)} is there already, and nothing is "
                "overwritten. Name a new folder, or move it away."
            )
    refuse_foreign_run_folder(target, "DIR")
    try:
        check_paths("init", {"inputs": [data]})
    except DataError as error:
        raise DataError(str(error).replace("inputs=", "--data=", 1)) from None
    if not os.path.exists(data):
        raise PathError(f"--data={shortened(data, 200)} does not exist. Name a folder of text.")
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(data)):
        raise ConfigError(
            f"{said} lies in --data={shortened(data, 200)}, so that what is made would be read as "
            "text. Name a folder beside it."
        )


def _write(target: Path, text: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, content in ((SCHEMA_FILE, schema_text("run")), (RUN_FILE, text)):
        with open(target / name, "x", encoding="utf-8") as file:
            file.write(content)
