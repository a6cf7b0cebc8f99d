"""Rendering conversations by a chat template, and where in the text the assistant speaks.

Run as a program of its own by `megahybrid.data.chat.guarded`: a template is foreign code, and what
Jinja's sandbox does not stop, an endless loop or a text that fills the memory, ends a process that
nobody misses. So this file imports nothing of the package. Templates see what transformers shows
them: its sandbox, filters and functions, and messages as it hands them over.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSISTANT = "assistant"
REASONING = ("reasoning_content", "thinking", "reasoning")
NO_PREFIX = "no prefix in the template's rendering"
SHOWN = 100  # characters of a template's own message

Message = Mapping[str, Any]


class Rendering(NamedTuple):
    """The text of a conversation, and (begin, end) of each stretch that the assistant wrote."""

    text: str
    spans: tuple[tuple[int, int], ...]


class NotRendered(Exception):
    """A conversation that the template does not render; the message is the reason."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: the assistant's words, as transformers marks them.

    The spans of a rendering are found while it is made: what stands before a block is already put
    out when the block is.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.used = False  # whether the template has such a block
        self.written = 0
        self.blocks: list[tuple[int, str]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        """Read a block."""
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_spoken"), [], [], body).set_lineno(line)

    def _spoken(self, caller: Any) -> str:
        text = str(caller())
        self.blocks.append((self.written, text))
        return text


class ChatTemplate:
    """A template that was compiled. Raises NotRendered where it is none.

    variables: what it sees beside the conversation, like `bos_token`. today: the day on which
    `strftime_now` says it is, so that the same conversations give the same text on any day.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], today: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        day = datetime.fromisoformat(today)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = day.strftime
        self._variables = dict(variables)
        with _reasons():
            self._template = environment.from_string(source)
        (self._generation,) = (
            one for one in environment.extensions.values() if isinstance(one, _Generation)
        )
        self.has_generation = self._generation.used

    def text(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False
    ) -> str:
        """The text of messages; prompt: with what begins the assistant's turn after them."""
        return self._render(messages, tools, prompt)[0]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        generation = self._generation
        generation.written, generation.blocks = 0, []
        parts = []
        with _reasons():
            for part in self._template.generate(
                messages=_as_shown(messages),
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **self._variables,
            ):
                parts.append(part)
                generation.written += len(part)
        text, spans = "".join(parts), []
        for begin, spoken in generation.blocks:
            end = begin + len(spoken)
            if text[begin:end] != spoken:
                raise NotRendered("a {% generation %} block within a macro or a filter")
            spans.append((begin, end))
        return text, [span for span in spans if span[0] < span[1]]

    def rendering(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, blocks: bool = True
    ) -> Rendering:
        """The text and the assistant's spans: by its blocks where it has them, else by prefixes.

        blocks: whether the template's own blocks are used. Raises NotRendered.
        """
        text, spans = self._render(messages, tools, False)
        if not (blocks and self.has_generation):
            spans = list(self._by_prefixes(text, messages, tools))
        return Rendering(text, tuple(spans))

    def _by_prefixes(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> Iterator[tuple[int, int]]:
        """Each turn of the assistant is what rendering it adds to rendering what is before it."""
        for number, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            before = self.text(messages[:number], tools, prompt=True)
            without = self.text(messages[:number], tools)
            after = text
            if number + 1 < len(messages):
                after = self.text(messages[: number + 1], tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise NotRendered(NO_PREFIX)
            begin = len(before)
            content = message.get("content")
            if before == without and isinstance(content, str) and content.strip():
                # The template begins no turn by itself: what it puts before the words is no answer.
                begin = max(begin, after.find(content.strip(), begin))
            if begin < len(after):
                yield begin, len(after)


def _as_shown(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: no null, reasoning under each name."""
    shown = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        shown.append(kept)
    return shown


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would read.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Raised(str(message))


class _Raised(jinja2.TemplateError):
    """What a template raised of its own will."""


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever a template can make Jinja raise into a reason on one line."""
    try:
        yield
    except NotRendered:
        raise
    except _Raised as error:
        raise NotRendered(f"refused by the template: {_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise NotRendered(f"line {error.lineno} of the template: {_line(error)}") from None
    except MemoryError:
        raise NotRendered("the template needs too much memory") from None
    except RecursionError:
        raise NotRendered("the template calls itself without end") from None
    except Exception as error:  # foreign code raises any kind
        raise NotRendered(f"the template fails: {_line(error)}") from None


def _line(error: Exception) -> str:
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return text[:SHOWN] if text.isprintable() else repr(text)[:SHOWN]


def serve(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Answer JSON lines: the first holds the template and its limits, each other a conversation."""
    told = json.loads(next(lines))
    resource.setrlimit(resource.RLIMIT_AS, (told["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Of the process's own time, so that a busy machine makes no difference; by default it ends it.
    signal.setitimer(signal.ITIMER_PROF, told["seconds"])
    try:
        template = ChatTemplate(told["source"], told["variables"], told["today"])
    except NotRendered as error:
        yield {"problem": str(error)}
        return
    yield {"has_generation": template.has_generation}
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, told["seconds"])
        asked = json.loads(line)
        try:
            if asked["prompt"]:
                found = Rendering(template.text(asked["messages"], asked["tools"], prompt=True), ())
            else:
                found = template.rendering(
                    asked["messages"], asked["tools"], blocks=asked["blocks"]
                )
            yield {"text": found.text, "spans": found.spans}
        except NotRendered as error:
            yield {"problem": str(error)}


def main() -> None:
    """Serve the standard input."""
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for answer in serve(iter(sys.stdin.readline, "")):
        # Escaped, so that no surrogate that a template makes breaks the line.
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
