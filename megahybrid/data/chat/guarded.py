"""A chat template at work in a process of its own, with limits of time and memory.

Jinja's immutable sandbox keeps a template from the machine, not from a loop without end or a text
of a terabyte. Both end the process here, and the command says so in one line.
"""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from megahybrid.data.chat import render
from megahybrid.data.chat.render import NotRendered, Rendering
from megahybrid.data.chat.template_file import TemplateFile
from megahybrid.errors import DataError

SECONDS = 10.0  # of the process's own time, for one conversation
MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Limits:
    """How much one conversation may take to render."""

    seconds: float = SECONDS
    memory_bytes: int = MEMORY_BYTES


class GuardedTemplate:
    """A template that renders conversations one after another. Close it, or use it in a `with`.

    Raises DataError where the template is none, or goes beyond the limits.
    """

    def __init__(
        self,
        template: TemplateFile,
        variables: Mapping[str, str],
        today: str,
        limits: Limits | None = None,
    ) -> None:
        self.template, self.limits = template, limits or Limits()
        # -P: the folder of that file is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", render.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        told = {
            "source": template.source,
            "variables": dict(variables),
            "today": today,
            "seconds": self.limits.seconds,
            "memory_bytes": self.limits.memory_bytes,
        }
        try:
            self.has_generation = bool(self._answer(told)["has_generation"])
        except NotRendered as error:
            self.close()
            raise DataError(
                f"template {template.name} is no chat template ({error}). Correct it."
            ) from None

    def rendering(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        blocks: bool = True,
    ) -> Rendering:
        """The text, and where in it the assistant speaks. Raises NotRendered with the reason."""
        asked = {"messages": messages, "tools": tools, "prompt": False, "blocks": blocks}
        answer = self._answer(asked)
        return Rendering(answer["text"], tuple((begin, end) for begin, end in answer["spans"]))

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str:
        """The text up to where the assistant's next turn begins. Raises NotRendered."""
        asked = {"messages": messages, "tools": tools, "prompt": True, "blocks": True}
        return str(self._answer(asked)["text"])

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            # Escaped: no content can break the line, nor the encoding.
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise NotRendered(answer["problem"])
        return answer

    def _ended(self) -> DataError:
        self.close()
        code = self._process.returncode
        limits = self.limits
        if code == -signal.SIGPROF:
            why = f"took more than {limits.seconds:g} seconds"
        else:
            why = f"ended its process (code {code}; it may hold {limits.memory_bytes >> 20} MiB)"
        return DataError(
            f"template {self.template.name} {why} for one conversation. A template is foreign code "
            "and has limits: correct it, or name another with --template."
        )

    def close(self) -> None:
        """End the process."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(timeout=self.limits.seconds + 1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> "GuardedTemplate":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
