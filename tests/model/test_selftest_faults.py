"""What the self-test must refuse: the code that trains broken on purpose, one thing at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import Rope
from megahybrid.config.scaling import Llama3Scaling
from megahybrid.errors import AuditError
from megahybrid.model import attention, core_attention, rotary
from megahybrid.model.score_scale import score_scale
from tests.model.broken_layers import (
    another_heads_factor,
    attended_by,
    built_with,
    chunks_of_documents_alone,
    chunks_of_the_row,
    factor_of,
    first_rows_mask,
    first_rows_positions,
    first_rows_runs,
    forward_with,
    keys_alone,
    keys_backwards,
    keys_one_ahead,
    late_gradient_lost,
    later_documents_joined,
    lost_value_gradient,
    neighbours_head,
    neither,
    no_attention_factor,
    no_chunks,
    nope_turned,
    normed_over_heads,
    one_factor_for_all_windows,
    one_head_still,
    one_late,
    one_mask_for_all_windows,
    one_table,
    other_theta,
    projection_normed_by_head,
    queries_alone,
    running_on,
    scaled_by,
    slow_pairs_stand,
    tail_blocks,
    through_documents,
    turns_all,
    unchunked,
    unlearned,
    unnormed_keys,
    unscaled_frequencies,
    unscaled_queries,
    unwindowed,
    values_of_one_row,
    window_of_documents_alone,
    with_tables,
    wrong_way_back,
)
from tests.model.test_compiled import TRACED, fresh_compiler
from tests.model.test_selftest import SCHEMES, check

Patch = pytest.MonkeyPatch

# By name: the schemes of the plan, and what is planted.
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[Patch], None]]] = {
    "documents-from-the-third-tail-block": (("rope-window",), tail_blocks(slice(2, None))),
    "documents-of-the-last-tail-block": (("rope-window",), tail_blocks(slice(-1, None))),
    "documents-of-the-fourth-tail-block": (("rope-window",), tail_blocks(slice(3, 4))),
    "documents-of-a-tail-block-wide": (("rope-window-prime",), tail_blocks(slice(4, 5))),
    "documents-of-the-first-row-in-runs": (("nope",), first_rows_runs),
    "documents-of-the-first-row": (("rope-partial",), first_rows_mask),
    "documents-joined-far-out": (("nope",), attended_by(later_documents_joined)),
    "window-with-documents-alone": (("rope-window",), attended_by(window_of_documents_alone)),
    "nope-turned-in-the-layer": (("nope",), forward_with(nope_turned)),
    "values-of-the-first-row": (("nope",), forward_with(values_of_one_row)),
    "fixed-scale-ignored": (("rope-fixed",), scaled_by(lambda scheme, dim: dim**-0.5)),
    "scale-twice": (("rope-window",), scaled_by(lambda scheme, dim: 1 / dim)),
    "scale-forgotten": (("nope",), scaled_by(lambda scheme, dim: 1.0)),
    "scale-a-little-off": (("nope",), scaled_by(lambda scheme, dim: 0.8 * dim**-0.5)),
    "scale-a-hair-off-window": (("rope-window",), scaled_by(lambda scheme, dim: 1.02 * dim**-0.5)),
    "scale-a-hair-off": (("nope",), scaled_by(lambda scheme, dim: 0.98 * dim**-0.5)),
    "scale-a-hair-off-log": (("nope-log",), scaled_by(lambda scheme, dim: 1.02 * dim**-0.5)),
    "scale-a-hair-off-ssmax": (("far-ssmax",), scaled_by(lambda scheme, dim: 0.98 * dim**-0.5)),
    "scale-a-hair-off-fixed": (
        ("far-fixed-small",),
        scaled_by(lambda scheme, dim: 1.02 * score_scale(scheme, dim)),
    ),
    "head-3-still": (("rope-window",), one_head_still),
    "rotation-back-the-wrong-way": (("rope-window",), wrong_way_back),
    "one-table-for-two-thetas": (("rope-window", "rope-window-prime"), one_table),
    "one-table-for-two-kinds": (("rope-window-prime", "rope-llama3"), one_table),
    "temperature-missing-llama4": (("llama4-log-0",), unscaled_queries),
    "temperature-missing-log": (("llama4-log-1",), unscaled_queries),
    "temperature-missing-ssmax": (("nope-ssmax",), unscaled_queries),
    "temperature-one-late-llama4": (("nope-llama4",), factor_of(one_late)),
    "temperature-one-late-log": (("llama4-log-1",), factor_of(one_late)),
    "temperature-one-late-ssmax": (("nope-ssmax",), factor_of(one_late)),
    "temperature-without-window": (("nope-log",), factor_of(unwindowed)),
    "temperature-through-documents": (("nope-ssmax",), factor_of(through_documents)),
    "temperature-through-documents-llama4": (("nope-llama4",), factor_of(through_documents)),
    "temperature-beyond-the-chunk": (("nope-chunk-log",), factor_of(unchunked)),
    "chunk-as-a-window": (("rope-chunk",), no_chunks),
    "chunk-of-the-row": (("rope-chunk",), chunks_of_the_row),
    "chunk-of-documents-alone": (("rope-chunk",), chunks_of_documents_alone),
    "temperature-of-another-window": (("llama4-log-1", "wide-log"), one_factor_for_all_windows),
    "temperature-of-another-head": (("nope-ssmax",), another_heads_factor),
    "temperature-gradient-lost": (("nope-ssmax",), unlearned),
    "norm-over-heads": (("rms-shared-0",), normed_over_heads),
    "norm-by-head-for-projection": (("projection-0",), projection_normed_by_head),
    "norm-of-queries-alone": (("rms-shared-1",), unnormed_keys),
    "keys-turned-alone": (("rope-window",), with_tables(keys_alone)),
    "queries-turned-alone": (("rope-window",), with_tables(queries_alone)),
    "nothing-turned": (("rope-yarn",), with_tables(neither)),
    "keys-turned-backwards": (("rope-window",), with_tables(keys_backwards)),
    "keys-one-ahead": (("rope-partial",), with_tables(keys_one_ahead)),
    "another-theta": (("rope-window",), with_tables(other_theta)),
    "scaling-forgotten": (("rope-llama3",), with_tables(unscaled_frequencies)),
    "positions-of-the-first-row": (("rope-window",), with_tables(first_rows_positions)),
    "positions-through-documents": (("rope-window",), built_with(running_on)),
    "slow-pairs-of-another-scaling": (("rope-slow",), built_with(slow_pairs_stand)),
    "all-of-the-head-turned": (("rope-partial",), built_with(turns_all)),
    "no-attention-factor": (("rope-yarn",), no_attention_factor),
    "value-gradient-of-a-head": (("rope-window",), attended_by(lost_value_gradient)),
    "key-gradient-of-the-end": (("nope",), attended_by(late_gradient_lost)),
    "values-of-the-other-group": (("nope",), attended_by(neighbours_head)),
}
SCHEMES["wide-log"] = SCHEMES["llama4-log-1"].model_copy(update={"window": 12})
SCHEMES["rope-slow"] = SCHEMES["rope-llama3"].model_copy(
    update={
        "position": Rope(
            kind="rope",
            theta=5e5,
            scaling=Llama3Scaling(kind="llama3", factor=8, original_length=8192),
        )
    }
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_layer_is_refused(fault: str, dtype: str, monkeypatch: Patch) -> None:
    names, plant = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(AuditError, match="self-test: scheme"):
        check(*names, dtype=dtype)


def test_one_mask_for_two_windows_is_refused(monkeypatch: Patch) -> None:
    one_mask_for_all_windows(monkeypatch)
    with pytest.raises(AuditError, match="self-test: scheme"):
        check("rope-window", "nope-log", kernel="reference")


def prepared_with(change: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Patch], None]:
    """A compiled region prepares its heads otherwise."""
    right = core_attention.prepare_queries_keys

    def prepare(q: Tensor, k: Tensor, table: Any, factor: Any) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            return right(q, k, table, factor)
        return change(right, q, k, table, factor)

    return lambda patch: patch.setattr(attention, "prepare_queries_keys", prepare)


def compiled_way_back(patch: Patch) -> None:
    """The rotation that compilers see turns one half the wrong way."""
    right = rotary._rotated
    patch.setattr(rotary, "_rotated", lambda x, cos, sin: right(x, cos, sin.abs()))


COMPILED_FAULTS: dict[str, tuple[str, bool, Callable[[Patch], None]]] = {
    "regions-keys-still": (
        "rope-window",
        True,
        prepared_with(lambda right, q, k, *how: (right(q, k, *how)[0], k)),
    ),
    "regions-no-temperature": (
        "nope-ssmax",
        True,
        prepared_with(lambda right, q, k, table, factor: right(q, k, table, None)),
    ),
    "regions-nope-turned": (
        "nope",
        True,
        prepared_with(lambda right, q, k, *how: (q.roll(1, 1), k)),
    ),
    "regions-rotation": ("rope-window", True, compiled_way_back),
    "pieces-rotation": ("rope-window", False, compiled_way_back),
}


@pytest.mark.parametrize("fault", COMPILED_FAULTS)
def test_a_broken_compiled_layer_is_refused(fault: str, monkeypatch: Patch) -> None:
    name, whole, plant = COMPILED_FAULTS[fault]
    plant(monkeypatch)
    check(name)  # as written it is right
    with fresh_compiler(), pytest.raises(AuditError, match="self-test: scheme"):
        check(name, compiler=TRACED, whole=whole)


def test_a_broken_way_without_gradients_is_refused(monkeypatch: Patch) -> None:
    """Compiled layers go another way where none are wanted."""
    right = core_attention.prepare_queries_keys

    def prepare(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return right(q if torch.is_grad_enabled() else q * 1.5, *args)

    monkeypatch.setattr(attention, "prepare_queries_keys", prepare)
    with fresh_compiler(), pytest.raises(AuditError, match="self-test: scheme"):
        check("rope-partial", compiler=TRACED)


def test_the_message_says_where(monkeypatch: Patch) -> None:
    one_head_still(monkeypatch)
    with pytest.raises(AuditError, match=r"of row \d \(position \d+ of its document\), head 3"):
        check("rope-window")
