"""Context gain by position: what the tokens further back than the last c are worth, in nats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megahybrid.ledger import LEAST_DOCUMENTS, ContextGainEvent, bits_per_byte
from megahybrid.ledger.records import from_json
from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.figures import (
    DASHES,
    FAINT,
    SYMBOLS,
    Figure,
    Point,
    axis,
    colour,
    context_axis,
    layout,
    line_of_points,
)
from megahybrid.report.parts import Chart, Missing, Part, Table
from megahybrid.report.record import RunRecord


@dataclass(frozen=True)
class Gain:
    """The gain of one run on one set beyond one context, as it was last measured."""

    record: RunRecord
    stage: str
    told: ContextGainEvent


def gain_parts(records: Sequence[RunRecord], results: Sequence[list[EvaluationFile]]) -> list[Part]:
    """Draw a chart for each held-out set, with a line for each run and context."""
    parts: list[Part] = []
    gains: list[Gain] = []
    for record, mine in zip(records, results, strict=True):
        found = newest_gains(record, mine)
        gains += found
        if not found:
            parts.append(
                Missing(
                    f"what far context is worth ({record.name})",
                    "its context gain was not measured",
                    f"megahybrid evaluate {record.directory} --context-gain",
                )
            )
    charts: list[Part] = [
        _chart(held_out, [one for one in gains if one.told.set == held_out])
        for held_out in dict.fromkeys(one.told.set for one in gains)
    ]
    return charts + parts


def newest_gains(record: RunRecord, results: Sequence[EvaluationFile]) -> list[Gain]:
    """Return the gains of each set at the last step at which they were measured; where the command
    measured what the run had told, its own."""
    told = [
        (line.step, Gain(record, gain.stage or line.stage, gain))
        for line, gain in record.ledger.of(ContextGainEvent)
    ]
    for one in results:
        if one.kind == "context_gain":
            stage = str(one.result.get("stage", ""))
            told += [
                (one.step, Gain(record, stage, from_json(ContextGainEvent, gain)))
                for gain in one.result["context_gain"]
            ]
    last: dict[str, int] = {}
    for step, gain in told:
        last[gain.told.set] = max(step, last.get(gain.told.set, 0))
    newest = {
        (gain.told.set, gain.told.context): gain
        for step, gain in told
        if step == last[gain.told.set]
    }
    return [newest[key] for key in sorted(newest)]


def _chart(held_out: str, gains: list[Gain]) -> Chart:
    runs = list(dict.fromkeys(one.record.name for one in gains))
    contexts = sorted({one.told.context for one in gains})
    data: list[Figure] = []
    rows: list[list[Any]] = []
    for one in gains:
        run, place = runs.index(one.record.name), contexts.index(one.told.context)
        several = len(runs) > 1
        name = f"beyond {one.told.context:,}"
        data += line_of_points(
            [
                Point(
                    ((bucket.start + 1) * bucket.stop) ** 0.5, bucket.gain, bucket.low, bucket.high,
                    bucket.documents, f"{bucket.start:,}–{bucket.stop - 1:,}",
                )
                for bucket in one.told.by_position
            ],
            f"{one.record.name}, {name}" if several else name,
            ink=colour(run if several else place),
            dash=DASHES[place % 4] if several else "solid",
            symbol=SYMBOLS[place % 6],
        )  # fmt: skip
        rows += _rows(one)
    longest = max(one.told.length for one in gains)
    plan = layout(
        context_axis(longest, max(1, contexts[0] // 2)), axis("gain, nats per token"), height=400,
        shapes=[{
            "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0,
            "line": {"color": FAINT, "width": 1.5, "dash": "dot"},
        }],
    )  # fmt: skip
    strides = ", ".join(
        sorted({f"{g.told.context:,} to {g.told.context + g.told.stride - 1:,}" for g in gains})
    )
    says = (
        f"Held-out text “{held_out}”: the loss of each token where the model is shown only the "
        f"last tokens of its context ({strides}), less its loss with all of it. Above zero what "
        "stands further back helps, below zero it hurts. The same tokens on both sides; bars are "
        f"95 % intervals over documents. Hollow: fewer than {LEAST_DOCUMENTS} documents."
    )
    head = ("run", "after stage", "beyond", "from position", "to position", "targets", "documents",
            "gain, nats", "low", "high", "gain, bits per byte", "loss with all")  # fmt: skip
    slug = gains[0].record.slug if len(runs) == 1 else "all"
    return Chart(
        f"gain-{slug}-{held_out}", f"{held_out} · what far context is worth", says,
        {"data": data, "layout": plan}, Table(head, rows),
    )  # fmt: skip


def _rows(one: Gain) -> list[list[Any]]:
    told = one.told
    first: list[Any] = [one.record.name, one.stage, told.context]
    # All positions together have bits per byte as well: bytes are counted for the whole.
    bits = bits_per_byte(told.gain, told.tokens, told.bytes)
    whole = [told.context, told.length - 1, told.tokens, told.documents, told.gain, told.low,
             told.high, bits, told.loss]  # fmt: skip
    return [
        first + whole,
        *(
            [*first, bucket.start, bucket.stop - 1, bucket.tokens, bucket.documents, bucket.gain,
             bucket.low, bucket.high, None, None]
            for bucket in told.by_position
        ),
    ]  # fmt: skip


def gain_in_words(gains: Sequence[Gain]) -> str | None:
    """Say in a sentence what the gain is beyond the longest context that documents enough tell of;
    None where none does."""
    known = [
        one for one in gains
        if one.told.documents >= LEAST_DOCUMENTS and None not in (one.told.gain, one.told.low)
        and all(map(math.isfinite, (one.told.gain, one.told.low, one.told.high)))  # type: ignore
    ]  # fmt: skip
    if not known:
        return None
    told = max(known, key=lambda one: (one.told.context, one.told.tokens)).told
    assert told.gain is not None and told.low is not None and told.high is not None
    if told.low > 0:
        verdict = f"makes a token of “{told.set}” easier by {told.gain:.3f} nats"
    elif told.high < 0:
        verdict = f"makes a token of “{told.set}” harder by {-told.gain:.3f} nats"
    else:
        verdict = f"changes the loss on “{told.set}” by no amount that can be told from none"
    return (
        f"What stands further back than the last {told.context:,} tokens {verdict} "
        f"({told.low:+.3f} to {told.high:+.3f}, 95 %, {told.documents:,} documents)."
    )
