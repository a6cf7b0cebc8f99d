"""Which Hugging Face architecture could say a model, and why the others cannot.

From runs of transformers 5.23 against an independent model; the docstring of each check says the
rule it found. A class that silently ignores a field counts as unable to say it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megahybrid.config.attention import (
    AttentionScheme,
    FixedScale,
    LayerPlan,
    Nope,
    QKNorm,
    Rope,
    SqrtDimScale,
)
from megahybrid.config.model import ModelConfig
from megahybrid.config.scaling import NtkScaling, YarnScaling


@dataclass(frozen=True)
class Fit:
    """Whether one architecture can say the model; `how` says what its config needs."""

    architecture: str
    reasons: tuple[str, ...]
    how: str = ""

    @property
    def can(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


@dataclass(frozen=True)
class _Architecture:
    name: str
    block: str
    norm: str
    qk_norms: tuple[QKNorm, ...]
    logit_scale: bool


NO_NORM = QKNorm()
HEAD_RMS = QKNorm(kind="rms")
PROJECTION_RMS = QKNorm(kind="rms", over="projection")
PER_HEAD_LAYERNORM = QKNorm(kind="layernorm", weight="per_head")

ARCHITECTURES = (
    _Architecture("Cohere2", "parallel", "layernorm", (NO_NORM,), True),
    _Architecture("Cohere", "parallel", "layernorm", (NO_NORM, PER_HEAD_LAYERNORM), True),
    _Architecture("SmolLM3", "pre_norm", "rms", (NO_NORM,), False),
    _Architecture("Llama", "pre_norm", "rms", (NO_NORM,), False),
    _Architecture("Qwen3", "pre_norm", "rms", (HEAD_RMS,), False),
    _Architecture("GraniteSWA", "pre_norm", "rms", (NO_NORM,), True),
    _Architecture("Exaone4", "post_norm", "rms", (HEAD_RMS,), False),
    _Architecture("Olmo3", "post_norm", "rms", (PROJECTION_RMS,), False),
)


def huggingface_fits(model: ModelConfig, plan: LayerPlan | None = None) -> list[Fit]:
    """One Fit per architecture, those that can say the model first."""
    schemes = (plan or model.layer_plan).expand()
    fits = [_fit(architecture, model, schemes) for architecture in ARCHITECTURES]
    return sorted(fits, key=lambda fit: not fit.can)


def _fit(
    architecture: _Architecture, model: ModelConfig, schemes: tuple[AttentionScheme, ...]
) -> Fit:
    reasons = list(_shape_reasons(architecture, model))
    reasons += list(_scheme_reasons(architecture, schemes))
    positions, how = _POSITIONS[architecture.name](schemes)
    reasons += positions
    return Fit(architecture.name, tuple(dict.fromkeys(reasons)), "" if reasons else how)


def _shape_reasons(architecture: _Architecture, model: ModelConfig) -> Iterator[str]:
    if model.block != architecture.block:
        yield f"its block is {architecture.block}, not {model.block}"
    if model.norm != architecture.norm:
        yield f"its norm is {architecture.norm}, not {model.norm}"
    if model.logit_scale != 1 and not architecture.logit_scale:
        yield f"it has no factor on the logits (logit_scale={model.logit_scale})"
    if model.head_dim % 2:
        yield f"its heads have an even dimension (head_dim={model.head_dim})"
    if architecture.name == "Llama" and model.hidden_size % model.num_heads:
        yield f"its num_heads divides hidden_size ({model.num_heads}, {model.hidden_size})"


def _scheme_reasons(
    architecture: _Architecture, schemes: tuple[AttentionScheme, ...]
) -> Iterator[str]:
    norms = {scheme.qk_norm for scheme in schemes}
    if len(norms) > 1:
        yield "its QK-norm is the same in every layer"
    elif norms.isdisjoint(architecture.qk_norms):
        wanted = " or ".join(_norm_words(norm) for norm in architecture.qk_norms)
        yield f"its QK-norm is {wanted}, not {_norm_words(next(iter(norms)))}"
    scales = {scheme.score_scale for scheme in schemes}
    plain = scales == {SqrtDimScale()}
    fixed = len(scales) == 1 and isinstance(next(iter(scales)), FixedScale)
    if not plain and not (fixed and architecture.name == "GraniteSWA"):
        kinds = sorted({scale.kind for scale in scales} - {"sqrt_dim"})
        yield f"it has no score scale of kind {' or '.join(kinds)}"
    windows = {scheme.window for scheme in schemes} - {None}
    if len(windows) > 1:
        yield f"it has one window, not {len(windows)}"
    if any(window is not None and window < 2 for window in windows):
        yield "its cache is wrong for a window of one key"


def _norm_words(norm: QKNorm) -> str:
    if norm.kind == "none":
        return "none"
    if norm.over == "projection":
        return f"{norm.kind} over the projection"
    return f"{norm.kind} per head, weight {norm.weight}"


def _rotations(schemes: tuple[AttentionScheme, ...]) -> set[Rope]:
    return {scheme.position for scheme in schemes if isinstance(scheme.position, Rope)}


def _rotation_reasons(rotations: set[Rope]) -> Iterator[str]:
    """One rotation for all layers; a partial one as `proportional`, which takes no scaling."""
    if len(rotations) > 1:
        yield "its rotated layers share one theta and scaling"
    if any(rope.rotary_fraction < 1 and rope.scaling is not None for rope in rotations):
        yield "it cannot scale a partial rotation"


def _sliding_rotates(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """Sliding layers rotate and full layers do not; a rotated full layer is a window at least as
    long as the longest sequence."""
    reasons = list(_rotation_reasons(_rotations(schemes)))
    if any(isinstance(s.position, Nope) and s.window is not None for s in schemes):
        reasons.append("its layers without position are full")
    rotated = {s.window for s in schemes if isinstance(s.position, Rope)}
    if len(rotated) > 1:
        reasons.append("its rotated layers have one window")
    if rotated == {None}:
        return reasons, "sliding_window at least the longest sequence"
    return reasons, "layer_types with sliding_window" if rotated else "all layer_types full"


def _exaone4(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """As `_sliding_rotates`; with sliding_window null every layer is full and rotates."""
    reasons, how = _sliding_rotates(schemes)
    if all(isinstance(s.position, Rope) and s.window is None for s in schemes):
        how = "sliding_window null, all layer_types full"
    return reasons, how


def _smollm3(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """Rotation and window are free of each other, layer by layer."""
    reasons = list(_rotation_reasons(_rotations(schemes)))
    windowed = any(s.window is not None for s in schemes)
    how = "no_rope_layers (1 means that the layer uses RoPE)"
    return reasons, how + (", layer_types, use_sliding_window true" if windowed else "")


def _rotates_everywhere(schemes: tuple[AttentionScheme, ...]) -> list[str]:
    """One rotation in every layer, or in none by a proportional factor of 0."""
    reasons = list(_rotation_reasons(_rotations(schemes)))
    if len({isinstance(s.position, Nope) for s in schemes}) > 1:
        reasons.append("it rotates in every layer or in none")
    return reasons


def _how_everywhere(schemes: tuple[AttentionScheme, ...]) -> str:
    if isinstance(schemes[0].position, Nope):
        return "rope_type proportional with factor 0.0"
    return "rope_parameters"


def _llama(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """No window: given ones are silently ignored."""
    reasons = _rotates_everywhere(schemes)
    if any(s.window is not None for s in schemes):
        reasons.append("it ignores windows")
    return reasons, _how_everywhere(schemes)


def _qwen3(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """A window by layer_types, and only with use_sliding_window true."""
    windowed = any(s.window is not None for s in schemes)
    how = _how_everywhere(schemes) + (", layer_types, use_sliding_window true" if windowed else "")
    return _rotates_everywhere(schemes), how


def _cohere(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """RoPE in every layer, no window."""
    reasons = list(_rotation_reasons(_rotations(schemes)))
    if any(isinstance(s.position, Nope) for s in schemes):
        reasons.append("it rotates in every layer")
    if any(s.window is not None for s in schemes):
        reasons.append("it has no windows")
    has_norm = schemes[0].qk_norm.kind != "none"
    return reasons, "use_qk_norm true" if has_norm else "use_qk_norm false"


def _olmo3(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """One position for the sliding layers and one for the full ones; no rotation by a proportional
    factor of 0. Without windows the rotated layers can be sliding ones as long as the sequence."""
    reasons: list[str] = []
    windowed = [s for s in schemes if s.window is not None]
    kinds = [windowed, [s for s in schemes if s.window is None]]
    how = "rope_parameters for each kind of layer"
    if not windowed:
        groups: dict[object, list[AttentionScheme]] = {}
        for scheme in schemes:
            groups.setdefault(scheme.position, []).append(scheme)
        kinds = list(groups.values())
        if len(kinds) > 2:
            reasons.append("it has two kinds of layers")
        how += ", sliding_window at least the longest sequence" if len(kinds) > 1 else ""
    elif any(len({s.position for s in kind}) > 1 for kind in kinds):
        reasons.append("its sliding layers share one position, and its full layers another")
    for rope in _rotations(schemes):
        reasons += list(_rotation_reasons({rope}))
        if isinstance(rope.scaling, YarnScaling) and not rope.scaling.truncate:
            reasons.append("it ignores yarn's truncate: false for a kind of layers")
    return reasons, how


def _granite(schemes: tuple[AttentionScheme, ...]) -> tuple[list[str], str]:
    """theta per layer, 0 for none; attention sinks, which must be switched off."""
    reasons = []
    if any(not isinstance(rope.scaling, NtkScaling | None) for rope in _rotations(schemes)):
        reasons.append("its theta per layer takes no scaling")
    if any(rope.rotary_fraction < 1 for rope in _rotations(schemes)):
        reasons.append("its theta per layer takes no partial rotation")
    return reasons, "layer_rope_theta with 0 for none, sinks at -1e9, attention_multiplier"


_POSITIONS = {
    "Cohere2": _sliding_rotates,
    "Cohere": _cohere,
    "SmolLM3": _smollm3,
    "Llama": _llama,
    "Qwen3": _qwen3,
    "GraniteSWA": _granite,
    "Exaone4": _exaone4,
    "Olmo3": _olmo3,
}
