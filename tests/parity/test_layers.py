"""The parallel model is the plain model: float64, without DeepSpeed, at every tensor degree."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.parallel import ExchangeConfig, ParallelConfig
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import ParallelMesh
from tests import distributed
from tests.parity.cases import TURNS, every_layer_case, model
from tests.plain_model import PlainModel, random_tensors, relative_error
from tests.plain_training import random_batch

BOUND = 1e-10
SEQ = 16  # longer than the windows, a multiple of every tensor degree
Errors = dict[str, float]

LONG_CASES: dict[str, dict[str, Any]] = {
    # longer than the blocks of the windowed kernel, and not a multiple of them
    "long-rnope_swa": {
        "config": model("rnope_swa"),
        "windows": 70,
        "seq": 216,
        "recompute": "selective",
    },
    "long-without-documents": {
        "config": model("rnope_swa", "parallel", "layernorm"),
        "windows": 5,
        "seq": 140,
        "documents": False,
    },
    "a-rank-of-padding-alone": {
        # padded to 32 rows at degree 4: the last rank holds padding alone
        "config": model("rope", vocab_size=20, tied=False),
        "seq": 4,
    },
    "one-token-per-rank": {"config": model("nope", "post_norm", kv_heads=1), "seq": 4},
    "wide-heads": {"config": model("rms-shared", hidden_size=24, kv_heads=4)},
}


def with_windows(plan: LayerPlan, change: Callable[[int], int]) -> LayerPlan:
    """The plan with every window changed."""
    schemes = {
        name: scheme
        if scheme.window is None
        else scheme.model_copy(update={"window": change(scheme.window)})
        for name, scheme in plan.schemes.items()
    }
    return plan.model_copy(update={"schemes": schemes})


def case_errors(
    mesh: ParallelMesh,
    config: Any,
    *,
    seed: int = 0,
    seq: int = SEQ,
    windows: int | None = None,
    recompute: str = "none",
    documents: bool = True,
    kernel: str = "auto",
    change_window: int = 0,
    exchange: dict[str, str] | None = None,
) -> Errors:
    """Relative error of the loss, each token's loss, the logits, and every gradient this rank has.

    A shard is compared with its box of the plain gradient; a replicated parameter on every rank.
    With a context axis the parts of rows are summed; `exchange` says how queries meet their keys.
    """
    plan = config.layer_plan
    if windows is not None:
        plan = with_windows(plan, lambda window: windows)
    tensors = random_tensors(config, seed)
    batch = random_batch(config.vocab_size, 2, seq, seed, documents=documents)
    starts = batch.starts if documents else None
    plain = PlainModel(config, tensors, plan)
    loss, per_token = plain.loss(batch.tokens, batch.targets, starts)
    loss.backward()

    ours = Transformer(
        config,
        mesh,
        plan=with_windows(plan, lambda window: window + change_window),
        kernels=(kernel,) * plan.num_layers,
        recompute=(recompute,) * plan.num_layers,
        context=context_ranks(mesh, config, exchange or {}),
    ).double()
    ours.load_canonical(tensors)
    our_loss, our_per_token = ours(batch.tokens, batch.targets, starts)
    our_loss.backward()
    our_loss = all_reduce(our_loss.detach(), mesh.context)
    assert (our_per_token[batch.targets == -100] == 0).all()
    errors = {
        "loss": relative_error(our_loss, loss),
        "loss of each token": relative_error(our_per_token, per_token),
        "logits": relative_error(
            ours.logits(batch.tokens, starts), plain.logits(batch.tokens, starts)
        ),
    }
    for parameter, spec in ours.sharded_parameters().values():
        assert parameter.grad is not None, spec.segments[0].name
        flat = all_reduce(parameter.grad, mesh.context).reshape(-1)
        padding = torch.ones_like(flat, dtype=torch.bool)
        for segment, start, stop in spec.flat_ranges():
            box = tuple(slice(*bounds) for bounds in spec.box(segment))
            truth = tensors[segment.name].grad
            assert truth is not None
            # Measured against the whole tensor: a shard's own gradient may happen to be tiny. That
            # of a query which sees one key is zero.
            difference = (flat[start:stop] - truth[box].reshape(-1)).norm().item()
            errors[f"gradient of {segment.name}"] = difference / (truth.norm().item() or 1.0)
            padding[start:stop] = False
        assert not flat[padding].any(), "padding has a gradient"
    expected = {f"gradient of {name}" for name in tensors}
    assert expected <= errors.keys(), expected - errors.keys()
    return errors


def context_ranks(mesh: ParallelMesh, config: Any, exchange: dict[str, str]) -> ContextRanks | None:
    """How rows lie on the mesh's context axis; None where it has one rank."""
    if mesh.context.size == 1:
        return None
    parallel = ParallelConfig(
        tensor=mesh.tensor.size, context=mesh.context.size, exchange=ExchangeConfig(**exchange)
    )
    return ContextRanks(mesh, config, parallel)


def all_errors(ranks: distributed.Ranks, cases: dict[str, dict[str, Any]]) -> dict[str, Errors]:
    """Every case on this rank's mesh."""
    return {name: case_errors(ranks.mesh(), **case) for name, case in cases.items()}


def wrong(results: list[dict[str, Errors]]) -> list[str]:
    """What is beyond the bound, worst first."""
    found = [
        (error, f"{error:.1e} {case}: {what} (rank {rank})")
        for rank, cases in enumerate(results)
        for case, errors in cases.items()
        for what, error in errors.items()
        if not error <= BOUND
    ]
    return [line for _, line in sorted(found, reverse=True)]


CASES = every_layer_case() | LONG_CASES


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_loss_and_every_gradient_equal_the_plain_model(tensor: int) -> None:
    if tensor == 1:
        mesh = ParallelMesh.single()
        results = [{name: case_errors(mesh, **case) for name, case in CASES.items()}]
    else:
        results = distributed.run(tensor, all_errors, CASES)
    assert len(results) == tensor
    assert all(result.keys() == CASES.keys() for result in results)
    assert not wrong(results), "\n".join(wrong(results))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("off", [-1, 1], ids=["one_key_less", "one_key_more"])
def test_a_window_off_by_one_is_found(tensor: int, off: int) -> None:
    cases = {"off": {"config": model("rnope_swa"), "change_window": off, "documents": False}}
    if tensor == 1:
        results = [{"off": case_errors(ParallelMesh.single(), **cases["off"])}]
    else:
        results = distributed.run(tensor, all_errors, cases)
    assert all(result["off"]["loss"] > 1e-6 for result in results)
    assert all(result["off"]["gradient of embedding.weight"] > 1e-3 for result in results)


def errors_without_wrap(ranks: distributed.Ranks, case: dict[str, Any]) -> Errors:
    """`case` with the weights of norms read without copy_to_tensor."""

    def unwrapped(x: Tensor, axis: object) -> Tensor:
        return x

    with mock.patch("megahybrid.model.norm.copy_to_tensor", unwrapped):
        return case_errors(ranks.mesh(), **case)


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_norm_weight_read_without_its_wrap_is_found(tensor: int) -> None:
    case = {"config": model("rms-shared", "pre_norm", "layernorm")}
    for errors in distributed.run(tensor, errors_without_wrap, case):
        assert errors["loss"] <= BOUND  # forward is right: only gradients tell
        broken = {what for what, error in errors.items() if error > 1e-3}
        assert broken == {f"gradient of {name}" for name in norm_names(case["config"])}


def norm_names(config: Any) -> set[str]:
    return {name for name in random_tensors(config, 0) if "norm" in name}


def test_every_pair_of_settings_meets_in_a_case() -> None:
    rows = []
    for case in every_layer_case().values():
        config = case["config"]
        settings = (config.block, config.norm, config.num_kv_heads, config.tie_embeddings)
        rows.append(
            (*settings, config.logit_scale, *(case[name] for name in TURNS if name in case))
        )
    for one, other in combinations(range(len(rows[0])), 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(product({row[one] for row in rows}, {row[other] for row in rows}))
