"""Showing one step of a run on the console: where its rows come from, and their documents."""

from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megahybrid.data.batches import Batch, make_batch
from megahybrid.data.counted import counted_targets
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import Mixture, RowPlan
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.data_prep.batch_picture import batch_picture
from megahybrid.data_prep.coloured_targets import coloured
from megahybrid.data_prep.inspect_dataset import shown_metadata, visible
from megahybrid.data_prep.trace import Step, epochs_in_words, find_step, load_run, open_mixture

WIDTH = 64
SHADES = "█▓"  # neighbours differ, so that each change is a boundary
FILLING = "·"
TEXT_TOKENS = 40
PICTURE_ROWS = 64


def show_batch(
    path: str,
    stage: str | None,
    step: int,
    rows: int,
    tokenizer: str | None = None,
    picture: str | None = None,
) -> None:
    """Prints step `step` (from 1) of the run (or of its stage) and `rows` of its rows.

    Documents are drawn in two shades and what fills the row after them as dots; the first words of
    each row's first documents follow.
    `picture` is an .svg to draw the mix and PICTURE_ROWS rows to.
    """
    run = load_run(path)
    mixture = open_mixture(run)
    directory = Path(path) if Path(path).is_dir() else None
    found = find_step(run, mixture, stage, step, directory)
    tokenizer_path = tokenizer or run.data.tokenizer
    text = load_tokenizer(tokenizer_path) if tokenizer_path else None
    console = Console(soft_wrap=True, highlight=False, markup=False)
    point = found.point
    title = (
        f"step {found.number} of the run, {point.step_in_stage + 1} of stage {point.stage.name}: "
        f"{point.rows} rows of {point.length:,} tokens"
    )
    console.print(f"{title}, learning rate {point.learning_rate:.3g}")
    _print_mix(console, mixture, found)
    chosen = found.plans[:rows]
    batch = make_batch(mixture.datasets, chosen, point.length, run.data.documents)
    for number, plan in enumerate(chosen):
        at = _place(mixture, plan.source, point.length)
        _print_row(console, number, plan, batch, (mixture.datasets[plan.source], at), text)
    if picture is not None:
        drawn = found.plans[:PICTURE_ROWS]
        starts = make_batch(mixture.datasets, drawn, point.length, run.data.documents).starts
        Path(picture).write_text(batch_picture(title, found.plans, starts, point.stage.weights))
        console.print(f"\n{visible(picture)} written")


def _print_mix(console: Console, mixture: Mixture, step: Step) -> None:
    """The sources of a step; of those with a mask, how many targets count."""
    plans, epochs = step.plans, mixture.epochs(step.state)
    rows = Counter(plan.source for plan in plans)
    masked = any(mixture.datasets[name].masked for name in rows)
    table = Table("source", "rows", "share", *(["targets"] if masked else []), "epochs so far", "")
    for name, count in sorted(rows.items()):
        share, dataset = count / len(plans), mixture.datasets[name]
        spans = [plan.spans for plan in plans if plan.source == name]
        counted = "all"
        if dataset.masked:
            counted = f"{counted_targets(dataset, spans, step.point.length):,} count"
        table.add_row(
            name, f"{count}", f"{share:.1%}", *([counted] if masked else []),
            epochs_in_words(epochs, name), "█" * round(30 * share),
        )  # fmt: skip
    console.print(table)


def _place(mixture: Mixture, name: str, length: int) -> Path:
    """The folder that says which rows a source has for a length."""
    if name in mixture.plans:
        return mixture.plans[name][length].folder
    return mixture.datasets[name].path


def _print_row(
    console: Console,
    number: int,
    plan: RowPlan,
    batch: Batch,
    source: tuple[TokenDataset, Path],
    text: Tokenizer | None,
) -> None:
    (dataset, place), starts, targets = source, batch.starts[number], batch.targets[number]
    length, filled = len(starts), sum(size for _, size in plan.spans)
    first = np.unique(starts[:filled])
    spans = ", ".join(f"{start:,} + {size:,}" for start, size in plan.spans[:4])
    more = f" and {len(plan.spans) - 4} more" if len(plan.spans) > 4 else ""
    filling = f", {length - filled:,} filling" if filled < length else ""
    console.print(
        f"\nrow {number}: {plan.source} ({visible(str(place))}), tokens {spans}{more}; "
        f"{len(first)} documents{filling}, {int((targets >= 0).sum()):,} of {length:,} targets "
        "count"
    )
    # One character stands for length / WIDTH tokens and has the shade of its first one's document.
    columns = (np.arange(WIDTH) * length) // WIDTH
    which = np.searchsorted(first, starts[columns])
    console.print(
        "".join(
            SHADES[index % 2] if column < filled else FILLING
            for column, index in zip(columns, which, strict=True)
        )
    )
    for begin in first[:5].tolist():
        end = next((int(other) for other in first if other > begin), filled)
        ids = batch.tokens[number, begin : min(end, begin + TEXT_TOKENS)].tolist()
        where = f"  {begin:>8,} {end - begin:>8,} tokens  "
        if dataset.masked:
            # A target stands where the token before it does.
            counts = [False, *(targets[begin : begin + len(ids) - 1] >= 0).tolist()]
            console.print(Text(where), _one_line(coloured(ids, counts, text)))
        else:
            shown = text.decode(ids) if text else " ".join(map(str, ids[:12]))
            console.print(Text(f"{where}{shown[:100]!r}"))
        if dataset.has_metadata:
            metadata = dataset.metadata(dataset.document_at(_token_at(plan, begin)))
            console.print(Text(f"{'':>27}{shown_metadata(metadata)}"), style="dim")
    if len(first) > 5:
        console.print(f"  … and {len(first) - 5} documents more")


def _one_line(text: Text) -> Text:
    return Text("⏎").join(text.split("\n"))[:160]


def _token_at(plan: RowPlan, column: int) -> int:
    """Return the token of its source that stands in a column of a row."""
    for start, size in plan.spans:
        if column < size:
            return start + column
        column -= size
    raise IndexError(column)
