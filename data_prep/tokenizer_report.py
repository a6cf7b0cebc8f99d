"""A report on a tokenizer with real text, and taking over one that exists."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megahybrid.data.chat.reserved import with_tokens
from megahybrid.data.manifest import TokenizerInfo, write_durably
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.survey import PrintLine, print_nothing, survey
from megahybrid.data_prep.vocabulary import sampled_texts
from megahybrid.errors import DataError

BATCH = 64
LONGEST = 12
# Text that tokenizers are known to lose: spaces, line ends, digits, rare and combined characters.
HARD_TEXTS = (
    "  two  spaces, a tab\tand a line\r\nend \n\n\n",
    "0123456789 3.14159 1,000,000 0xFF",
    "naïve café e\u0301 ﬁ ½ … “quotes” — dash",
    "日本語 中文 한국어 русский العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇫🇷 \U00010348 \u200b\u2060",
    "def f(x):\n    return {**x, 'a': [1, 2]}  # comment\n",
)


@dataclass
class SourceReport:
    """One input's counts."""

    name: str
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    tokens_against: int = 0
    changed: list[str] = field(default_factory=list)  # texts that do not come back


def report(
    tokenizer_path: str,
    inputs: Sequence[str],
    *,
    against: str | None = None,
    eod: str | None = None,
    sample_bytes: int = 16 * 2**20,
    seed: int = 0,
    text_field: str = "text",
    format: str = "auto",
    pattern: str = "**/*",
    print_line: PrintLine = print_nothing,
) -> tuple[list[SourceReport], Counter[int]]:
    """Counts for each input, on about `sample_bytes` of it, and how often each id was used."""
    tokenizer = load_tokenizer(tokenizer_path, eod)
    other = load_tokenizer(against) if against else None
    used: Counter[int] = Counter()
    found = []
    fields = Fields(text_field, format=format)
    looked = survey(inputs, pattern, fields, print_line=print_line)
    for given, units in zip(inputs, looked.units(), strict=True):
        source = SourceReport(str(given))
        texts = sampled_texts([units], None, sample_bytes, seed, fields, print_line)
        for batch in _batches(texts):
            _count(source, batch, tokenizer, other, used)
        found.append(source)
    return found, used


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _count(
    source: SourceReport,
    texts: list[str],
    tokenizer: Tokenizer,
    other: Tokenizer | None,
    used: Counter[int],
) -> None:
    encoded = tokenizer.encode(texts)
    source.documents += len(texts)
    source.bytes += sum(len(text.encode()) for text in texts)
    source.tokens += sum(map(len, encoded))
    values, counts = np.unique(
        np.concatenate([np.asarray(i, np.int64) for i in encoded]), return_counts=True
    )
    used.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    for text, ids in zip(texts, encoded, strict=True):
        if len(source.changed) < 3 and tokenizer.decode(ids) != text:
            source.changed.append(text)
    if other is not None:
        source.tokens_against += sum(map(len, other.encode(texts)))


def print_report(
    tokenizer_path: str,
    sources: Sequence[SourceReport],
    used: Counter[int],
    *,
    against: str | None = None,
    eod: str | None = None,
) -> None:
    """Bytes per token by source, vocabulary use, the longest tokens, and what is not lossless."""
    tokenizer = load_tokenizer(tokenizer_path, eod)
    console = Console(soft_wrap=True, highlight=False)
    columns = ["source", "documents", "MB", "tokens", "bytes/token"]
    table = Table(*columns, *(["other's", "tokens, other = 1"] if against else []))
    table.columns[0].overflow = "fold"
    for source in sources:
        row = [
            source.name,
            f"{source.documents:,}",
            f"{source.bytes / 1e6:.2f}",
            f"{source.tokens:,}",
            f"{source.bytes / max(1, source.tokens):.3f}",
        ]
        if against:
            row += [
                f"{source.bytes / max(1, source.tokens_against):.3f}",
                f"{source.tokens / max(1, source.tokens_against):.3f}",
            ]
        table.add_row(*row)
    console.print(table)
    size = tokenizer.info.vocab_size
    console.print(f"{len(used):,} of {size:,} ids are used ({len(used) / size:.1%})")
    spelled = sorted(((tokenizer.decode([i]), i) for i in used), key=lambda x: -len(x[0].encode()))
    console.print("longest: " + ", ".join(f"{text!r} ({i})" for text, i in spelled[:LONGEST]))
    changed = [text for source in sources for text in source.changed]
    if changed:
        console.print(
            f"NOT lossless: {len(changed)} texts or more decode to another text, for example"
        )
        for text in changed[:3]:
            console.print(f"  {text[:100]!r}", markup=False)
    else:
        console.print("lossless: every text decodes to itself")


def adopt(
    source: str, output: str, eod: str | None = None, reserved: Sequence[str] = ()
) -> tuple[TokenizerInfo, list[str]]:
    """Copies a sentencepiece model or tokenizer.json once it is known to work.

    `reserved` are special tokens that the copy gets behind all others, unless they are there.
    Returns what it is, and those of HARD_TEXTS that do not come back as they were.
    """
    file = Path(source)
    if file.is_dir():
        found = [file / "tokenizer.json", *sorted(file.glob("*.model"))]
        file = next((entry for entry in found if entry.exists()), found[0])
    tokenizer = load_tokenizer(file, eod)
    target = Path(output)
    if target.suffix != file.suffix:
        raise DataError(
            f"--output={target} does not end in {file.suffix} as {file} does. Name it so."
        )
    raw = file.read_bytes()
    made = with_tokens(raw, file, tokenizer, reserved) if reserved else raw
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, made)
    tokenizer = load_tokenizer(target, eod)
    encoded = tokenizer.encode(HARD_TEXTS)
    return tokenizer.info, [
        text for text, ids in zip(HARD_TEXTS, encoded, strict=True) if tokenizer.decode(ids) != text
    ]
