"""The chat template of an export, and the proof that transformers makes the same ids of a chat."""

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from megahybrid.checkpoint import durable
from megahybrid.data.chat.guarded import GuardedTemplate
from megahybrid.data.chat.probe import PROBES, check_template, variables_of
from megahybrid.data.chat.render import NotRendered
from megahybrid.data.chat.template_file import read_template
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.errors import InteropError
from megahybrid.interop.logit_proof import quiet
from megahybrid.interop.tokenizer import NONE

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class WrittenTemplate:
    """The template as written: the ids that end a turn and a document, and lines for the user."""

    end_id: int
    eod_id: int
    words: tuple[str, ...]


def write_template(folder: Path, named: str, tokenizer: str | None) -> WrittenTemplate:
    """Write a template beside a tokenizer that was written, and compare ids of conversations.

    named: as `--chat-template` has it; tokenizer: the file that the folder's was made of. Raises
    MegahybridError where the two do not fit, or one id differs.
    """
    template = read_template(named, "--chat-template")
    if tokenizer is None or tokenizer == NONE:
        raise InteropError(
            f"--chat-template={named} needs the tokenizer that it writes tokens of. Name its file "
            "with --tokenizer."
        )
    ours, file = load_tokenizer(tokenizer), Path(tokenizer)
    variables = variables_of(ours, file)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    # What the template writes must be read as the tokens it names.
    settings |= {"split_special_tokens": False}
    settings = {name: text for name, text in variables.items() if name == "bos_token"} | settings
    _write(folder / SETTINGS, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    _write(folder / FILE, template.source)
    with GuardedTemplate(template, variables, date.today().isoformat()) as guarded:
        checked = check_template(guarded, ours)
        count = _compare(folder, guarded, ours)
    return WrittenTemplate(
        checked.end_id,
        ours.info.eod_id,
        (
            f"chat template: {template.name}, the same ids for {count} conversations; a text that "
            "spells a special token is that token there",
        ),
    )


def _compare(folder: Path, guarded: GuardedTemplate, ours: Tokenizer) -> int:
    from transformers import AutoTokenizer

    with quiet():
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    count = 0
    for messages in PROBES:
        for asked in (False, True):
            some = messages[:-1] if asked else messages
            try:
                text = guarded.prompt(some) if asked else guarded.rendering(some).text
            except NotRendered:
                continue
            found = theirs.apply_chat_template(
                list(some), tokenize=True, add_generation_prompt=asked, return_dict=True
            )["input_ids"]
            (marked,) = ours.encode_marked([text])
            if list(found) != marked.ids.tolist():
                raise InteropError(
                    f"the written tokenizer gives other ids for a conversation of {len(some)} "
                    f"messages ({len(found)} of them, ours {len(marked.ids)}). Export without "
                    "--chat-template."
                )
            count += 1
    return count


def _write(path: Path, text: str) -> None:
    durable.write(path, [memoryview(text.encode())])
