"""What the config counts without torch is what the plain model holds and multiplies."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.counting import (
    attended_pairs_of,
    kv_cache_bytes,
    parameter_shapes,
    parameters,
    training_flops,
)
from megahybrid.config.model import ModelConfig
from tests.parity.cases import BLOCKS, FAMILIES, NORMS, every_layer_case, model
from tests.plain_model import PlainModel, canonical_shapes, random_tensors, visible

# The fields of a model, not the model: building it while drawing would hide a failing field.
fields = st.fixed_dictionaries(
    {
        "family": st.sampled_from(sorted(FAMILIES)),
        "block": st.sampled_from(BLOCKS),
        "norm": st.sampled_from(NORMS),
        "kv_heads": st.sampled_from((1, 2, 4)),
        "tied": st.booleans(),
        "vocab_size": st.integers(3, 60),
        "hidden_size": st.integers(2, 40),
    }
)


@pytest.mark.parametrize("case", every_layer_case())
def test_shapes_are_those_of_the_plain_model(case: str) -> None:
    config = every_layer_case()[case]["config"]
    assert parameter_shapes(config) == canonical_shapes(config)
    assert parameters(config) == sum(
        math.prod(shape) for shape in canonical_shapes(config).values()
    )


def heads_of(scheme: AttentionScheme, view: Any, config: ModelConfig) -> int:
    """How many query heads have a view of their keys."""
    if scheme.split is None:
        return config.num_heads
    group = config.num_heads // config.num_kv_heads
    near = [head // group % scheme.split.of < scheme.split.near for head in range(config.num_heads)]
    return near.count(view is scheme.near)


@settings(max_examples=25)
@given(fields, st.integers(1, 20))
def test_training_flops_are_three_forwards_of_counted_products(
    fields: dict[str, Any], length: int
) -> None:
    config = model(**fields)
    tensors = random_tensors(config, 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        PlainModel(config, tensors).logits(torch.zeros(1, length, dtype=torch.int64))
    forward = counter.get_total_flops()
    # the plain model multiplies every pair and then masks: a product of each pair and dimension for
    # the scores of each view, and one for values
    each, starts = 2 * config.num_heads * config.head_dim, torch.zeros(1, length, dtype=torch.int64)
    for scheme in config.layer_plan.expand():
        views = [scheme] if scheme.near is None else [scheme.near, scheme]
        forward -= each * length**2 * (len(views) + 1)
        for view in views:
            pairs = int(visible(starts, view.window, scheme.chunk).sum())
            forward += 2 * each * pairs * heads_of(scheme, view, config) // config.num_heads
    assert training_flops(config, [length]) == 3 * forward


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 14)),
)
def test_attended_pairs_are_the_true_entries_of_the_plain_mask(
    lengths: list[int], window: int | None
) -> None:
    starts = [start for n, length in enumerate(lengths) for start in [sum(lengths[:n])] * length]
    mask = visible(torch.tensor([starts]), window)
    assert attended_pairs_of(lengths, window) == mask.sum().item()


@given(fields, st.integers(1, 40))
def test_the_cache_holds_the_most_keys_that_a_query_sees(
    fields: dict[str, Any], length: int
) -> None:
    config, seen = model(**fields), 0
    for scheme in config.layer_plan.expand():
        mask = visible(torch.zeros(1, length, dtype=torch.int64), scheme.window, scheme.chunk)
        seen += int(mask[0].sum(-1).max())
    values = 2 * config.num_kv_heads * config.head_dim * seen  # keys and values
    assert kv_cache_bytes(config, length, bytes_per_value=2) == 2 * values
