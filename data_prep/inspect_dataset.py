"""Showing what a dataset holds, on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import LengthBin
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.data_prep.coloured_targets import TARGET, coloured
from megahybrid.errors import DataError
from megahybrid.printable import printable

SHOWN_CHARACTERS = 400
METADATA_CHARACTERS = 160
BAR = 30


def inspect_dataset(
    path: str,
    vocab_size: int | None,
    tokenizer: str | None,
    documents: int,
    picture: str | None = None,
) -> None:
    """Prints counts, the lengths of documents as bars, and the first documents.

    `picture` is an .svg to write the lengths to.
    """
    dataset = TokenDataset(path, vocab_size=vocab_size)
    if picture is not None and dataset.manifest is None:
        raise DataError(
            f"{path} has no manifest, so the lengths of its documents are not known and --picture "
            "would show nothing. Import it first with `megahybrid data import`."
        )
    text = load_tokenizer(tokenizer) if tokenizer else None
    if text is not None:
        dataset.check_tokenizer(text.info.sha256, "--tokenizer")
    console = Console(markup=False)  # a path in [brackets] is no style
    console.print(
        f"{visible(path)}: {dataset.documents:,} documents, {dataset.tokens:,} tokens, "
        f"{len(dataset.shards)} shards, vocab_size={dataset.vocab_size}, eod_id={dataset.eod_id}",
        highlight=False,
        soft_wrap=True,
    )
    if dataset.manifest is not None:
        console.print(
            visible(dataset.manifest.command), style="dim", highlight=False, soft_wrap=True
        )
        console.print(_histogram(dataset))
        if picture is not None:
            Path(picture).write_text(length_picture(dataset.manifest.length_histogram, path))
            console.print(f"{visible(picture)} written", highlight=False)
    if dataset.masked:
        counted = dataset.counted_targets()
        console.print(
            Text.assemble(
                f"{counted:,} of the tokens count as targets ({counted / dataset.tokens:.1%}): ",
                ("in this colour", TARGET),
            )
        )
    if dataset.plan is not None:
        info = dataset.plan.info
        console.print(
            f"plan: {info.rows:,} rows of {info.length:,}, {info.fill:.2%} full, {info.method}, "
            f"{info.documents:,} documents, {info.tokens:,} tokens",
            highlight=False,
        )
    for index in range(min(documents, dataset.documents)):
        tokens = dataset.document(index)
        console.rule(f"document {index}: {len(tokens):,} tokens")
        if dataset.has_metadata:
            console.print(
                Text(shown_metadata(dataset.metadata(index))), style="dim", soft_wrap=True
            )
        part = tokens[:SHOWN_CHARACTERS].tolist()
        if dataset.masked:
            counts = dataset.counts(dataset.document_span(index)[0], len(part))
            words = coloured(part, counts.tolist(), text)
            console.print(words[:SHOWN_CHARACTERS], soft_wrap=True)
            continue
        shown = text.decode(part) if text else " ".join(map(str, part))
        console.print(Text(visible(shown[:SHOWN_CHARACTERS])), soft_wrap=True)


def shown_metadata(metadata: dict[str, Any]) -> str:
    """Return the kept fields of a document's row on one line."""
    shown = ", ".join(f"{name} {value}" for name, value in metadata.items())[:METADATA_CHARACTERS]
    return printable(shown)


def visible(text: str) -> str:
    """The text with its control characters spelled out, but for the ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def _histogram(dataset: TokenDataset) -> Table:
    table = Table("tokens per document", "documents", "share of tokens", "")
    assert dataset.manifest is not None
    for entry in dataset.manifest.length_histogram:
        share = entry.tokens / max(1, dataset.tokens)
        table.add_row(
            f"{entry.min_tokens:,} – {2 * entry.min_tokens - 1:,}",
            f"{entry.documents:,}",
            f"{share:.1%}",
            "█" * round(BAR * share),
        )
    return table


def length_picture(histogram: Sequence[LengthBin], title: str) -> str:
    """An .svg of two rows of bars: share of the documents, and of the tokens, by length."""
    step, height = 44, 160
    width = 70 + step * len(histogram)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{2 * height + 110}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="13">{escape(title)}</text>',
    ]
    rows = (
        ("share of documents", [entry.documents for entry in histogram], "#4878a8"),
        ("share of tokens", [entry.tokens for entry in histogram], "#c4742c"),
    )
    for row, (name, values, colour) in enumerate(rows):
        base = 45 + (row + 1) * height + row * 15
        parts.append(f'<text x="10" y="{base - height + 12}">{name}</text>')
        for index, value in enumerate(values):
            share = value / max(1, sum(values))
            size = share / max(max(values) / max(1, sum(values)), 1e-9) * (height - 40)
            x = 40 + step * index
            parts.append(
                f'<rect x="{x}" y="{base - size:.1f}" width="{step - 8}" height="{size:.1f}" '
                f'fill="{colour}"/><text x="{x}" y="{base - size - 4:.1f}">{share:.1%}</text>'
            )
    for index, entry in enumerate(histogram):
        x = 40 + step * index
        parts.append(f'<text x="{x}" y="{2 * height + 78}">{_short(entry.min_tokens)}</text>')
    parts.append(f'<text x="40" y="{2 * height + 98}">tokens of a document, from (to twice)</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(tokens: int) -> str:
    for power, letter in ((30, "G"), (20, "M"), (10, "k")):
        if tokens >= 2**power:
            return f"{tokens >> power}{letter}"
    return str(tokens)
