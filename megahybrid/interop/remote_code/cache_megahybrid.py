"""The cache of keys and values: its name in this transformers, and one window per layer.

transformers 5.24 calls `cache` what was `past_key_values` before. Both names are accepted, and
whatever else might carry a cache is refused: a forward that ignores its cache writes wrong text.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
# The field of an output, and the keyword under which `generate` passes it on.
CACHE_NAME = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else CACHE_NAMES[1]
)


def given_cache(
    cache: Cache | None, past_key_values: Cache | None, others: Mapping[str, Any]
) -> Cache | None:
    """Return the one cache that forward was given. Raises ValueError where there are two, and
    TypeError where a keyword that forward does not know carries one."""
    for name, value in others.items():
        if _carries_cache(value) or (_names_cache(name) and _is_filled(value)):
            raise TypeError(
                f"forward() does not know {name}, which carries a cache of keys and values. "
                f"Pass it as {CACHE_NAME}."
            )
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument. Pass one.")
    return cache if cache is not None else past_key_values


def _carries_cache(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_carries_cache(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_carries_cache(item) for item in value)
    return isinstance(value, Cache) or hasattr(value, "get_seq_length")


def _names_cache(name: str) -> bool:
    """True for a keyword named like one of the caches that transformers has had; others of its
    keywords (use_cache, cache_position) hold no keys."""
    return "past" in name or name in ("cache_params", "mems", "state", "layer_past")


def _is_filled(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return len(value) > 0
    return isinstance(value, Tensor)


def check_mask(mask: Tensor, seen: int, seq: int) -> None:
    """Raise ValueError unless an attention mask has an entry for each cached and each new token.

    A longer one shows that a cache was filled and did not arrive here.
    """
    if mask.dim() != 2:
        raise ValueError("attention_mask must be [batch, length], 0 where padded.")
    if mask.shape[1] != seen + seq:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} entries, but there are {seen} tokens in the cache "
            f"and {seq} new ones. Pass the cache as {CACHE_NAME}, and a mask of both."
        )


def windowed(cache: Cache | None, windows: list[int | None]) -> Cache:
    """Return a cache whose windowed layers forget; an empty one of transformers' is made one."""
    if cache is None:
        cache = DynamicCache()
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{type(cache).__name__} holds one length for all layers; this model's differ. "
            "Use DynamicCache (leave cache_implementation out)."
        )
    held = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    if cache.get_seq_length() == 0 and held != windows:
        cache.layers = [
            DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
            for window in windows
        ]
    return cache
