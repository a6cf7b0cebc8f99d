"""Charts of the suites and of the samples of attention that a training run made, over tokens."""

from collections.abc import Sequence
from typing import Any

from megahybrid.ledger import AttentionEvent
from megahybrid.report.attention_charts import kind_colours
from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.figures import (
    DASHES,
    SYMBOLS,
    axis,
    colour,
    layout,
    line,
    stage_bands,
    token_axis,
)
from megahybrid.report.parts import Chart, Missing, Part, Table
from megahybrid.report.record import RunRecord

FIGURES = {
    "entropy_bits": ("Entropy", "bits", "how many tokens a row is spread over, as a power of two"),
    "distance": ("Attended distance", "tokens", "how far back a token looks on average"),
    "sink": ("Sink", "share of attention", "what goes to the very first token"),
    "max_logit": ("Largest score", "before softmax", "grows without bound when training diverges"),
}


def suite_curves(records: Sequence[RunRecord], every: Sequence[list[EvaluationFile]]) -> list[Part]:
    """Draw a chart of each suite that was run at several steps: each task's score over tokens."""
    parts: list[Part] = []
    for record, results in zip(records, every, strict=True):
        suites: dict[str, list[EvaluationFile]] = {}
        for one in results:
            if one.kind == "suite":
                suites.setdefault(one.name, []).append(one)
        for name, runs in suites.items():
            if len({one.step for one in runs}) > 1:
                parts.append(_curve(record, name, runs, len(records) > 1))
    return parts


def _curve(record: RunRecord, name: str, runs: list[EvaluationFile], several: bool) -> Part:
    points: dict[tuple[str, int], list[tuple[int, float | None]]] = {}
    for one in runs:
        if "tokens" not in one.result:  # of an older version
            continue
        for task, told in one.result["tasks"].items():
            for row in told.get("by_length") or told["rows"]:
                scored = told["kind"] in ("ruler", "chat")
                label = f"{task} {row['task']}" if scored else task
                score = row["score"] if scored else row.get("token_accuracy")
                points.setdefault((label, row["length"]), []).append((one.result["tokens"], score))
    lengths = sorted({length for _, length in points})
    tasks = list(dict.fromkeys(task for task, _ in points))
    data = [
        line([tokens for tokens, _ in mine], [score for _, score in mine],
             f"{task}, {length:,}", colour=colour(tasks.index(task)),
             dash=DASHES[lengths.index(length) % 4], markers=SYMBOLS[lengths.index(length) % 6],
             hovertemplate="%{y:.3f}")
        for (task, length), mine in points.items()
    ]  # fmt: skip
    plan = layout(
        token_axis([record]), axis("answer tokens right", range=[-0.04, 1.04]), height=400,
        **stage_bands([record]),
    )  # fmt: skip
    rows: list[list[Any]] = [
        [task, length, tokens, score]
        for (task, length), mine in points.items() for tokens, score in mine
    ]  # fmt: skip
    title = f"{name} while training" if not several else f"{record.name}: {name} while training"
    return Chart(
        f"suite-{record.slug}-{name}", title,
        "The same questions asked of the model as it learns, by task and length.",
        {"data": data, "layout": plan}, Table(("task", "length", "tokens seen", "score"), rows),
    )  # fmt: skip


def telemetry_charts(records: Sequence[RunRecord]) -> list[Part]:
    """Draw the attention sampled while training, by kind of layer."""
    parts: list[Part] = []
    for record in records:
        events = record.ledger.of(AttentionEvent)
        if not events:
            parts.append(
                Missing(
                    f"attention while training ({record.name})",
                    "the run did not sample it",
                    "evaluate.attention_every_steps=100 in the run file",
                )
            )
            continue
        kinds = list(dict.fromkeys(kind for _, sample in events for kind in sample.by_kind))
        inks = kind_colours(kinds)
        for figure, (title, unit, meaning) in FIGURES.items():
            data = [
                line([at.tokens for at, _ in events],
                     [getattr(sample.by_kind.get(kind), figure, None) for _, sample in events],
                     f"{kind} layers", colour=inks[kind], markers="circle",
                     hovertemplate="%{y:.4g}")
                for kind in kinds
            ]  # fmt: skip
            plan = layout(
                token_axis([record]), axis(unit, rangemode="tozero"), **stage_bands([record])
            )
            name = f"{record.name}: {title}" if len(records) > 1 else title
            queries = events[-1][1].queries
            says = (
                f"{title} while training: {meaning}. Sampled from the last "
                f"{'?' if queries is None else queries} tokens of one training row."
            )
            parts.append(
                Chart(f"telemetry-{record.slug}-{figure}", f"{name} while training", says,
                      {"data": data, "layout": plan})
            )  # fmt: skip
    return parts
