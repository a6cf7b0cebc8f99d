"""Conversations as OpenAI's chat format has them: read from a row, and judged before rendering."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
RESULTS = ("tool", "function", "ipython")  # of a call that the assistant made
ASSISTANT = "assistant"
TOOLS = "tools"  # the field beside the messages that holds what may be called


def conversation_text(row: Mapping[str, Any], field: str, *, sparse: bool = False) -> str | None:
    """The conversation of a row as one JSON text, or None where `field` holds no list.

    It has the keys messages and tools. Lists may be JSON texts themselves, as tables often have
    them. sparse: a null stands for a key that the row has not, as in Parquet's structures.
    """
    messages, tools = _value(row.get(field)), _value(row.get(TOOLS))
    if not isinstance(messages, list):
        return None
    if sparse:
        messages, tools = _without_nulls(messages), _without_nulls(tools)
    try:
        return json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # a date, a number in a table that JSON has not
        return None


def _value(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def problem_of(messages: Sequence[Any], tools: Any) -> str:
    """The reason why nothing can be learnt of a conversation; "" where something can."""
    if not messages:
        return "empty conversation"
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        return "tools are no list of objects"
    if not all(isinstance(message, dict) for message in messages):
        return "message that is no object"
    roles = [message.get("role") for message in messages]
    if None in roles:
        return "message without a role"
    if (unknown := next((role for role in roles if role not in ROLES), None)) is not None:
        return f"unknown role {str(unknown)[:40]!r}"
    return next(_faults(messages, roles), "")


def _faults(messages: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> Iterator[str]:
    for message in messages:
        if not _is_content(message.get("content")):
            yield "content that is no text"
        if message["role"] == ASSISTANT and not _calls(message) and not text_of(message).strip():
            yield "empty answer"
    if not any(text_of(message).strip() or _calls(message) for message in messages):
        yield "empty conversation"
    if ASSISTANT not in roles:
        yield "prompt only"
    before, open_call = "", False
    for role, message in zip(roles, messages, strict=True):
        if role in RESULTS and not open_call:
            yield "unbalanced: a tool's result without a call"
        if role == before and role in ("user", ASSISTANT):
            yield f"unbalanced: {role} after {role}"
        open_call = bool(_calls(message)) or (role in RESULTS and open_call)
        before = role
    if roles[-1] != ASSISTANT:
        yield f"unbalanced: ends with {roles[-1]}"


def _is_content(content: Any) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    )


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts one after another."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _calls(message: Mapping[str, Any]) -> Any:
    return message.get("tool_calls") or message.get("function_call")


def turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many messages there are up to and with each of the assistant's, the longest first."""
    ends = [n for n, message in enumerate(messages, 1) if message.get("role") == ASSISTANT]
    return ends[::-1]
