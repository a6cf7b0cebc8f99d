"""Documents as text in which the targets that count are coloured."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from megahybrid.data.tokenizer import Tokenizer
from megahybrid.printable import printable

TARGET, OTHER = "green", "dim"


def coloured(ids: Sequence[int], counts: Sequence[bool], tokenizer: Tokenizer | None) -> Text:
    """Tokens as text, special ones by their names, or as ids; those that count in colour."""
    names = {}
    if tokenizer is not None:
        names = {token: name for name, token in tokenizer.special_tokens.items()}
    found = Text()
    marked = zip(ids, counts, strict=True)
    for (counted, name), run in groupby(marked, lambda one: (bool(one[1]), names.get(one[0]))):
        tokens = [token for token, _ in run]
        if tokenizer is None:
            words = " ".join(map(str, tokens)) + " "
        elif name is not None:
            words = name * len(tokens)
        else:
            words = tokenizer.decode(tokens)
        shown = "\n".join(map(printable, words.split("\n")))
        found.append(shown, style=TARGET if counted else OTHER)
    return found
