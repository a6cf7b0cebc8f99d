"""The plan of a model as a coloured strip of layers, and what each kind of layer sees."""

from megahybrid.config import RunConfig
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.scheme_words import (
    beside_in_words,
    position_in_words,
    qk_norm_in_words,
    views_in_words,
)
from megahybrid.report.attention_charts import kind_colours
from megahybrid.report.parts import Cell, Missing, Part, Strip, StripLayer, Table, short_number
from megahybrid.report.record import RunRecord


def strip_part(record: RunRecord, several: bool) -> list[Part]:
    """The strip and the table of kinds, as the last stage has them."""
    run = record.config
    if run is None:
        why = "the run's folder has no config.yaml"
        return [Missing(f"the plan of layers ({record.name})", why)]
    plan = run.plan_at(len(run.stages) - 1)
    names = plan.names()
    colours = kind_colours(names)
    words = {name: scheme_in_words(plan.schemes[name]) for name in colours}
    strip = Strip(
        heading=record.name if several else "",
        layers=tuple(StripLayer(name, colours[name], words[name]) for name in names),
        kinds=tuple(
            StripLayer(name, ink, words[name], names.count(name)) for name, ink in colours.items()
        ),
    )
    return [strip, _kinds_table(run, plan)]


def scheme_in_words(scheme: AttentionScheme) -> str:
    """ "sees the last 64 tokens, with rotary positions (theta 10k)" and the like."""
    if scheme.near is not None:
        near, far = (scheme_in_words(view) for view in scheme.views())
        how = "a head" if scheme.fuse is None else "every head"
        return f"{how} {near}; {'others' if scheme.fuse is None else 'and'} {far}"
    span = "sees every earlier token"
    if scheme.window is not None:
        span = f"sees the last {scheme.window:,} tokens"
    if scheme.chunk is not None:
        span = f"sees the earlier tokens of its own chunk of {scheme.chunk:,}"
    theta = getattr(scheme.position, "theta", None)
    if theta is None:
        return f"{span}, without positions (NoPE)"
    return f"{span}, with rotary positions (RoPE, theta {short_number(theta)})"


def _position(scheme: AttentionScheme) -> str:
    words = position_in_words(scheme)
    return words if scheme.near is None else f"{words}; {views_in_words(scheme)}"


def _span(scheme: AttentionScheme) -> int | str:
    return scheme.window or "all" if scheme.chunk is None else f"chunk {scheme.chunk:,}"


def _kinds_table(run: RunConfig, plan: LayerPlan) -> Table:
    names = plan.names()
    some = any(beside_in_words(scheme) for scheme in plan.schemes.values())
    found: dict[tuple[Cell, ...], list[str]] = {}  # the stages in which a kind is so
    for index, stage in enumerate(run.stages):
        schemes = run.plan_at(index).schemes
        for name in dict.fromkeys(names):
            scheme = schemes[name]
            theta = getattr(scheme.position, "theta", None)
            row: tuple[Cell, ...] = (
                name, names.count(name), _position(scheme), theta, _span(scheme),
                qk_norm_in_words(scheme.qk_norm) or "none", scheme.score_scale.kind,
            )  # fmt: skip
            if some:
                row += (", ".join(beside_in_words(scheme)) or "none",)
            found.setdefault(row, []).append(stage.name)
    rows: list[list[Cell]] = [
        [*row, "all" if len(stages) == len(run.stages) else ", ".join(stages)]
        for row, stages in sorted(found.items(), key=lambda one: str(one[0][0]))
    ]
    head = ("kind", "layers", "position", "theta", "window", "QK-norm", "score scale")
    return Table((*head, *(("with",) if some else ()), "in stages"), rows, "Kinds of layers")
