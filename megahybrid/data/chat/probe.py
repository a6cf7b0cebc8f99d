"""Trying a template on a small conversation before any work: what cannot do is refused by name."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megahybrid.data.chat.guarded import GuardedTemplate
from megahybrid.data.chat.render import NO_PREFIX, NotRendered, Rendering
from megahybrid.data.chat.template_file import SHIPPED, template_variables
from megahybrid.data.chat.tokens import counts_of, trimmed
from megahybrid.data.token_file import Array
from megahybrid.data.tokenizer import Marked, Tokenizer
from megahybrid.errors import DataError

SYSTEM = {"role": "system", "content": "Answer with a word."}
TURNS = (
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Name another."},
    {"role": "assistant", "content": "Green."},
)
PROBES = ([SYSTEM, *TURNS], [*TURNS], [*TURNS[:2]])  # not every template has them all
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Checked:
    """What a template and a tokenizer are to each other.

    spelt: the special tokens that no message may spell. end_id: the token that ends a turn of the
    assistant; eod where the template has none of its own.
    """

    spelt: tuple[str, ...]
    end_id: int


def variables_of(tokenizer: Tokenizer, path: Path) -> dict[str, str]:
    """The special tokens that a template may call by name, bos_token and the like."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    found = {"bos_token": "<s>"} if "<s>" in tokenizer.control_tokens else {}
    if (eod := names.get(tokenizer.info.eod_id)) is not None:
        found["eos_token"] = eod
    return found | template_variables(path)


def check_template(guarded: GuardedTemplate, tokenizer: Tokenizer) -> Checked:
    """Try a template with a tokenizer. Raises DataError where it cannot do."""
    template = guarded.template
    lacking = [token for token in template.tokens if token not in tokenizer.special_tokens]
    _refuse_lacking(template.name, lacking)
    rendering = _tried(guarded)
    _refuse_lacking(
        template.name,
        [t for t in SPECIAL.findall(rendering.text) if t not in tokenizer.special_tokens],
    )
    (marked,) = tokenizer.encode_marked([rendering.text])
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    eod = tokenizer.info.eod_id
    if (marked.ids == eod).any():
        raise DataError(
            f"template {template.name} writes {names.get(eod, eod)} within conversations, which "
            f"ends documents (eod_id={eod}). Name another token for that with --eod."
        )
    written = {names[token] for token in marked.ids[marked.special].tolist()}
    counts = counted(guarded, rendering, marked)
    last = int(np.flatnonzero(counts)[-1])
    end = int(marked.ids[last]) if marked.special[last] else eod
    return Checked(tuple(sorted(tokenizer.control_tokens | written)), end)


def counted(guarded: GuardedTemplate, rendering: Rendering, marked: Marked) -> Array:
    """Whether each token of a rendering is the assistant's."""
    spans = rendering.spans
    if not guarded.has_generation:
        spans = trimmed(marked, spans, rendering.text)
    return counts_of(marked, spans)


def _refuse_lacking(template: str, lacking: list[str]) -> None:
    if lacking:
        tokens = ", ".join(dict.fromkeys(lacking))
        name = template if template in SHIPPED else next(iter(SHIPPED))
        raise DataError(
            f"template {template} writes {tokens}, special tokens that the tokenizer has not. "
            f"Train one with `data tokenizer --chat {name}`, add them with `data tokenizer adopt "
            f"--chat {name}`, or use --template plain, which needs none."
        )


def _tried(guarded: GuardedTemplate) -> Rendering:
    reason = ""
    name = guarded.template.name
    for messages in PROBES:
        try:
            rendering = guarded.rendering(messages)
        except NotRendered as error:
            reason = reason or str(error)
            if str(error) == NO_PREFIX:
                raise DataError(
                    f"template {name} has no {{% generation %}} blocks, and its text of the first "
                    "messages of a conversation is no beginning of the text of all, so where the "
                    "assistant speaks cannot be told. Put {% generation %} around its words."
                ) from None
            continue
        spoken = [rendering.text[begin:end] for begin, end in rendering.spans]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not all(any(answer in words for words in spoken) for answer in answers):
            raise DataError(
                f"template {name} renders no turn of the assistant (its answer {answers[0]!r} of a "
                "small conversation is in none of its turns). Name another with --template."
            )
        return rendering
    raise DataError(
        f"template {name} renders none of the conversations it was tried with ({reason}). Correct "
        "it, or name another with --template."
    )
