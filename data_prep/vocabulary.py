"""Training a tokenizer on the same inputs that `tokenize` reads."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from data_prep.documents import BadText, Document, Item, LongDocument, read_unit
from data_prep.inputs import Unit, cut_units, list_files
from megahybrid.data.manifest import TokenizerInfo, write_durably
from megahybrid.data.tokenizer import load_tokenizer, train_sentencepiece
from megahybrid.errors import DataError

SAMPLE_BYTES = 64 * 2**20
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
    pattern: str = "**/*",
    special_tokens: Sequence[str] = (),
) -> TokenizerInfo:
    """Trains on about `sample_bytes` of documents chosen by keyed hash; writes the model file.

    The same inputs and options give the same bytes.
    """
    target = Path(output)
    if target.suffix != ".model":
        raise DataError(f"output={target} does not end in .model. Name a file like bpe-4k.model.")
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"--vocab-size={vocab_size} has no room for the bytes and special tokens "
            f"({SMALLEST_VOCABULARY} at least). Use more, for example 4096."
        )
    units = list(cut_units(list_files(inputs, pattern)))
    model = train_sentencepiece(
        sampled_texts(units, sample_bytes, seed, text_field),
        vocab_size=vocab_size,
        kind=kind,
        special_tokens=special_tokens,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, model)
    return load_tokenizer(target).info


def sampled_texts(
    units: Sequence[Unit], sample_bytes: int, seed: int, text_field: str
) -> Iterator[str]:
    """About `sample_bytes` of documents, chosen by a hash of their text."""
    fraction = min(1.0, sample_bytes / max(1, sum(unit.bytes for unit in units)))
    limit = int(fraction * 2**64)
    for unit in units:
        for item in read_unit(unit, text_field):
            for text in _texts(item):
                if _draw(seed, text) < limit:
                    yield text


def _texts(item: Item) -> Iterator[str]:
    """A document, or the pieces of a long one up to where it breaks."""
    if isinstance(item, Document):
        yield item.text
    elif isinstance(item, LongDocument):
        with contextlib.suppress(BadText):
            yield from item.pieces


def _draw(seed: int, text: str) -> int:
    digest = hashlib.blake2b(
        text.encode(), digest_size=8, key=str(seed).encode(), person=b"sample"
    ).digest()
    return int.from_bytes(digest, "little")
