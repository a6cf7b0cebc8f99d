"""The options of `megahybrid data tokenize` for conversations."""

import argparse
from datetime import date

# As megahybrid.data.chat.template_file has them, which is not loaded for a help text.
CHAT_TEMPLATES = ("chatml", "llama3", "cohere", "plain")


def add_chat(tokenize: argparse.ArgumentParser) -> None:
    """Add what is asked of conversations."""
    tokenize.add_argument(
        "--chat",
        metavar="FIELD",
        help="inputs are conversations: this field of a row (messages) holds their messages",
    )
    tokenize.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="with --chat: chatml (default), llama3, cohere, plain, or a .jinja file",
    )
    tokenize.add_argument(
        "--chat-date",
        type=_day,
        metavar="YYYY-MM-DD",
        help="with --chat: the day that a template writes (default: 2024-07-26)",
    )
    tokenize.add_argument(
        "--max-tokens",
        type=_tokens,
        metavar="N",
        help="with --chat: the longest row that a conversation must fit in",
    )
    tokenize.add_argument(
        "--long-chats",
        choices=("leave-out", "cut"),
        help="with --max-tokens: leave longer ones out (default), or cut them behind an answer",
    )


def _tokens(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 2 <= value <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from 2 to {2**31 - 1}")
    return value


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a day like 2024-07-26") from None
