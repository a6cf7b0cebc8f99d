"""The conversations of `megahybrid init --chat`, looked at as text is, and the stage of them."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megahybrid.commands.init_machine import Machine
from megahybrid.commands.init_texts import Texts, drawn
from megahybrid.config.base import did_you_mean
from megahybrid.data.chat.conversation import problem_of, turns
from megahybrid.data.chat.guarded import GuardedTemplate
from megahybrid.data.chat.render import NotRendered
from megahybrid.data.chat.template_file import SHIPPED, TemplateFile, read_template
from megahybrid.data_prep.chat_encoder import TODAY
from megahybrid.data_prep.documents import Document, Item, read_unit
from megahybrid.data_prep.items import EMPTY, BadDocument, Fields
from megahybrid.data_prep.survey import survey
from megahybrid.errors import ConfigError, DataError, PathError
from megahybrid.printable import shortened

LOOK_CONVERSATIONS = 4000
LEAST = 20  # conversations, from which a tenth is held out
MOST_HELD_OUT = 200
# Other words than the text's take more tokens than the estimate has.
MARGIN = 1.3
EPOCHS = 3  # over the conversations; more of them where they are few, so as to have
LEAST_STEPS, LEAST_BATCH = 120, 1024  # steps of so many tokens
MOST_LOST = 0.05  # `tokenize` refuses when more is lost, unless it is told


@dataclass(frozen=True)
class Chats:
    """What was found; where a part of many was looked at, the rest in its proportion."""

    file: str
    template: TemplateFile
    field: str
    conversations: int
    answers: int
    characters: tuple[int, ...]  # rendered, of those that were looked at, the shortest first
    marks: int  # special tokens of a rendering at most
    bad: tuple[tuple[str, int], ...]  # reasons of what is left out, the most frequent first
    lost: float  # share of the bytes
    held_out: float  # the fraction that `tokenize` takes apart, 0 for none
    held_out_count: int
    whole: bool

    @property
    def median(self) -> int:
        """Characters of the middle conversation."""
        return self.characters[len(self.characters) // 2]

    def tokens(self, per_token: float) -> list[int]:
        """An estimate for each conversation that was looked at, eod included."""
        return [int(size / per_token) + self.marks + 1 for size in self.characters]

    def tokens_of_all(self, per_token: float) -> int:
        """An estimate of all of them together."""
        found = self.tokens(per_token)
        return sum(found) * self.conversations // len(found)


def look_at_chats(file: str, template: str, field: str) -> Chats:
    """Look at the conversations of a file or folder, the first LOOK_CONVERSATIONS of them.

    Raises DataError where nothing can be learnt of any, with the reasons that are most frequent.
    """
    said = shortened(file, 200)
    if template not in SHIPPED:
        hint = did_you_mean(template, SHIPPED)
        raise ConfigError(
            f"--template={template[:60]} is not one of {', '.join(SHIPPED)}.{hint} For a template "
            "of your own write run.yaml with one of these, and change the commands."
        )
    if not os.path.exists(file):
        raise PathError(f"--chat={said} does not exist. Name a file of conversations (.jsonl).")
    if not (os.path.isfile(file) or os.path.isdir(file)):  # a pipe would wait for a writer
        raise PathError(
            f"--chat={said} is neither a file nor a folder. Name a file of conversations (.jsonl)."
        )
    try:
        found = survey([file], fields=Fields(field, chat=True))
    except DataError as error:
        wrong = str(error).partition(" Narrow it by")[0].partition(" Correct the path")[0]
        raise DataError(f"{wrong} Name a file of conversations (--chat).") from None
    units = [unit for source in found.units() for unit in source]
    items = chain.from_iterable(read_unit(unit, Fields(field, chat=True)) for unit in units)
    looked = _Looked(read_template(template))
    for item in items:
        looked.add(item)
        if len(looked.rendered) == LOOK_CONVERSATIONS:
            break
    looked.close()
    if not looked.rendered:
        reasons = ", ".join(f"{count:,} {why}" for why, count in looked.bad.most_common(3))
        raise DataError(
            f"--chat={said} holds no conversation that can be learnt ({reasons or 'it is empty'}). "
            "Name a file whose rows have a list of messages with role and content; its field is "
            "named by --chat-field (default: messages)."
        )
    size = sum(one.size for one in found.files)
    whole = len(looked.rendered) < LOOK_CONVERSATIONS
    return looked.described(file, field, 1.0 if whole else max(1.0, size / looked.size), whole)


class _Looked:
    """Conversations as they are read, rendered by a template."""

    def __init__(self, template: TemplateFile) -> None:
        self.template = template
        self.guarded = GuardedTemplate(template, {}, TODAY)
        self.rendered: list[str] = []
        self.bad: Counter[str] = Counter()
        self.size = self.lost = 0.0
        self.answers = 0

    def add(self, item: Item) -> None:
        """Render a conversation, or count why it is left out."""
        self.size += item.size
        reason = self._render(item)
        if reason and reason != EMPTY:
            self.bad[reason] += 1
            self.lost += item.size

    def _render(self, item: Item) -> str:
        if isinstance(item, BadDocument):
            return item.reason
        if not isinstance(item, Document):
            return "text, not a list of conversations"
        value = json.loads(item.text)
        messages, tools = value["messages"], value["tools"] or None
        if reason := problem_of(messages, tools):
            return reason
        spelt = next((token for token in self.template.tokens if token in item.text), None)
        if spelt is not None:
            return f"{spelt} in a message"
        try:
            text = self.guarded.rendering(messages, tools).text
        except NotRendered as error:
            return str(error)
        self.rendered.append(text)
        self.answers += len(turns(messages))
        return ""

    def close(self) -> None:
        """End the template's process."""
        self.guarded.close()

    def described(self, file: str, field: str, scale: float, whole: bool) -> Chats:
        """What was found, as a value."""
        tokens = self.template.tokens
        marks = max(sum(text.count(token) for token in tokens) for text in self.rendered)
        fraction, held = _held_out(self.rendered)
        return Chats(
            file=file,
            template=self.template,
            field=field,
            conversations=int(scale * len(self.rendered)),
            answers=int(scale * self.answers),
            characters=tuple(sorted(map(len, self.rendered))),
            marks=marks,
            bad=tuple(self.bad.most_common()),
            lost=self.lost / self.size if self.size else 0.0,
            held_out=fraction,
            held_out_count=int(scale * held),
            whole=whole,
        )


def _held_out(rendered: Sequence[str]) -> tuple[float, int]:
    """The fraction that takes a tenth of them, MOST_HELD_OUT at most, and how many it takes."""
    if len(rendered) < LEAST:
        return 0.0, 0
    draws = sorted(drawn(0, text) for text in rendered)
    wanted = min(len(draws) // 10, MOST_HELD_OUT)
    fraction = round(draws[wanted - 1] + 0.0006, 3)  # rounded up to what one writes
    return fraction, sum(draw < fraction for draw in draws)


@dataclass(frozen=True)
class ChatStage:
    """What a run does with conversations: rows of `length`, in which so many do not fit, and
    `tokens` to train on."""

    chats: Chats
    length: int
    longer: int
    tokens: int
    epochs: float


def chat_stage(
    tree: dict[str, Any],
    chats: Chats,
    target: Path,
    texts: Texts,
    machine: Machine,
    most_batch_tokens: int,
) -> ChatStage:
    """Add the stage of conversations and its data to the tree of a run; return what was chosen.

    Raises ConfigError where no conversation fits into a row of the run.
    """
    lengths = [next(iter(stage["lengths"])) for stage in tree["stages"]]
    per_token = texts.characters_per_token(tree["model"]["vocab_size"])
    sizes = [int(MARGIN * size) for size in chats.tokens(per_token)]
    length = next((n for n in lengths if sizes[int(0.99 * (len(sizes) - 1))] <= n), lengths[-1])
    longer = sum(size > length for size in sizes)
    if longer == len(sizes):
        raise ConfigError(
            f"--chat={shortened(chats.file, 100)}: its conversations have some {sizes[0]:,} tokens "
            f"and more, and none fits into a row of {length:,}. Name longer rows by --lengths, or "
            "cut the conversations."
        )
    tokens = chats.tokens_of_all(per_token)
    least = length * machine.ranks
    wanted = max(LEAST_BATCH, EPOCHS * tokens // LEAST_STEPS)
    batch = max(1, min(most_batch_tokens, wanted) // least) * least
    last = tree["stages"][-1]
    micro = length * max(1, min(batch // machine.ranks, last["micro_batch_tokens"]) // length)
    batch = micro * machine.ranks * max(1, batch // (micro * machine.ranks))
    steps = max(LEAST_STEPS, round(EPOCHS * tokens / batch))
    first_rate = tree["stages"][0]["learning_rate"]["start"]
    rate = {
        "kind": "linear",
        "start": float(f"{0.3 * first_rate:.3g}"),
        "end": float(f"{0.02 * first_rate:.3g}"),
        "warmup_tokens": batch * (steps // 20),
    }
    stage = {
        "name": "chats",
        "tokens": steps * batch,
        "lengths": {length: 1},
        "batch_tokens": batch,
        "micro_batch_tokens": micro,
        "weights": {"chats": 1},
        "learning_rate": rate,
    }
    if "recompute" in last:
        stage["recompute"] = last["recompute"]
    tree["stages"].append(stage)
    tree["data"]["sources"]["chats"] = {"path": f"{target}/chats_{length}"}
    if chats.held_out:
        tree["data"]["held_out"]["chats"] = {"path": f"{target}/chats/held_out"}
    longer = longer * chats.conversations // len(sizes)
    return ChatStage(chats, length, longer, steps * batch, steps * batch / max(1, tokens))


def chat_commands(target: str, made: ChatStage) -> tuple[list[list[str]], list[list[str]]]:
    """The words of the commands before training, of `megahybrid data`, and of those behind it."""
    chats, model = made.chats, f"{target}/tokenizer.model"
    tokenize = ["tokenize", chats.file, "--chat", chats.field, "--tokenizer", model]
    tokenize += ["--output", f"{target}/chats", "--max-tokens", str(made.length)]
    if chats.template.name != "chatml":
        tokenize += ["--template", chats.template.name]
    if chats.held_out:
        tokenize += ["--held-out", f"{chats.held_out:g}"]
    if chats.lost > 0.8 * MOST_LOST:
        tokenize += ["--max-bad-fraction", f"{min(1.0, round(chats.lost + 0.05, 2)):g}"]
    pack = [
        "pack",
        f"{target}/chats/train",
        "--length",
        str(made.length),
        "--output",
        f"{target}/chats_{made.length}",
    ]
    behind = [["evaluate", f"{target}/run", "chat"]] if chats.held_out else []
    behind += [["sample", f"{target}/run", "--chat", chats.template.name]]
    return [tokenize, pack], behind


def chat_findings(made: ChatStage, per_token: float) -> list[str]:
    """What was found of conversations, a line each."""
    chats = made.chats
    left_out = ", ".join(f"{count:,} {why}" for why, count in chats.bad[:3])
    left_out += ", …" if len(chats.bad) > 3 else ""
    held_out = f"{chats.held_out_count:,}, drawn by hash" if chats.held_out else "none of so few"
    return [
        f"conversations: {chats.conversations:,} with {chats.answers:,} answers"
        f"{'' if chats.whole else ' (a part was looked at)'}, some "
        f"{chats.tokens_of_all(per_token):,} tokens in {chats.template.name}; left out: "
        f"{left_out or 'none'}; held out: {held_out}",
        f"rows of {made.length:,} hold them; longer than that may be {made.longer:,}, which "
        "`tokenize` leaves out, or cuts behind an answer by --long-chats cut; "
        f"{made.epochs:.2g} times over",
    ]
