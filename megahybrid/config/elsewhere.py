"""Where in a file a field belongs that somebody wrote in another place, or by another's name."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

MOST = 2
ENTRY, ITEM = "NAME", "N"  # a key of one's own, the number of a list's item

# What other trainers and model files call it. Fields that are called the same need no line.
OTHERS_NAMES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), "model.layer_plan.num_layers"),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), "model.num_heads"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), "model.num_kv_heads"),
    **dict.fromkeys(("d_model", "n_embd", "hidden_dim"), "model.hidden_size"),
    **dict.fromkeys(("d_ff", "ffn_hidden_size", "n_inner"), "model.intermediate_size"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), "model.eps"),
    **dict.fromkeys(("initializer_range", "init_std"), "model.initial_std"),
    "tie_word_embeddings": "model.tie_embeddings",
    **dict.fromkeys(
        ("sliding_window", "window_size"), f"model.layer_plan.schemes.{ENTRY}.window"
    ),
    **dict.fromkeys(
        ("rope_theta", "rotary_base"), f"model.layer_plan.schemes.{ENTRY}.position.theta"
    ),
    "rope_scaling": f"model.layer_plan.schemes.{ENTRY}.position.scaling",
    **dict.fromkeys(
        ("seq_len", "seq_length", "sequence_length", "max_position_embeddings", "max_seq_len"),
        f"stages.{ITEM}.lengths",
    ),
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), f"stages.{ITEM}.learning_rate"),
    "warmup_steps": f"stages.{ITEM}.learning_rate.warmup_tokens",
    **dict.fromkeys(
        ("batch_size", "global_batch_size", "train_batch_size"), f"stages.{ITEM}.batch_tokens"
    ),
    **dict.fromkeys(
        ("micro_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
        f"stages.{ITEM}.micro_batch_tokens",
    ),
    **dict.fromkeys(
        ("max_steps", "train_iters", "num_train_epochs", "epochs"), f"stages.{ITEM}.tokens"
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing"), f"stages.{ITEM}.recompute"
    ),
    **dict.fromkeys(("tensor_parallel", "tensor_model_parallel_size", "tp"), "parallel.tensor"),
    **dict.fromkeys(("context_parallel", "context_parallel_size", "cp"), "parallel.context"),
    **dict.fromkeys(
        ("grad_clip", "clip_grad", "max_grad_norm", "gradient_clipping"), "optimizer.clip_norm"
    ),
    **dict.fromkeys(("z_loss_multiplier", "z_loss_coeff", "zloss_coeff"), "z_loss"),
    **dict.fromkeys(("dtype", "torch_dtype", "bf16"), "precision"),
    **dict.fromkeys(("output_dir", "save_dir"), "directory"),
    **dict.fromkeys(("save_steps", "save_interval"), "checkpoint.every_steps"),
    **dict.fromkeys(("eval_steps", "eval_interval"), "evaluate.every_steps"),
}  # fmt: skip


def belongs(type_: type[BaseModel], parts: Sequence[str]) -> str | None:
    """Return "model.layer_plan.num_layers" for what was written as model.num_layers, two such
    places with "or", or None where a file of class `type_` has no field of that name."""
    known = places(type_)
    found = [] if parts[-1] == "kind" else list(known.get(parts[-1], ()))
    other = OTHERS_NAMES.get(parts[-1])
    if not found and other is not None and other in known.get(other.rpartition(".")[2], ()):
        found = [other]
    if not found:
        return None
    filled = [_filled(place.split("."), parts) for place in found]
    nearest = max(_common(place, parts) for place in filled)
    best = [place for place in filled if _common(place, parts) == nearest]
    shortest = min(map(len, best))
    # Of places that are as near, the outermost: a name that many have says little.
    told = [".".join(place) for place in best if len(place) == shortest][: MOST + 1]
    return " or ".join(told) if len(told) <= MOST else None


def _filled(place: list[str], parts: Sequence[str]) -> list[str]:
    """A place with the names and numbers that were written, as far as the two agree."""
    filled = list(place)
    for index, (known, written) in enumerate(zip(place, parts, strict=False)):
        if known == written:
            continue
        if known == ENTRY or (known == ITEM and re.fullmatch(r"\d+", written)):
            filled[index] = written
        else:
            break
    return filled


def _common(place: Sequence[str], parts: Sequence[str]) -> int:
    same = 0
    for known, written in zip(place, parts, strict=False):
        if known != written:
            break
        same += 1
    return same


@cache
def places(type_: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """The dotted paths of every field below `type_`, by its name."""
    found: dict[str, dict[str, None]] = {}
    for path in _walk(type_, "", ()):
        found.setdefault(path.rpartition(".")[2], {})[path] = None
    return {name: tuple(paths) for name, paths in found.items()}


def _walk(type_: type[BaseModel], at: str, above: tuple[type[BaseModel], ...]) -> Iterator[str]:
    if type_ in above:
        return
    for name, field in type_.model_fields.items():
        here = f"{at}.{name}" if at else name
        yield here
        for inner, below in _models(field.annotation, here):
            yield from _walk(inner, below, (*above, type_))


def _models(annotation: Any, at: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The classes that a value at `at` may hold, and where in it they stand."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, at
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _models(arguments[0], at)
    elif origin is dict:
        yield from _models(arguments[1], f"{at}.{ENTRY}")
    elif origin in (list, tuple):
        for argument in arguments:
            yield from _models(argument, f"{at}.{ITEM}")
    else:
        for argument in arguments:
            yield from _models(argument, at)
