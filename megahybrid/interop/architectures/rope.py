"""A rotation as transformers writes it, `rope_parameters`, out and in."""

import math
from typing import Any, assert_never

from megahybrid.config.attention import Nope, Position, Rope
from megahybrid.config.base import dump
from megahybrid.config.parsing import parse
from megahybrid.config.scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    YarnScaling,
)
from megahybrid.errors import InteropError

Fields = dict[str, Any]
NOPE: Fields = {"kind": "nope"}
# The scalings that `rope_parameters` can write; `dynamic` is none of ours.
ROPE_TYPES = (LinearScaling, NtkScaling, YarnScaling, Llama3Scaling, LongRopeScaling)


def rope_parameters(position: Position, head_dim: int) -> Fields:
    """Return the rope_parameters of transformers 5. No rotation is a proportional one of no
    part."""
    match position:
        case Nope():
            return {
                "rope_type": "proportional",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.0,
            }
        case Rope() if position.rotary_fraction < 1:
            return _partial(position, head_dim)
        case Rope():
            return _scaled(position, head_dim)
        case _:
            assert_never(position)


def _partial(position: Rope, head_dim: int) -> Fields:
    """Return the rope_parameters of a rotation of part of a head."""
    match position.spectrum:
        case "rotated":
            rotary_dim = position.rotary_dim(head_dim)
            return {
                "rope_type": "proportional",
                "rope_theta": position.theta ** (head_dim / rotary_dim),
                "partial_rotary_factor": _part_of_another_theta(rotary_dim, head_dim),
            }
        case "head":
            fields: Fields = {
                "rope_type": "proportional",
                "rope_theta": position.theta,
                "partial_rotary_factor": position.rotary_fraction,
            }
            match position.scaling:
                case None:
                    return fields
                case LinearScaling() as linear:
                    return fields | {"factor": linear.factor}
                case other:
                    raise InteropError(f"`proportional` has no scaling of kind {other.kind}.")
        case _:
            assert_never(position.spectrum)


def _part_of_another_theta(rotary_dim: int, head_dim: int) -> float:
    """Return the fraction beside a theta that is a power of ours. The class rounds down, and
    6 / 10 * 10 need not reach 6; an import knows by it who wrote that theta."""
    return (rotary_dim + 0.5) / head_dim


def _scaled(position: Rope, head_dim: int) -> Fields:
    theta, scaling = position.theta, position.scaling
    match scaling:
        case None:
            return {"rope_type": "default", "rope_theta": theta}
        case NtkScaling():
            return {"rope_type": "default", "rope_theta": scaling.scaled_theta(theta, head_dim)}
        case LinearScaling():
            return {"rope_type": "linear", "rope_theta": theta, "factor": scaling.factor}
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor_value(),
                "truncate": scaling.truncate,
            }
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case LongRopeScaling():
            return {
                "rope_type": "longrope",
                "rope_theta": theta,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "attention_factor": scaling.attention_factor_value(),
                # One for texts up to the original length and one for longer ones: ours has one.
                "short_factor": list(scaling.factors),
                "long_factor": list(scaling.factors),
            }
        case _:
            assert_never(scaling)


def switched_rope_parameters(position: Position, head_dim: int) -> Fields:
    """Return rope_parameters for a class that has a switch of its own for layers without."""
    match position:
        case Nope():
            return {"rope_type": "default", "rope_theta": 10000.0}
        case Rope():
            return rope_parameters(position, head_dim)
        case _:
            assert_never(position)


def head_dim_of(config: Any) -> int:
    """Return the dimensions of a head, which some configs leave to be worked out."""
    named = getattr(config, "head_dim", None)
    return named or config.hidden_size // config.num_attention_heads


def rope_position(parameters: Fields, config: Any) -> Fields:
    """Return our position for one rope_parameters entry."""
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    part = parameters.get("partial_rotary_factor")
    if kind == "proportional":
        return _proportional(parameters, theta, head_dim_of(config))
    position: Fields = {"kind": "rope", "theta": theta}
    if kind == "default":
        return position  # it ignores a partial_rotary_factor
    if part not in (None, 1.0):
        raise InteropError(f"rope_type={kind} with partial_rotary_factor={part} cannot be run.")
    if kind == "linear":
        scaling: Fields = {"kind": "linear", "factor": float(parameters["factor"])}
    elif kind == "llama3":
        scaling = {
            "kind": "llama3",
            "factor": float(parameters["factor"]),
            "low_frequency_factor": float(parameters["low_freq_factor"]),
            "high_frequency_factor": float(parameters["high_freq_factor"]),
            "original_length": int(parameters["original_max_position_embeddings"]),
        }
    elif kind == "yarn":
        scaling = _yarn(parameters, config)
    elif kind == "longrope":
        scaling = _longrope(parameters, config)
    else:
        raise InteropError(
            f"rope_type={kind} is not supported by our model (default, linear, yarn, llama3, "
            "proportional, longrope)."
        )
    return position | {"scaling": scaling}


def _proportional(parameters: Fields, theta: float, head_dim: int) -> Fields:
    """Return a rotation by the first frequencies of a whole head; or by all of a part's, where an
    export of ours wrote another theta for these and the bits are the same."""
    from megahybrid.interop.rotation_bits import frequencies, partial_rope, their_frequencies

    part, factor = parameters.get("partial_rotary_factor"), parameters.get("factor", 1.0)
    part = 1.0 if part is None else float(part)
    pairs = int(part * head_dim // 2)
    if pairs == 0:
        return NOPE
    if factor == 1 and part == _part_of_another_theta(2 * pairs, head_dim):
        found = partial_rope(theta, pairs, head_dim)
        if found is not None:
            return dump(found)
    position: Fields = {"kind": "rope", "theta": theta}
    if 2 * pairs < head_dim:
        position |= {"rotary_fraction": part, "spectrum": "head"}
    if factor != 1:
        position |= {"scaling": {"kind": "linear", "factor": float(factor)}}
    ours = frequencies(parse(Rope, position, where="rope_parameters"), head_dim)
    if not ours.equal(their_frequencies(theta, pairs, head_dim, factor)):
        raise InteropError(
            f"rope_type=proportional with rope_theta={theta:g}, partial_rotary_factor={part:g} and "
            f"factor={factor} has frequencies that ours do not have to the same fp32 bits."
        )
    return position


def _longrope(parameters: Fields, config: Any) -> Fields:
    """Return LongRoPE's factors, where texts of every length have the same."""
    short, long = (list(parameters[f"{which}_factor"]) for which in ("short", "long"))
    original = int(parameters["original_max_position_embeddings"])
    if short != long:
        raise InteropError(
            "rope_type=longrope with a long_factor that is not its short_factor turns every token "
            f"of a text otherwise once the text is longer than {original} tokens "
            "(original_max_position_embeddings), also those in a cache; our model has one list of "
            "factors for all lengths."
        )
    attention = parameters.get("attention_factor")
    return {
        "kind": "longrope",
        "factors": [float(value) for value in short],
        "factor": float(parameters.get("factor") or config.max_position_embeddings / original),
        "original_length": original,
        "attention_factor": None if attention is None else float(attention),
    }


def _yarn(parameters: Fields, config: Any) -> Fields:
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or config.max_position_embeddings / original)
    attention = parameters.get("attention_factor")
    up, down = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention is None and up and down and factor > 1:
        # Only together do they mean anything.
        attention = (0.1 * up * math.log(factor) + 1) / (0.1 * down * math.log(factor) + 1)
    return {
        "kind": "yarn",
        "factor": factor,
        "original_length": original,
        "beta_fast": float(parameters.get("beta_fast") or 32),
        "beta_slow": float(parameters.get("beta_slow") or 1),
        "attention_factor": None if attention is None else float(attention),
        "truncate": bool(getattr(config, "truncate", parameters.get("truncate", True))),
    }
