"""The tokens of a rendered conversation, and which of them are the assistant's."""

from collections.abc import Sequence

import numpy as np

from megahybrid.data.token_file import Array
from megahybrid.data.tokenizer import Marked


def counts_of(marked: Marked, spans: Sequence[tuple[int, int]]) -> Array:
    """Whether each token has a character of a span: transformers' rule, token by token."""
    counts = np.zeros(len(marked.ids), bool)
    for begin, end in spans:
        counts |= (marked.begins < end) & (marked.ends > begin)
        # A token of no character of its own (a byte of one that its last byte stands for) goes
        # with the character that it is a part of.
        empty = marked.begins == marked.ends
        counts |= empty & (marked.begins >= begin) & (marked.begins < end)
    return counts


def trimmed(
    marked: Marked, spans: Sequence[tuple[int, int]], text: str
) -> tuple[tuple[int, int], ...]:
    """Spans that were found without the template's help, up to the token that ends the turn.

    What follows the last special token of a turn and is only white space (the line end of chatml)
    is no part of it: nobody waits for it.
    """
    found = []
    for begin, end in spans:
        inside = marked.special & (marked.begins >= begin) & (marked.ends <= end)
        last = int(marked.ends[inside].max()) if inside.any() else end
        found.append((begin, last if not text[last:end].strip() else end))
    return tuple(found)


def answer_is_open(marked: Marked, counts: Array) -> bool:
    """Whether the conversation ends with the last answer, and no special token ends that.

    Then eod, which follows every document, is the end of the turn, and is to be learnt.
    """
    return bool(len(counts) and counts[-1] and not marked.special[-1])
