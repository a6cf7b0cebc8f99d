"""A scheme in words, for tables and cards."""

from typing import assert_never

from megahybrid.config.attention import (
    AttentionScheme,
    Nope,
    QKNorm,
    Rope,
    Spectrum,
    rotation_of,
)


def position_in_words(scheme: AttentionScheme) -> str:
    """ "nope", "rope" or "rope, yarn x8", with the fraction of a partial rotation."""
    match scheme.position:
        case Nope():
            return scheme.position.kind
        case Rope() as rope:
            words: str = rope.kind
            if rope.rotary_fraction < 1:
                words += f" on {rope.rotary_fraction:g}"
                words += _of_spectrum(rope.spectrum)
            scaling = rope.frequency_scaling()
            return words if scaling is None else f"{words}, {scaling.words()}"
        case never:
            assert_never(never)


def _of_spectrum(spectrum: Spectrum) -> str:
    match spectrum:
        case "rotated":
            return ""
        case "head":
            return " of the head's spectrum"


def views_in_words(scheme: AttentionScheme) -> str:
    """ "near rope theta 10000, window 512; fused per token, at first 0.5"."""
    near, _ = scheme.views()
    words = f"near {position_in_words(near)}"
    words += f" theta {rope.theta:g}" if (rope := rotation_of(near.position)) else ""
    words += f", window {near.window}" if near.window else ", all keys"
    if near.score_scale.kind != "sqrt_dim":
        words += f", scale {near.score_scale.kind}"
    if scheme.split is not None:
        return f"{words}; in {scheme.split.near} of {scheme.split.of} key heads"
    assert scheme.fuse is not None
    match scheme.fuse.gate:
        case "fixed":
            return f"{words}; fused, share {scheme.fuse.initial:g}"
        case "head" | "token":
            return f"{words}; fused per {scheme.fuse.gate}, at first {scheme.fuse.initial:g}"
        case never:
            assert_never(never)


def qk_norm_in_words(norm: QKNorm) -> str:
    """ "rms over head, weight none"; the usual weight is not named; "" without a norm."""
    learned = norm.learned()
    if learned is None:
        return ""
    over, weight = learned
    words = f"{norm.kind} over {over}"
    return words if weight == "shared" else f"{words}, weight {weight}"


def beside_in_words(scheme: AttentionScheme) -> list[str]:
    """["gate per head", "bias of qkv", "learned sinks"], of these what a scheme has."""
    words = []
    match scheme.gate:
        case "none":
            pass
        case "head" | "element":
            words.append(f"gate per {scheme.gate}")
        case never_gate:
            assert_never(never_gate)
    match scheme.bias:
        case "none":
            pass
        case "qkv":
            words.append(f"bias of {scheme.bias}")
        case never_bias:
            assert_never(never_bias)
    if scheme.sink:
        words.append("learned sinks")
    return words


def norm_scale_and_beside(scheme: AttentionScheme) -> list[str]:
    """["QK-norm rms over head", "scale ssmax", "gate per head"], of these what a scheme has."""
    words = []
    if norm := qk_norm_in_words(scheme.qk_norm):
        words.append(f"QK-norm {norm}")
    if scheme.score_scale.kind != "sqrt_dim":
        words.append(f"scale {scheme.score_scale.kind}")
    return words + beside_in_words(scheme)
