"""What is asked of conversations, as a command was given it."""

from typing import Literal

from megahybrid.data.chat.template_file import read_template
from megahybrid.data.dataset import TokenDataset
from megahybrid.data_prep.chat_encoder import TODAY, ChatJob
from megahybrid.errors import DataError

DEFAULT_TEMPLATE = "chatml"
DEFAULT_FIELD = "text"


def chat_job(
    chat: str | None,
    field: str,
    template: str | None,
    chat_date: str | None,
    max_tokens: int | None,
    long_chats: Literal["leave-out", "cut"] | None,
) -> ChatJob | None:
    """The job that the options name; None where inputs are texts.

    Raises DataError where options have no meaning beside each other.
    """
    if chat is None:
        for option, value in (
            ("template", template),
            ("chat-date", chat_date),
            ("max-tokens", max_tokens),
            ("long-chats", long_chats),
        ):
            if value is not None:
                raise DataError(
                    f"--{option}={value} is for conversations, but --chat is not given. Add --chat "
                    "and the field that holds the messages, or leave it out."
                )
        return None
    if field != DEFAULT_FIELD:
        raise DataError(
            f"--field={field} and --chat={chat} both name the field to read. Leave --field out."
        )
    if long_chats is not None and max_tokens is None:
        raise DataError(
            f"--long-chats={long_chats} needs --max-tokens, beyond which a conversation is long."
        )
    return ChatJob(
        read_template(template or DEFAULT_TEMPLATE),
        chat_date or TODAY,
        max_tokens,
        long_chats or "leave-out",
    )


def counted_targets(path: str) -> int:
    """How many tokens of a dataset count as targets, eod included."""
    return TokenDataset(path).counted_targets()
