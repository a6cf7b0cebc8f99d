"""Query factors against their formulas and the published oracle values."""

import math
from typing import Any

import pytest
import torch

from megahybrid.config.attention import AttentionScheme, Nope
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogScale,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.model.core_attention import prepare_queries_keys
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.score_scale import QueryScale, query_factor
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import shard_spec
from tests import distributed
from tests.parallel.compare import EXACT, draw, error, gradient_errors, load

CPU = torch.device("cpu")
NOPE = Nope(kind="nope")


def test_llama4_factor_has_the_published_values() -> None:
    scale = Llama4Scale(kind="llama4", floor=8192, coefficient=0.1)
    factor = query_factor(scale, None, None, None, 262144, CPU)[:, 0]
    wanted = {8190: 1.0, 8191: 1.069315, 65535: 1.219722, 131071: 1.283321, 262143: 1.349651}
    for position, value in wanted.items():
        assert float(factor[position]) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_factors_count_the_visible_keys_of_each_document(window: int | None) -> None:
    documents = Documents.from_lengths([[3, 9], [12]])
    for row, position in ((0, [*range(3), *range(9)]), (1, [*range(12)])):
        keys = [n + 1 if window is None else min(n + 1, window) for n in position]
        formulas: list[tuple[Any, list[float]]] = [
            (LogScale(kind="log", base=8.0), [math.log(8 + n, 8) for n in keys]),
            (SsmaxScale(kind="ssmax"), [math.log(n) for n in keys]),
            (
                Llama4Scale(kind="llama4", floor=4, coefficient=0.5),
                [1 + 0.5 * math.log(1 + (n + 1) // 4) for n in position],
            ),
        ]
        for scale, wanted in formulas:
            found = query_factor(scale, window, None, documents, 12, CPU)[:, row]
            assert found.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("scale", [SqrtDimScale(), FixedScale(kind="fixed", scale=0.2)])
def test_a_scale_that_is_the_same_for_every_query_needs_no_module(scale: Any) -> None:
    scheme = AttentionScheme(position=NOPE, score_scale=scale)
    assert QueryScale.of(scheme, 4, "blocks.0.attention", ParallelMesh.single()) is None


def ssmax_on_ranks(ranks: distributed.Ranks) -> float:
    """Worst error of the learned scale on this rank's heads."""
    mesh = ranks.mesh()
    scheme = AttentionScheme(position=NOPE, window=3, score_scale=SsmaxScale(kind="ssmax"))
    module = QueryScale.of(scheme, 4, "blocks.1.attention", mesh)
    assert module is not None
    module = module.double()
    s, q, grad = draw("s", 4).requires_grad_(), draw("q", 6, 2, 4, 8), draw("g", 6, 2, 4, 8)
    load(module, {"blocks.1.attention.logit_scale": s.detach()})
    mine = slice(2 * mesh.tensor.rank, 2 * mesh.tensor.rank + 2)
    factor = module(module.factor(None, 6, q.device))
    out, _ = prepare_queries_keys(q[:, :, mine], q[:, :, mine], None, factor)
    out.backward(grad[:, :, mine])
    keys = torch.arange(1, 7).clamp(max=3).float().log().double()
    truth = q * keys[:, None, None, None] * s[:, None]
    truth.backward(grad)
    assert s.grad is not None
    full = {"blocks.1.attention.logit_scale": s.grad}
    return max(
        error(out.detach(), truth.detach()[:, :, mine]), *gradient_errors(module, full).values()
    )


def test_the_learned_scale_is_cut_by_heads() -> None:
    assert max(distributed.run(2, ssmax_on_ranks)) < EXACT


def test_the_learned_scale_starts_where_the_config_says() -> None:
    scheme = AttentionScheme(position=NOPE, score_scale=SsmaxScale(kind="ssmax", initial=0.25))
    module = QueryScale.of(scheme, 4, "blocks.1.attention", ParallelMesh.single())
    assert module is not None and module.logit_scale is not None
    assert module.logit_scale.tolist() == [0.25] * 4
    (segment,) = shard_spec(module.logit_scale).segments
    assert (segment.name, segment.shape) == ("blocks.1.attention.logit_scale", (4,))
