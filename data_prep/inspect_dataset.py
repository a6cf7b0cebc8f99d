"""Showing what a dataset holds, on the console."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import load_tokenizer

SHOWN_CHARACTERS = 400
BAR = 30


def inspect_dataset(
    path: str, vocab_size: int | None, tokenizer: str | None, documents: int
) -> None:
    """Prints counts, the lengths of documents as bars, and the first documents."""
    dataset = TokenDataset(path, vocab_size=vocab_size)
    console = Console()
    console.print(
        f"{path}: {dataset.documents:,} documents, {dataset.tokens:,} tokens, "
        f"{len(dataset.shards)} shards, vocab_size={dataset.vocab_size}, eod_id={dataset.eod_id}",
        highlight=False,
        soft_wrap=True,
    )
    if dataset.manifest is not None:
        console.print(dataset.manifest.command, style="dim", highlight=False, soft_wrap=True)
        console.print(_histogram(dataset))
    text = load_tokenizer(tokenizer) if tokenizer else None
    if text is not None:
        dataset.check_tokenizer(text.info.sha256, "--tokenizer")
    for index in range(min(documents, dataset.documents)):
        tokens = dataset.document(index)
        console.rule(f"document {index}: {len(tokens):,} tokens")
        part = tokens[:SHOWN_CHARACTERS].tolist()
        shown = text.decode(part) if text else " ".join(map(str, part))
        console.print(Text(shown[:SHOWN_CHARACTERS]), soft_wrap=True)


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
