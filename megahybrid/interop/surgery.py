"""Positional surgery: other positions and windows for weights that were trained with theirs.

RoPE layers become NoPE layers or windowed ones, as SWAN (arXiv 2504.08719) and DroPE do. What this
module knows is which layers still compute what they did, and which have something to learn.
"""

from dataclasses import dataclass
from pathlib import Path

from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig, rotation_problems
from megahybrid.config.old_words import tell_once
from megahybrid.config.parsing import parse
from megahybrid.config.yaml_file import read_tree
from megahybrid.errors import ConfigError
from megahybrid.interop.model_card import scheme_in_words


@dataclass(frozen=True)
class Change:
    """The change of one layer. `exact_tokens`: up to that length its output is what it was;
    None when it always is, 0 when it never is."""

    layer: int
    before: AttentionScheme
    after: AttentionScheme
    exact_tokens: int | None
    to_learn: str

    @property
    def exact(self) -> bool:
        """True where nothing changes."""
        return self.exact_tokens is None


def read_plan(path: Path, model: ModelConfig) -> LayerPlan:
    """Return the layer plan of a run file or a model file, checked for `model`'s heads."""
    tree = read_tree(path, tell_once)
    found = (tree.get("model") or {}).get("layer_plan") if isinstance(tree, dict) else None
    if found is None:
        raise ConfigError(f"{path} has no model.layer_plan. Name a run file or a model file.")
    plan = parse(LayerPlan, found, where="model.layer_plan")
    problems = rotation_problems(plan.schemes, model.head_dim, "model.layer_plan.schemes")
    if problems:
        raise ConfigError(*problems)
    return plan


def changes(before: LayerPlan, after: LayerPlan) -> list[Change]:
    """Return one Change per layer. Raises ConfigError where the weights could not be kept."""
    if before.num_layers != after.num_layers:
        raise ConfigError(
            f"model.layer_plan.num_layers={after.num_layers} of the plan is not the source's "
            f"({before.num_layers}). Surgery changes positions, not layers."
        )
    found = []
    for layer, (old, new) in enumerate(zip(before.expand(), after.expand(), strict=True)):
        if old.qk_norm != new.qk_norm or old.learned() != new.learned():
            raise ConfigError(
                f"layer {layer} of the plan has {new.learned()} (the source has {old.learned()}). "
                "Surgery changes positions, windows and scales without parameters only."
            )
        found.append(_change(layer, old, new))
    return found


def _change(layer: int, old: AttentionScheme, new: AttentionScheme) -> Change:
    if old == new:
        return Change(layer, old, new, None, "nothing")
    reasons = []
    exact = 0
    if old.position != new.position:
        if rotation_of(new.position) is None:
            reasons.append("order without rotation")
        elif rotation_of(old.position) is None:
            reasons.append("a rotation where there was none")
        else:
            reasons.append("other angles")
    if old.score_scale != new.score_scale:
        reasons.append("another sharpness of attention")
    if (old.near, old.fuse, old.split) != (new.near, new.fuse, new.split):
        reasons.append("another share of a second view of its keys")
    if (old.window, old.chunk) != (new.window, new.chunk):
        # Up to the shorter one's length windows and chunks see all that there is.
        edge = min(r for r in (old.reach, new.reach) if r is not None)
        exact = edge if not reasons else 0
        shorter = old.reach is None or (new.reach is not None and new.reach < old.reach)
        shorter = shorter or (old.reach == new.reach and new.chunk is not None)
        reasons.append("to do without far keys" if shorter else "to use farther keys")
    return Change(layer, old, new, exact, " and ".join(reasons))


def in_words(found: list[Change]) -> list[str]:
    """Return the difference of two plans, a line for each stretch of layers that change alike."""
    lines, start = [], 0
    for index in range(1, len(found) + 1):
        if index == len(found) or not _alike(found[index], found[start]):
            lines.append(_line(found[start], found[index - 1].layer))
            start = index
    return lines


def _alike(a: Change, b: Change) -> bool:
    return (a.before, a.after) == (b.before, b.after)


def _line(change: Change, last: int) -> str:
    layers = f"layer {last}" if change.layer == last else f"layers {change.layer}-{last}"
    old = scheme_in_words(change.before)
    if change.exact:
        return f"{layers}: {old}: unchanged, exact"
    new = scheme_in_words(change.after)
    exact = f"exact up to {change.exact_tokens} tokens" if change.exact_tokens else "not exact"
    return f"{layers}: {old} -> {new}: {exact}; must learn {change.to_learn}"
