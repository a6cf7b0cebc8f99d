"""The parts that classes share for a model's layers: reasons against a plan, fields of a config,
and back."""

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, assert_never

from megahybrid.config.attention import AttentionScheme, Bias, Gate, Nope, Position, QKNorm, Rope
from megahybrid.config.base import dump
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse
from megahybrid.config.scaling import LinearScaling, YarnScaling
from megahybrid.errors import InteropError
from megahybrid.interop.architectures.rope import (
    NOPE,
    Fields,
    rope_position,
    switched_rope_parameters,
)

Schemes = Sequence[AttentionScheme]
Layer = tuple[Fields, int | None]  # position and window, as an imported config has them
# For classes that rotate windowed layers only: a window that no sequence fills. A multiple of 2, so
# that it stays exact wherever it becomes a float.
ENDLESS = 2**30
SLIDING, FULL = "sliding_attention", "full_attention"


def rotates(scheme: AttentionScheme) -> bool:
    """True for a layer with a rotation, False for one without position."""
    match scheme.position:
        case Rope():
            return True
        case Nope():
            return False
        case _:
            assert_never(scheme.position)


def rotations(schemes: Schemes) -> dict[Rope, None]:
    """Return the different rotations, in the order of the layers."""
    return {s.position: None for s in schemes if isinstance(s.position, Rope)}


def windowed(schemes: Schemes) -> bool:
    """True where any layer has a window."""
    return any(scheme.window is not None for scheme in schemes)


def one_rotation_reasons(schemes: Schemes) -> Iterator[str]:
    """Yield the reasons against more than one rotation, and against a scaled partial one."""
    if len(rotations(schemes)) > 1:
        yield "its rotated layers share one theta and scaling"
    yield from partial_reasons(schemes)


def partial_reasons(schemes: Schemes) -> Iterator[str]:
    """Yield a reason against scaled partial rotations: `proportional` takes a factor of all
    frequencies and no other scaling, and that only of a whole head's."""
    for rope in rotations(schemes):
        if rope.rotary_fraction == 1:
            continue
        match rope.spectrum:
            case "rotated":
                if rope.scaling is not None:
                    yield "it cannot scale a partial rotation"
            case "head":
                if not isinstance(rope.scaling, LinearScaling | None):
                    yield "it scales a partial rotation by one factor alone (kind: linear)"
            case _:
                assert_never(rope.spectrum)


def sliding_rotates_reasons(schemes: Schemes) -> Iterator[str]:
    """Yield the reasons where sliding layers rotate and full layers do not; a rotated full layer is
    a window at least as long as the longest sequence."""
    yield from one_rotation_reasons(schemes)
    if any(not rotates(s) and s.window is not None for s in schemes):
        yield "its layers without position are full"
    if len({s.window for s in schemes if rotates(s)}) > 1:
        yield "its rotated layers have one window"


def how_sliding_rotates(schemes: Schemes) -> str:
    """Return the fields that tell which layers rotate."""
    rotated = {s.window for s in schemes if rotates(s)}
    if rotated == {None}:
        return "sliding_window at least the longest sequence"
    return "layer_types with sliding_window" if rotated else "all layer_types full"


def sliding_rotates_fields(schemes: Schemes, head_dim: int) -> Fields:
    """Return the fields of layers that rotate exactly where they are sliding."""
    return {
        "layer_types": layer_types([rotates(s) for s in schemes]),
        "sliding_window": one_window(schemes) or ENDLESS,
        "rope_parameters": switched_rope_parameters(one_position(schemes), head_dim),
    }


def width_scale_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield the reason against a factor of the embeddings that is not the square root of their
    width, to the fp32 bit."""
    root = model.hidden_size**0.5
    if struct.pack("f", model.embedding_scale) != struct.pack("f", root):
        yield (
            f"its embedding_scale is sqrt(hidden_size)={root:.9g}, not {model.embedding_scale:.9g}"
        )


def rotates_everywhere_reasons(schemes: Schemes) -> Iterator[str]:
    """Yield the reasons where each layer has the rotation, or none by a proportional factor of
    0."""
    yield from one_rotation_reasons(schemes)
    if len({rotates(s) for s in schemes}) > 1:
        yield "it rotates in every layer or in none"


def how_rotates_everywhere(schemes: Schemes) -> str:
    """Return the field of the one rotation, or of none."""
    return "rope_parameters" if rotates(schemes[0]) else "rope_type proportional with factor 0.0"


def one_position(schemes: Schemes) -> Position:
    """Return the one rotation of the layers that rotate, or no position."""
    return next((s.position for s in schemes if rotates(s)), schemes[0].position)


def one_window(schemes: Schemes) -> int | None:
    """Return the one window of the layers that have one, or None."""
    return next((s.window for s in schemes if s.window is not None), None)


def layer_types(sliding: Sequence[bool]) -> list[str]:
    """Return the field of that name: which layers are windowed."""
    return [SLIDING if item else FULL for item in sliding]


def window_of(config: Any) -> int | None:
    """Return the window of sliding layers, None where no sequence fills it."""
    window = config.sliding_window
    if window is not None and window < 2:
        raise InteropError(
            f"config.json: sliding_window={window}: transformers' own cache is wrong for windows "
            "below 2 keys."
        )
    return None if window is None or window >= ENDLESS else int(window)


def two_kinds_reasons(schemes: Schemes) -> Iterator[str]:
    """Yield the reasons where sliding layers have one position and full layers another; without
    windows, sliding layers are those of the second position."""
    kinds = [[s for s in schemes if (s.window is None) == full] for full in (False, True)]
    if not windowed(schemes):
        if len({s.position for s in schemes}) > 2:
            yield "it has two kinds of layers"
    elif any(len({s.position for s in kind}) > 1 for kind in kinds):
        yield "its sliding layers share one position, and its full layers another"
    yield from partial_reasons(schemes)
    scalings = [rope.scaling for rope in rotations(schemes)]
    if any(isinstance(s, YarnScaling) and not s.truncate for s in scalings):
        yield "it ignores yarn's truncate: false for a kind of layers"


def how_two_kinds(schemes: Schemes) -> str:
    """Return the field of the rotations, and the window where it only makes two kinds of layers."""
    how = "rope_parameters for each kind of layer"
    if not windowed(schemes) and len({s.position for s in schemes}) > 1:
        how += ", sliding_window at least the longest sequence"
    return how


def two_kinds_fields(schemes: Schemes, entry: Callable[[Position], Fields | None]) -> Fields:
    """Return two kinds of layers, and for each the entry of its position."""
    window = one_window(schemes)
    if window is None:
        sliding = [s.position != schemes[0].position for s in schemes]
    else:
        sliding = [s.window is not None for s in schemes]
    positions = {
        kind: [s.position for s, item in zip(schemes, sliding, strict=True) if item == which]
        for kind, which in ((SLIDING, True), (FULL, False))
    }
    return {
        "layer_types": layer_types(sliding),
        "sliding_window": window or ENDLESS,
        # A kind that no layer has must have an entry all the same.
        "rope_parameters": {
            kind: entry((held or [schemes[0].position])[0]) for kind, held in positions.items()
        },
    }


def two_kinds(config: Any) -> list[Layer]:
    """Return layers of two kinds. A `truncate` in a kind's own entry is ignored; an entry that is
    null is no rotation."""
    window = window_of(config)
    positions = {}
    for kind in dict.fromkeys(config.layer_types):
        entry = config.rope_parameters[kind]
        positions[kind] = NOPE
        if entry is not None:
            kept = {key: value for key, value in entry.items() if key != "truncate"}
            positions[kind] = rope_position(kept, config)
    return [(positions[kind], window if kind == SLIDING else None) for kind in config.layer_types]


def dense_or_refused(config: Any) -> None:
    """Raise InteropError where the field mlp_layer_types gives a layer experts."""
    sparse = [index for index, kind in enumerate(config.mlp_layer_types) if kind != "dense"]
    if sparse:
        raise InteropError(
            f"config.json: mlp_layer_types[{sparse[0]}]={config.mlp_layer_types[sparse[0]]} is a "
            "layer of experts, which our model has not (only dense)."
        )


def rotates_everywhere(config: Any) -> list[Layer]:
    """Return layers that all have the one rotation and no window."""
    return [(rope_position(config.rope_parameters, config), None)] * config.num_hidden_layers


def sliding_rotates(config: Any) -> list[Layer]:
    """Return layers that rotate where they are windowed."""
    rope = rope_position(config.rope_parameters, config)
    window = window_of(config)
    return [(rope, window) if t == SLIDING else (NOPE, None) for t in config.layer_types]


def plan_of(
    layers: Sequence[Layer],
    qk_norm: QKNorm,
    score_scale: Fields,
    *,
    gate: Gate = "none",
    bias: Bias = "none",
    own: Sequence[Fields] = (),
) -> Fields:
    """Return a plan with a name for every different layer, its pattern as short as it tiles.
    `own` holds, for each layer, fields that differ from those of all."""
    same: Fields = {"qk_norm": dump(qk_norm), "score_scale": score_scale}
    same |= {"gate": gate, "bias": bias}
    schemes: dict[str, Fields] = {}
    names = []
    for (position, window), fields in zip(layers, own or [{}] * len(layers), strict=True):
        scheme = {"position": position, "window": window, **same, **fields}
        name = next((known for known, held in schemes.items() if held == scheme), None)
        if name is None:
            name = _name(scheme, schemes)
            schemes[name] = scheme
        names.append(name)
    period = next(
        size
        for size in range(1, len(names) + 1)
        if len(names) % size == 0 and names == names[:size] * (len(names) // size)
    )
    plan = {"num_layers": len(names), "pattern": names[:period], "schemes": schemes}
    return dump(parse(LayerPlan, plan, where="model.layer_plan"))


def _name(scheme: Fields, taken: dict[str, Fields]) -> str:
    reach = [f"_{field}" for field in ("window", "chunk") if scheme.get(field) is not None]
    plain = scheme["position"]["kind"] + "".join(reach)
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    return name
