"""`checkpoint fuse` and `checkpoint collapse`: layers get a second view of their keys without a
change of what they compute, and heads that have come to use one of two keep that one.

sigmoid(-40) is 4e-18: in fp32 and below, g * near + (1 - g) * far is far. A layer gets one view, or
split heads, where each of its heads has one; in a layer that stays fused such heads get a share of
0 or 1.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import indent
from typing import Any

import numpy as np

from megahybrid.checkpoint.diff import CHUNK_ELEMENTS, row_boxes
from megahybrid.checkpoint.directory import RunLock
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.folders import refuse_occupied
from megahybrid.checkpoint.fragments import Array, Fragment, volume, whole
from megahybrid.checkpoint.reader import FlatValues, Reader, verify
from megahybrid.checkpoint.writer import Snapshot, save
from megahybrid.config import RunConfig, counting, parse
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.base import dump, dump_yaml
from megahybrid.config.fusion import HeadSplit
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.errors import CheckpointError, ConfigError, DataError
from megahybrid.interop.model_card import scheme_in_words
from megahybrid.interop.surgery import read_plan
from megahybrid.plain_file import read_plain_file
from megahybrid.train.restore import plan_of, run_of

SHUT = 40.0  # of the bias of a share: one view alone
WITHIN = 0.01  # of 0 or 1: a head whose mean share is nearer than this has one view
PLAN_NAME = "layer_plan.yaml"
GATE = "fuse_gate"


@dataclass(frozen=True)
class ViewSurgery:
    """The layers as they become, the tensors that are not the source's, and what was done."""

    plan: LayerPlan
    written: Mapping[str, Array]
    words: tuple[str, ...]


def fuse(path: Path, plan_file: Path, out: Path) -> tuple[Path, tuple[str, ...]]:
    """Write `path`'s weights to `out` with the layer plan of `plan_file`, whose fused layers
    compute what the source's do; return the checkpoint and a line for each layer.

    Raises ConfigError where a layer's scheme is neither view of the plan's.
    """
    return _operate(path, out, lambda run, plan, _: fused_plan(run, plan, plan_file))


def collapse(
    path: Path, out: Path, analysis: Path | None = None, within: float = WITHIN
) -> tuple[Path, tuple[str, ...]]:
    """Write `path`'s weights to `out` with one view in each head whose mean share of the near one
    is within `within` of 0 or 1; return the checkpoint and a line for each layer.

    Shares that depend on the token are read from `analysis`, a result of `megahybrid analyse`.
    """
    if not 0 < within < 0.5:
        raise ConfigError(f"--within={within:g} is no distance from 0 and 1. Use 0.01.")
    return _operate(
        path, out, lambda _, plan, reader: collapsed_plan(plan, reader, analysis, within)
    )


def fused_plan(run: RunConfig, before: LayerPlan, plan_file: Path) -> ViewSurgery:
    """The plan of a file whose fused layers are those of `before`, and the gates that make them
    so."""
    after = read_plan(plan_file, run.model)
    if after.num_layers != before.num_layers:
        raise ConfigError(
            f"model.layer_plan.num_layers={after.num_layers} of the plan is not the source's "
            f"({before.num_layers}). Fusing changes how layers see, not how many there are."
        )
    written: dict[str, Array] = {}
    words = []
    model = run.model.model_copy(update={"layer_plan": after})
    for index, (old, new) in enumerate(zip(before.expand(), after.expand(), strict=True)):
        share = _share_that_is(old, new)
        if share is None:
            raise ConfigError(
                f"layer {index} of the plan ({scheme_in_words(new)}) has no view that is the "
                f"source's ({scheme_in_words(old)}). Give it that, as near or as the scheme itself."
            )
        if old == new:
            continue
        for name, shape in counting.layer_shapes(model, new).items():
            if GATE in name:
                value = SHUT * (2 * share - 1) if name.endswith(".bias") else 0.0
                written[f"blocks.{index}.{name}"] = np.full(shape, value, dtype=np.float32)
        view = "near" if share else "far"
        words.append(f"layer {index}: {scheme_in_words(old)} -> the {view} view, exact")
    if not words:
        raise ConfigError(f"{plan_file} has the source's layers: nothing is fused. Name another.")
    return ViewSurgery(after, written, tuple(words))


def _share_that_is(old: AttentionScheme, new: AttentionScheme) -> int | None:
    """The share of near at which a new scheme is what the old one was; None: there is none."""
    if old == new:
        return 0
    if new.fuse is None:
        return None
    near, far = new.views()
    if old.learned() != far.learned():
        return None
    for share, view in ((0, far), (1, near)):
        can = new.learned().fuse is not None or new.fuse.initial == share
        if old == view and can:
            return share
    return None


def collapsed_plan(
    before: LayerPlan, reader: Reader, analysis: Path | None, within: float
) -> ViewSurgery:
    """The plan and gates of a model whose heads have one view where their mean share says so."""
    measured = None if analysis is None else _measured_shares(analysis, before.num_layers)
    names, schemes = [], dict(before.schemes)
    written: dict[str, Array] = {}
    words = []
    for index, (name, scheme) in enumerate(zip(before.names(), before.expand(), strict=True)):
        if scheme.fuse is None:
            names.append(name)
            continue
        bias = f"blocks.{index}.attention.{GATE}.bias"
        shares = _shares(index, scheme, bias, reader, measured)
        sides = [1 if g > 1 - within else 0 if g < within else None for g in shares]
        kind, new = _one_view(scheme, sides, reader)
        if new is None:
            written |= _settled(index, scheme, sides, bias, reader)
            kept = sum(side is None for side in sides)
            words.append(
                f"layer {index}: {sides.count(1)} heads near, {sides.count(0)} far, {kept} fused"
            )
            names.append(name)
            continue
        words.append(f"layer {index}: {kind} in every head -> {scheme_in_words(new)}")
        names.append(_name_for(f"{name}_{kind}", new, schemes))
        schemes[names[-1]] = new
    if not words:
        raise ConfigError(f"{reader.path} has no fused layer (0 schemes with fuse). Name another.")
    used = {name: schemes[name] for name in dict.fromkeys(names)}
    plan = LayerPlan(num_layers=len(names), pattern=names, schemes=used)
    return ViewSurgery(plan, written, tuple(words))


def _name_for(name: str, scheme: AttentionScheme, schemes: Mapping[str, AttentionScheme]) -> str:
    while schemes.get(name, scheme) != scheme:
        name += "_"
    return name


def _shares(
    index: int,
    scheme: AttentionScheme,
    bias: str,
    reader: Reader,
    measured: Sequence[Sequence[float]] | None,
) -> list[float]:
    """The mean share of near of each head of a layer."""
    assert scheme.fuse is not None
    if scheme.fuse.gate == "token":
        if measured is None:
            raise ConfigError(
                f"layer {index} has shares that depend on the token, which weights do not tell "
                "(fuse.gate=token). Give --analysis, a result of `megahybrid analyse`."
            )
        return list(measured[index])
    if scheme.fuse.gate == "fixed":
        return [scheme.fuse.initial]
    values = reader.read(bias, "weight", whole(reader.manifest.tensors[bias].shape))
    return [1 / (1 + math.exp(-min(max(float(b), -700.0), 700.0))) for b in values.reshape(-1)]


def _measured_shares(analysis: Path, layers: int) -> list[list[float]]:
    """The mean share of each layer's heads over the results of an analysis."""
    try:
        results = json.loads(read_plain_file(analysis))["results"]
        tables = [result["attention"]["layers"] for result in results]
        found = []
        for index in range(layers):
            heads = [[h.get("near_share", math.nan) for h in one[index]["heads"]] for one in tables]
            found.append([fmean(map(float, each)) for each in zip(*heads, strict=True)])
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"--analysis={analysis} is no attention analysis of these layers "
            f"({type(error).__name__}). Give a file that `megahybrid analyse` kept in evaluations/."
        ) from None


def _one_view(
    scheme: AttentionScheme, sides: Sequence[int | None], reader: Reader
) -> tuple[str, AttentionScheme | None]:
    """The scheme of a layer whose heads each have one view: near, far, or a split of them."""
    near, far = scheme.views()
    if set(sides) == {0}:
        return "far", far
    if set(sides) == {1}:
        # A learned scale is the far view's, and goes with it.
        return "near", near
    kv_heads = int(reader.manifest.config["model"]["num_kv_heads"])
    groups = [set(sides[at : at + len(sides) // kv_heads]) for at in
              range(0, len(sides), max(1, len(sides) // kv_heads))]  # fmt: skip
    if None in sides or any(len(group) > 1 for group in groups):
        return "fused", None
    flags = [group == {1} for group in groups]
    for of in range(2, kv_heads + 1):
        count = sum(flags[:of])
        if 0 < count < of:
            split = HeadSplit(near=count, of=of)
            if flags == [split.is_near(head) for head in range(kv_heads)]:
                return "split", scheme.model_copy(update={"fuse": None, "split": split})
    return "fused", None


def _settled(
    index: int, scheme: AttentionScheme, sides: Sequence[int | None], bias: str, reader: Reader
) -> dict[str, Array]:
    """The gate of a layer that stays fused, with a share of 0 or 1 where a head has one view."""
    if scheme.learned().fuse is None:
        return {}
    found = {}
    for name in (bias, bias.removesuffix("bias") + "weight"):
        if name not in reader.manifest.tensors:
            continue
        shape = reader.manifest.tensors[name].shape
        values = np.array(reader.read(name, "weight", whole(shape))).reshape(shape)
        for head, side in enumerate(sides):
            if side is not None:
                values[head] = SHUT * (2 * side - 1) if name == bias else 0.0
        found[name] = values.astype(np.float32)
    return found


def _operate(path: Path, out: Path, change: Any) -> tuple[Path, tuple[str, ...]]:
    """Write a checkpoint's weights to `out` as `change`(run, its plan, its reader) says."""
    refuse_occupied(out, "the result would stand among them")
    verify(path)
    with ExitStack() as stack:
        reader = stack.enter_context(Reader(path))
        source = reader.manifest
        run = run_of(reader)
        surgery: ViewSurgery = change(run, plan_of(run, source, path), reader)
        after = _with_plan(run, surgery.plan)
        shapes = counting.parameter_shapes(after.model)
        missing = [n for n in shapes if n not in source.tensors and n not in surgery.written]
        assert not missing, missing
        snapshot = Snapshot(
            step=source.step,
            tokens=source.tokens,
            optimizer_step=source.optimizer_step,
            model_fingerprint=model_fingerprint(after.model),
            tensors=shapes,
            fragments=list(_fragments(reader, shapes, surgery.written)),
            train_state={
                **source.train_state,
                "schemes": {name: dump(one) for name, one in surgery.plan.schemes.items()},
            },
            config=after.model_dump(mode="json"),
            states=("weight",),
        )
        try:
            stack.enter_context(RunLock(out))
            plan = "model:\n  layer_plan:\n" + indent(dump_yaml(surgery.plan), "    ")
            (out / PLAN_NAME).write_text(plan, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"--out={out} cannot be written ({error.strerror}).").because(
                error
            ) from None
        result = save(out, snapshot, keep_last=10**9)
    if result.path is None:
        raise CheckpointError(f"--out={out} could not be written ({result.error}).")
    return result.path, surgery.words


def _with_plan(run: RunConfig, plan: LayerPlan) -> RunConfig:
    """The run with other layers from its beginning; what its stages changed has been passed."""
    fields = dump(run)
    fields["model"]["layer_plan"] = dump(plan)
    fields["start"] = None
    for stage in fields["stages"]:
        stage |= {"schemes": {}, "anneal": None}
    return parse(RunConfig, fields)


def _fragments(
    reader: Reader, shapes: Mapping[str, tuple[int, ...]], written: Mapping[str, Array]
) -> Iterator[Fragment]:
    for name, shape in shapes.items():
        if name in written:
            flat = written[name].reshape(-1)
            yield Fragment(name, "weight", whole(shape), (0, len(flat)), flat)
            continue
        at = 0
        for box in row_boxes(shape, CHUNK_ELEMENTS):
            stop = at + volume(box)
            values = FlatValues(reader, name, "weight", box)
            yield Fragment(name, "weight", whole(shape), (at, stop), values)
            at = stop
