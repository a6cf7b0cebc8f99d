"""Encoding conversations: as a template renders them, with a mask of what the assistant wrote."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megahybrid.data.chat.conversation import problem_of, text_of, turns
from megahybrid.data.chat.guarded import GuardedTemplate
from megahybrid.data.chat.probe import check_template, counted, variables_of
from megahybrid.data.chat.render import NotRendered, Rendering
from megahybrid.data.chat.template_file import TemplateFile
from megahybrid.data.chat.tokens import answer_is_open
from megahybrid.data.tokenizer import Marked, Tokenizer
from megahybrid.data_prep.document_encoder import (
    BATCH_CHARACTERS,
    DocumentEncoder,
    bad_of,
    document_hash,
    document_keys,
)
from megahybrid.data_prep.items import Document, LongDocument
from megahybrid.data_prep.unit_files import RunWriter

TODAY = "2024-07-26"  # of templates that write a date: the day that Llama's falls back on
CUT = "cut at a turn"
TooLong = Literal["leave-out", "cut"]


@dataclass(frozen=True)
class ChatJob:
    """How conversations are rendered, and what becomes of one longer than `max_tokens`, eod
    included: it is left out, or cut behind the last turn of the assistant that fits."""

    template: TemplateFile
    today: str = TODAY
    max_tokens: int | None = None
    too_long: TooLong = "leave-out"

    def open(self, tokenizer: Tokenizer, path: str) -> GuardedTemplate:
        """The template at work, for the tokenizer of the file `path`."""
        return GuardedTemplate(self.template, variables_of(tokenizer, Path(path)), self.today)

    def identity(self) -> dict[str, Any]:
        """All that the tokens depend on, by the option that says it."""
        return {
            "template": self.template.name,
            "template_sha256": self.template.sha256,
            "chat_date": self.today,
            "max_tokens": self.max_tokens,
            "long_chats": self.too_long,
        }

    def words(self) -> list[str]:
        """The options of a command that would render the same."""
        words = ["--template", self.template.name, "--chat-date", self.today]
        if self.max_tokens is not None:
            words += ["--max-tokens", str(self.max_tokens), "--long-chats", self.too_long]
        return words


@dataclass(frozen=True)
class _Chat:
    """A conversation that was read, and the document that it stands in."""

    document: Document
    messages: Sequence[Mapping[str, Any]]
    tools: Any
    rendering: Rendering


class ChatEncoder(DocumentEncoder):
    """The encoder of a unit of conversations, whose text is their JSON."""

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        writer: RunWriter,
        job: ChatJob,
        template: GuardedTemplate,
    ) -> None:
        super().__init__(seed, tokenizer, writer)
        self.job, self.template = job, template
        spelt = check_template(template, tokenizer).spelt
        self.spelt = re.compile("|".join(map(re.escape, spelt)) or "(?!)")
        self.chats: list[_Chat] = []

    def add(self, document: Document) -> None:
        """Render a conversation, and encode it now or with others."""
        value = json.loads(document.text)
        messages, tools = value["messages"], value["tools"] or None
        if reason := problem_of(messages, tools):
            self.leave_out(bad_of(document, reason, document.text[:80]))
        elif found := self.spelt.search(document.text) or self._in_parts(messages):
            # Rendered, the words of a user could end the turn and begin one of the assistant.
            self.leave_out(bad_of(document, f"{found[0]} in a message", document.text[:80]))
        elif (rendering := self._render(document, messages, tools)) is not None:
            self.chats.append(_Chat(document, messages, tools, rendering))
            self.characters += len(rendering.text)
            if self.characters >= BATCH_CHARACTERS:
                self.flush()

    def _in_parts(self, messages: Sequence[Mapping[str, Any]]) -> re.Match[str] | None:
        """What contents spell whose parts a template may put side by side."""
        joined = (
            text_of(message) for message in messages if isinstance(message.get("content"), list)
        )
        return next(filter(None, map(self.spelt.search, joined)), None)

    def add_long(self, document: LongDocument) -> None:
        """Leave out what comes in pieces: no conversation does."""
        self.leave_out(bad_of(document, "text, not a list of conversations", ""))

    def flush(self) -> None:
        """Encode what waits."""
        chats, self.chats, self.characters = self.chats, [], 0
        encoded = self.tokenizer.encode_marked([chat.rendering.text for chat in chats])
        for chat, marked in zip(chats, encoded, strict=True):
            self._write(chat.document, chat.rendering, marked, chat)

    def _render(
        self, document: Document, messages: Sequence[Mapping[str, Any]], tools: Any
    ) -> Rendering | None:
        try:
            rendering = self.template.rendering(messages, tools)
        except NotRendered as error:
            self.leave_out(bad_of(document, str(error), document.text[:80]))
            return None
        reason = ""
        if not rendering.spans:
            reason = "no turn of the assistant in the rendering"
        elif "\0" in rendering.text:
            reason = "NUL character"
        if reason:
            self.leave_out(bad_of(document, reason, document.text[:80]))
        return None if reason else rendering

    def _write(
        self, document: Document, rendering: Rendering, marked: Marked, whole: _Chat | None
    ) -> None:
        """Write a conversation; whole: what it may be cut from where it is too long."""
        limit = self.job.max_tokens
        if (marked.ids == self.eod).any():
            self.leave_out(bad_of(document, "eod inside", document.text[:80]))
            return
        if limit is not None and len(marked.ids) + 1 > limit:
            if whole is None or self.job.too_long == "leave-out" or not self._cut(whole, limit):
                reason = f"longer than {limit:,} tokens"
                self.leave_out(bad_of(document, reason, document.text[:80]))
            return
        counts = counted(self.template, rendering, marked)
        if not counts.any():
            reason = "no turn of the assistant in the rendering"
            self.leave_out(bad_of(document, reason, document.text[:80]))
            return
        counts = np.append(counts, answer_is_open(marked, counts))
        digest = document_hash(self.seed)
        digest.update(rendering.text.encode())
        tokens = np.append(marked.ids, self.eod).astype(self.writer.dtype)
        self.writer.add(tokens, document_keys(digest), document.metadata, counts)

    def _cut(self, chat: _Chat, limit: int) -> bool:
        """Write the longest beginning that ends with an answer and fits; say whether one does."""
        for length in turns(chat.messages)[1:]:
            try:
                rendering = self.template.rendering(chat.messages[:length], chat.tools)
            except NotRendered:
                continue
            (marked,) = self.tokenizer.encode_marked([rendering.text])
            if len(marked.ids) + 1 <= limit and rendering.spans:
                self._write(chat.document, rendering, marked, None)
                # Listed, though nothing that a reader of the listing would call lost.
                self.bad.append(bad_of(chat.document, CUT, chat.document.text[:80], size=0.0))
                return True
        return False
