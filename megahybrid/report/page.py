"""One self-contained HTML page about a run: facts, pictures, stages, samples, events."""

import base64
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from megahybrid.config import RunConfig
from megahybrid.config.counting import parameters
from megahybrid.config.describe import position_in_words
from megahybrid.report.plots import Picture
from megahybrid.report.record import RunRecord, StageRecord
from megahybrid.report.style import short_number
from megahybrid.train.ledger import read_every_line

# Events that the page shows elsewhere, or that are the ordinary course of things.
_ORDINARY = {"start", "stage", "evaluate", "save"}


def page(record: RunRecord, pictures: Sequence[Picture]) -> str:
    """The page as HTML text, its pictures inside it."""
    template = Template(files("megahybrid.report").joinpath("page.html").read_text("utf-8"))
    return template.substitute(
        name=escape(record.name),
        facts=_facts(record),
        pictures="".join(_picture(picture) for picture in pictures),
        stages=_table(*_stage_rows(record)),
        layers=_layers(record.config) if record.config else "",
        samples=_samples(record.samples),
        events=_events(record),
    )


def _facts(record: RunRecord) -> str:
    steps = record.steps
    facts: dict[str, str] = {"state": _state(record)}
    if record.config:
        model = record.config.model
        facts["parameters"] = f"{parameters(model):,}"
        facts["model"] = (
            f"{model.layer_plan.num_layers} layers, hidden {model.hidden_size:,}, "
            f"{model.num_heads} heads ({model.num_kv_heads} key-value), {model.block}"
        )
    facts["tokens"] = f"{steps[-1].tokens:,} in {steps[-1].step:,} steps"
    for held_out in record.held_out_sets():
        known = [one for one in record.scores(held_out, "stream") if one.loss is not None]
        if known:
            facts[f"held-out loss, {held_out}"] = (
                f"{known[-1].loss:.4f} at length {known[-1].length:,}"
            )
    beginnings = record.ledger.named("start") + record.ledger.named("resume")
    if beginnings:
        told = beginnings[-1].detail
        facts["ranks"] = (
            f"{told.get('world_size', '?')} (tensor {told.get('tensor', '?')} × data "
            f"{told.get('data', '?')}), ZeRO {told.get('zero_stage', '?')}"
        )
        if isinstance(parent := told.get("parent"), dict):
            facts["branch of"] = f"{parent['checkpoint']} ({parent['take']})"
        for name in ("device", "precision", "torch"):
            if name in told:
                facts[name] = str(told[name])
    facts["wall time of the steps"] = _duration(sum(sum(line.seconds.values()) for line in steps))
    memory = [line.memory_gib for line in steps if line.memory_gib is not None]
    if memory:
        facts["peak memory, rank 0"] = f"{max(memory):.2f} GiB"
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items()
    )


def _state(record: RunRecord) -> str:
    last = record.ledger.lines[-1]
    attempts = max(line.attempt for line in record.ledger.lines)
    ends = [line for line in record.ledger.named("end") if line.attempt == last.attempt]
    outcome = str(ends[-1].detail.get("outcome", "ended")) if ends else "running, or cut short"
    return outcome + (f", {attempts} attempts" if attempts > 1 else "")


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(picture.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def _stage_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    held_out = record.held_out_sets()
    head = ["stage", "lengths", "tokens", "steps", "learning rate", "training loss",
            *(f"{name} loss" for name in held_out), "tokens/s", "MFU"]  # fmt: skip
    return head, [_stage_row(record, stage, held_out) for stage in record.stages]


def _stage_row(record: RunRecord, stage: StageRecord, held_out: list[str]) -> list[str]:
    steps = stage.steps
    tail = steps[-max(1, len(steps) // 10) :]
    losses = [line.loss for line in tail if line.loss is not None]
    speeds = [line.tokens_per_second for line in steps if line.tokens_per_second is not None]
    shares = [line.mfu for line in steps if line.mfu is not None]
    scores = []
    for name in held_out:
        here = [one.loss for one in record.scores(name, "stream") if one.stage == stage.name]
        scores.append(_number(here[-1] if here else None, ".4f"))
    return [
        stage.name,
        ", ".join(f"{length:,}" for length in stage.lengths),
        f"{stage.end - stage.begin:,}",
        f"{len(steps):,}",
        f"{steps[0].learning_rate:.2e} → {steps[-1].learning_rate:.2e}",
        _number(statistics.fmean(losses) if losses else None, ".4f"),
        *scores,
        _number(statistics.median(speeds) if speeds else None, ",.0f"),
        _number(statistics.median(shares) if shares else None, ".1%"),
    ]


def _layers(config: RunConfig) -> str:
    plan = config.model.layer_plan
    rows = []
    for name, scheme in plan.schemes.items():
        layers = [str(index) for index, used in enumerate(plan.names()) if used == name]
        theta = getattr(scheme.position, "theta", None)
        rows.append([
            name,
            position_in_words(scheme) + (f", theta {short_number(theta)}" if theta else ""),
            "all" if scheme.window is None else f"{scheme.window:,} keys",
            scheme.qk_norm.kind,
            scheme.logit_scale.kind,
            f"{len(layers)}: {', '.join(layers)}",
        ])  # fmt: skip
    head = ["scheme", "position", "window", "QK-norm", "logit scale", "layers"]
    return f"<h2>Layers</h2>{_table(head, rows)}"


def _samples(samples: str | None) -> str:
    return f"<h2>Samples</h2><pre>{escape(samples.strip())}</pre>" if samples else ""


def _events(record: RunRecord) -> str:
    rows = []
    # Of every attempt, void or not: a page about a run also says how it was interrupted.
    for line in read_every_line(record.directory / "ledger.jsonl"):
        event = getattr(line, "event", "step")
        if event != "step" and event not in _ORDINARY:
            detail = getattr(line, "detail", {})
            told = ", ".join(
                f"{k} {v}" for k, v in detail.items() if isinstance(v, str | int | float)
            )
            rows.append(
                [str(line.attempt), f"{line.step:,}", line.stage, event.replace("_", " "), told]
            )
    if not rows:
        return ""
    return f"<h2>Events</h2>{_table(['attempt', 'step', 'stage', 'event', 'detail'], rows)}"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"
