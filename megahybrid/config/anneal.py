"""`Anneal`: a window or a theta that goes to another value while a stage runs, in a few steps.

Where a run is on the way is a function of the stage's tokens alone: the stage is cut into `steps`
equal stretches, the first has the values it began with and the last those that are named.
"""

from dataclasses import dataclass

from pydantic import Field

from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.base import Frozen, Name, did_you_mean
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.errors import ConfigError

# Windows on the way are multiples of the block that kernels cut masks into; every other value is a
# mask, a rotation and perhaps a kernel of its own to be built.
WINDOW_MULTIPLE = 128
MOST_STEPS = 16


class AnnealedTheta(Frozen):
    """The rotation that a scheme has at the end of a stage."""

    theta: float = Field(gt=1, description="base of the frequencies at the stage's end")


class AnnealedScheme(Frozen):
    """The window and rotation that one attention scheme has at the end of a stage."""

    window: int | None = Field(
        default=None,
        gt=0,
        multiple_of=WINDOW_MULTIPLE,
        description=f"window at the stage's end, by multiples of {WINDOW_MULTIPLE} on a straight "
        "line; null: stays",
    )
    position: AnnealedTheta | None = Field(
        default=None, description="theta at the stage's end, by equal ratios; null: stays"
    )


class Anneal(Frozen):
    """Fields of attention schemes that change while the stage runs: in the first of `steps` equal
    stretches of its tokens they are as the stage begins, in the last as they are here."""

    steps: int = Field(
        default=MOST_STEPS, ge=2, le=MOST_STEPS, description="values on the way, both ends included"
    )
    schemes: dict[Name, AnnealedScheme] = Field(
        min_length=1, description="schemes by name, with what they have at the stage's end"
    )


@dataclass(frozen=True)
class PlanStretch:
    """A part of a stage, from `tokens` of it on, whose layers stay as they are."""

    tokens: int
    plan: LayerPlan


def stretches(
    anneal: Anneal | None, plan: LayerPlan, stage_tokens: int, where: str
) -> tuple[PlanStretch, ...]:
    """The plans that a stage which begins with `plan` goes through, equal neighbours joined.

    `where` is the dotted path of `anneal`. Raises ConfigError, one line per mistake.
    """
    if anneal is None:
        return (PlanStretch(0, plan),)
    lines = [
        line
        for name, end in anneal.schemes.items()
        for line in _problems(name, plan, end, f"{where}.schemes.{name}")
    ]
    if lines:
        raise ConfigError(*lines)
    found = [PlanStretch(0, plan)]
    for step in range(1, anneal.steps):
        changed = {
            name: _on_the_way(plan.schemes[name], end, step, anneal.steps - 1)
            for name, end in anneal.schemes.items()
        }
        here = plan.model_copy(update={"schemes": dict(plan.schemes) | changed})
        if here != found[-1].plan:
            found.append(PlanStretch(-(-stage_tokens * step // anneal.steps), here))
    return tuple(found)


def _problems(name: str, plan: LayerPlan, end: AnnealedScheme, where: str) -> list[str]:
    if name not in plan.schemes:
        known = ", ".join(plan.schemes)
        return [
            f"{where} names no scheme of model.layer_plan.schemes ({known})."
            f"{did_you_mean(name, plan.schemes)}"
        ]
    scheme, lines = plan.schemes[name], []
    if end.window is None and end.position is None:
        lines.append(f"{where}={{}} changes nothing. Name window or position.theta.")
    if end.window is not None:
        if scheme.chunk is not None:
            lines.append(
                f"{where}.window={end.window} has no window to begin from (chunk={scheme.chunk} "
                "says which keys these layers see). Leave it out."
            )
        elif scheme.window is None:
            lines.append(
                f"{where}.window={end.window} has no window to begin from (these layers see all "
                "keys). Give the scheme a window, or leave it out."
            )
        elif scheme.window % WINDOW_MULTIPLE:
            lines.append(
                f"{where}.window={end.window} begins from window={scheme.window}, which is no "
                f"multiple of {WINDOW_MULTIPLE}. Begin from one that is."
            )
        elif scheme.near is not None and (scheme.near.window or 0) > end.window:
            lines.append(
                f"{where}.window={end.window} is shorter than the near view "
                f"(near.window={scheme.near.window}). Use that or more."
            )
        elif scheme.window == end.window:
            lines.append(f"{where}.window={end.window} is what the stage begins with. Remove it.")
    if end.position is not None:
        theta, rope = end.position.theta, rotation_of(scheme.position)
        if rope is None:
            lines.append(
                f"{where}.position.theta={theta:g} has nothing to act on: these layers have no "
                f"rotation (position.kind={scheme.position.kind}). Remove it, or name the scheme "
                "that rotates."
            )
        elif rope.theta == theta:
            lines.append(
                f"{where}.position.theta={theta:g} is what the stage begins with. Remove it."
            )
    return lines


def _on_the_way(
    scheme: AttentionScheme, end: AnnealedScheme, step: int, of: int
) -> AttentionScheme:
    """`scheme` after `step` of `of` changes."""
    update: dict[str, object] = {}
    if end.window is not None:
        assert scheme.window is not None
        first, last = scheme.window // WINDOW_MULTIPLE, end.window // WINDOW_MULTIPLE
        # The nearest multiple in whole numbers: the same on every machine.
        nearest = (2 * (first * of + (last - first) * step) + of) // (2 * of)
        update["window"] = nearest * WINDOW_MULTIPLE
    if end.position is not None:
        theta, rope = end.position.theta, rotation_of(scheme.position)
        assert rope is not None
        if step < of:
            # Six digits: two libraries of mathematics may differ in the last bit of a power.
            ratio = theta / rope.theta
            theta = float(f"{rope.theta * ratio ** (step / of):.6g}")
        update["position"] = rope.model_copy(update={"theta": theta})
    return scheme.model_copy(update=update)
