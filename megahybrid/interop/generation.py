"""A class of transformers with its cache of keys and values: step by step, and as users call it."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

CACHE_STEPS = 4  # tokens that go through the cache one by one
NEW_TOKENS, FEW_NEW_TOKENS = 8, 3  # that `generate` writes


def cache_name() -> str:
    """Return this transformers' name of a cache, as a keyword and in an output: `cache` since
    5.24."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    held = {field.name for field in fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in held else "past_key_values"


def cached_logits(theirs: Any, tokens: Tensor, tail: int) -> Tensor:
    """Return the logits of the last `tail` tokens, each seen alone with a cache of those before."""
    name = cache_name()
    out = theirs(input_ids=tokens[:, :-tail], use_cache=True)
    logits = []
    for index in range(tokens.shape[1] - tail, tokens.shape[1]):
        step = {"input_ids": tokens[:, index : index + 1], name: getattr(out, name)}
        out = theirs(**step, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def generate_greedily(theirs: Any, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the prompt and `steps` tokens that the class's own `generate` wrote after it, and the
    logits [batch, steps, vocab] that it took them from.

    A folder's generation config may sample, or end at once: here none of it counts.
    """
    from transformers import GenerationConfig

    theirs.generation_config = GenerationConfig()
    out = theirs.generate(
        prompt,
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)
