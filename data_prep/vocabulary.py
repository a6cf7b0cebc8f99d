"""Training a tokenizer on the same inputs that `tokenize` reads."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from pathlib import Path
from typing import Literal

from megahybrid.data.manifest import TokenizerInfo, write_durably
from megahybrid.data.tokenizer import load_tokenizer, train_sentencepiece
from megahybrid.data_prep.documents import BadText, Document, Item, LongDocument, read_unit
from megahybrid.data_prep.inputs import Unit
from megahybrid.data_prep.items import EMPTY, Fields
from megahybrid.data_prep.survey import PrintLine, print_nothing, survey
from megahybrid.errors import DataError

SAMPLE_BYTES = 64 * 2**20
LOOK_SHARE, LOOK_BYTES = 8, 2**29
SPARE = 1.5  # files hold more than text; what is drawn beyond the share is not used
SMALLEST_VOCABULARY = 260  # 256 bytes, unknown, begin and end of a document, and one piece


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    text_field: str = "text",
    format: str = "auto",
    pattern: str = "**/*",
    special_tokens: Sequence[str] = (),
    control_tokens: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    digits_apart: bool = True,
    space_runs: bool = True,
    print_line: PrintLine = print_nothing,
) -> TokenizerInfo:
    """Trains on about `sample_bytes` of documents chosen by keyed hash; writes the model file.

    `weights`: the inputs' shares of that text; without them as large as the inputs are.

    The same inputs and options give the same bytes.
    """
    target = Path(output)
    if target.suffix != ".model":
        raise DataError(f"output={target} does not end in .model. Name a file like bpe-4k.model.")
    if both := sorted({*special_tokens} & {*control_tokens}):
        raise DataError(f"--special-token={both[0]} is reserved by --chat as well. Leave it out.")
    if vocab_size < SMALLEST_VOCABULARY + len(control_tokens):
        raise DataError(
            f"--vocab-size={vocab_size} has no room for the bytes and special tokens "
            f"({SMALLEST_VOCABULARY + len(control_tokens)} at least). Use more, for example 4096."
        )
    if weights is not None and (
        len(weights) != len(inputs) or not all(0 < weight < inf for weight in weights)
    ):
        raise DataError(
            f"--weight is given {len(weights)} times with {len(inputs)} inputs ("
            f"{', '.join(f'{weight:g}' for weight in weights)}). Give each input a "
            "positive one, in their order, or none."
        )
    fields = Fields(text_field, format=format)
    found = survey(inputs, pattern, fields, print_line=print_line)
    model = train_sentencepiece(
        sampled_texts(found.units(), weights, sample_bytes, seed, fields, print_line),
        vocab_size=vocab_size,
        kind=kind,
        special_tokens=special_tokens,
        control_tokens=control_tokens,
        digits_apart=digits_apart,
        space_runs=space_runs,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, model)
    return load_tokenizer(target).info


def sampled_texts(
    sources: Sequence[Sequence[Unit]],
    weights: Sequence[float] | None,
    sample_bytes: int,
    seed: int,
    fields: Fields,
    print_line: PrintLine = print_nothing,
) -> Iterator[str]:
    """Yield about `sample_bytes` of documents, shared among the sources by weight.

    Without `weights` they are shared by size. A source with less than its share gives all it has.
    Where a source has much more, units of it are looked at in an order keyed by the seed until its
    share is full, LOOK_SHARE times as much text or LOOK_BYTES: a corpus is not read whole for a
    sample. `print_line` gets a line for each source of which something could not be read.
    """
    shares = weights or [sum(unit.bytes for unit in units) for units in sources]
    for number, (units, share) in enumerate(zip(sources, shares, strict=True)):
        quota = sample_bytes * share / max(1e-300, sum(shares))
        looked = min(sum(unit.bytes for unit in units), max(LOOK_SHARE * quota, LOOK_BYTES))
        limit = int(min(1.0, SPARE * quota / max(1, looked)) * 2**64)
        order = sorted(range(len(units)), key=lambda index: _draw(seed, f"{number} {index}"))
        left, seen = quota, _Seen()
        for item in chain.from_iterable(read_unit(units[index], fields) for index in order):
            for text in seen.texts(item):
                if left > 0 and _draw(seed, text) < limit:
                    left -= len(text.encode())
                    yield text
            if left <= 0:
                break
        if seen.bad:
            lost = seen.lost / seen.size if seen.size else 0.0
            reasons = ", ".join(f"{count:,} {why}" for why, count in seen.bad.items())
            print_line(f"input {number + 1}: {lost:.2%} of what was looked at is lost ({reasons})")


@dataclass
class _Seen:
    """The items that were looked at: how much there was, and how much was lost with bad ones."""

    size: float = 0.0
    lost: float = 0.0
    bad: Counter[str] = field(default_factory=Counter)

    def texts(self, item: Item) -> Iterator[str]:
        """A document, or the pieces of a long one up to where it breaks."""
        self.size += item.size
        if isinstance(item, Document):
            yield item.text
        elif isinstance(item, LongDocument):
            try:
                yield from item.pieces
            except BadText as error:
                self._left_out(str(error), item.size)
        else:
            self._left_out(item.reason, item.size)

    def _left_out(self, reason: str, size: float) -> None:
        if reason != EMPTY:
            self.bad[reason] += 1
            self.lost += size


def _draw(seed: int, text: str) -> int:
    digest = hashlib.blake2b(
        text.encode(), digest_size=8, key=str(seed).encode(), person=b"sample"
    ).digest()
    return int.from_bytes(digest, "little")
