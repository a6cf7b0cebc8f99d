"""Output and every gradient of a layer's attention against `expected`, query by query and head by
head: what is wrong at one document's border or in one head is not lost among all that is right."""

import math
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.model.context import SequenceContext
from megahybrid.model.selftest.expected import (
    expected_output,
    score_factor,
    visible_keys,
)
from megahybrid.model.selftest.subject import HeadShape, HeadsOnly, Rows, Violation
from megahybrid.model.selftest.whole_rows import sum_over_ranks

# Of one head's vector at one token, relative to it and not below the usual size of such vectors:
# some ten times what honest kernels were seen to differ by.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.15}
USUAL = 0.3  # of the root of the mean square
LEAST = 0.05  # of a vector of normal numbers: under a window of one key two gradients are 0
# In the order of queries, keys and values.
BIASES = ("biases.query", "biases.key", "biases.value")
FUSE_BIAS = "fuse_gate.bias"
MOST_SLACK = 4.0
SCORE = 1.0  # standard deviation of the scores: all keys count, none alone


@dataclass(frozen=True)
class Draw:
    """Normal numbers of a generator of the test's own: layers' inputs and the output's gradient."""

    hidden: Tensor  # [seq, rows, features], in the run's dtype
    grad_output: Tensor  # [seq, rows, heads, head_dim]; 0 but at `queries`
    queries: Tensor


def fill_learned(
    block: HeadsOnly, shape: HeadShape, length: int, generator: torch.Generator
) -> None:
    """Have no two weights alike, and of QK-norm and SSMax such that scores are about SCORE."""
    for name, parameter in block.learned().items():
        around = 0.3 * normal(generator, *parameter.shape)
        if name == "biases.value":
            around /= 3  # all values have it: bf16 rounds it away from a mean of a thousand
        if name not in (*BIASES, FUSE_BIAS):
            around += 1
        of_queries = name == "biases.query" and block.attention.qk_norm is None
        if of_queries or name == "qk_norm.query_weight":
            around *= _gain(block.attention.scheme, shape, length)
        if name == "query_scale.logit_scale":
            around /= math.log(_most_keys(block.attention.scheme, length) + 1)
        with torch.no_grad():
            parameter.copy_(around)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """fp64, on the host."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _gain(scheme: AttentionScheme, shape: HeadShape, length: int) -> float:
    """Return the factor of queries before anything else is done to them: in bf16 scores of
    several times SCORE are rounded by as much as would hide what is wrong."""
    return min(_gain_of_view(view, shape, length) for view in scheme.views())


def _gain_of_view(scheme: AttentionScheme, shape: HeadShape, length: int) -> float:
    match scheme.position:
        case Rope() as rope:
            rotation = rope.attention_factor()
        case Nope():
            rotation = 1.0
        case other:
            assert_never(other)
    # A row's last query has the largest factor; SSMax's own is small by what it has learned.
    position = torch.tensor([[length - 1]])
    keys = torch.tensor([[_most_keys(scheme, length)]])
    learned = 1 / (keys[0] + 1).double().log()
    largest = float(score_factor(scheme.score_scale, position, keys, learned, shape.head_dim))
    return SCORE / (max(largest, 1e-3 / shape.head_dim) * math.sqrt(shape.head_dim) * rotation**2)


def _tolerance(scheme: AttentionScheme, shape: HeadShape, length: int) -> float:
    """What is rounded of a score grows with it, and no weight of a norm without one brings scores
    down to SCORE."""
    tolerance = TOLERANCE[shape.dtype]
    if scheme.qk_norm.kind == "none" or scheme.qk_norm.weight != "none":
        return tolerance
    return tolerance * min(MOST_SLACK, max(1.0, 1 / _gain(scheme, shape, length)))


def _most_keys(scheme: AttentionScheme, length: int) -> int:
    return min(scheme.reach or length, length)


def draw(scheme: AttentionScheme, shape: HeadShape, rows: Rows, generator: torch.Generator) -> Draw:
    """Queries' gradients weigh as many as the keys that they see, so that each of a thousand keys
    gets a gradient as large as one of three does."""
    gates = scheme.token_gates(shape.heads, shape.kv_heads, shape.head_dim).values()
    features = shape.features + sum(gate.values for gate in gates)
    wide = normal(generator, rows.length, len(rows.documents), features)
    if scheme.qk_norm.kind == "none":
        wide[..., : shape.heads * shape.head_dim] *= _gain(scheme, shape, rows.length)
    of_views = [queries_of(rows, view.reach) for view in scheme.views()]
    queries = torch.cat(of_views).unique()
    seen = visible_keys(rows.starts, queries, scheme.window, scheme.chunk).sum(-1).T
    grad_output = torch.zeros(rows.length, len(rows.documents), shape.heads, shape.head_dim)
    drawn = normal(generator, len(queries), *grad_output.shape[1:]) * seen[..., None, None]
    grad_output[queries] = drawn.to(grad_output.dtype)
    where: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype}
    return Draw(wide.to(**where), grad_output.to(**where), queries)


def queries_of(rows: Rows, window: int | None) -> Tensor:
    """Two in each 64 tokens, the first and last of documents, and those about a window's end."""
    length = rows.length
    chosen = {block + 7 * block // 64 % 32 for block in range(0, length, 32)}
    for row in range(len(rows.documents)):
        borders = rows.borders(row)
        for border in borders[:-64:-1]:
            chosen |= {border - 1, border, border + 1}
    chosen |= {0, 1, length - 1, length - 2}
    if window is not None:
        chosen |= {window - 1, window, window + 1}
        # The last queries that see keys of another rank, and the first that do not.
        chosen |= {2 * window - 1, 2 * window}  # ends of chunks
        chosen |= {edge + window + off for edge in rows.edges for off in (-2, -1)}
    chosen |= {edge + off for edge in rows.edges for off in (-1, 0, 1)}
    return torch.tensor(sorted(query for query in chosen if 0 <= query < length))


def compare(
    block: HeadsOnly,
    shape: HeadShape,
    context: SequenceContext,
    rows: Rows,
    drawn: Draw,
    *,
    evaluates: bool = False,
) -> None:
    """Raise Violation at the first number that is another one; `evaluates`: without
    gradients, where a compiled layer goes another way, the output alone."""
    names = ["output", "queries", "keys", "values", *block.names[3:], *block.learned()]
    got = _numbers(block, shape, context, drawn, evaluates)
    right = _expected(block, shape, rows, drawn)
    scheme = block.attention.scheme
    seen = visible_keys(rows.starts, drawn.queries, scheme.window, scheme.chunk).sum(-1).T
    root = seen.double().sqrt().to(shape.device)[..., None]
    tolerance = _tolerance(scheme, shape, rows.length)
    for name, ours, theirs in zip(names, got, right, strict=False):
        what = "output" if name == "output" else f"gradient of {name}"
        if name in block.learned():
            part = right[1 + BIASES.index(name)] if name in BIASES else None
            _demand_whole(what, ours, theirs, tolerance, part)
            continue
        if name in ("keys", "values"):
            places, weight = torch.arange(rows.length), None
        else:
            places, weight = drawn.queries, root if name == "output" else 1 / root
        _demand_each(what, ours, theirs, weight, places, rows, shape, tolerance)


def _numbers(
    block: HeadsOnly, shape: HeadShape, context: SequenceContext, drawn: Draw, evaluates: bool
) -> list[Tensor]:
    """Output, gradients of q, k and v and of what is learned; of q at the queries asked for."""
    hidden = drawn.hidden.detach().clone().requires_grad_()
    if evaluates:
        with torch.no_grad():
            return [block.attention_output(hidden, context)[drawn.queries]]
    out = block.attention_output(hidden, context)
    learned = tuple(block.learned().values())
    # Of a sum: for a gradient given by hand autograd imports sympy, a third of a second.
    summed, leaves = (out * drawn.grad_output).sum(), (hidden, *learned)
    # What reaches nothing has a gradient of 0, and is named below.
    grads = torch.autograd.grad(summed, leaves, allow_unused=True, materialize_grads=True)
    q, k, v, *gate = _split(grads[0], block, shape)
    gate = [each[drawn.queries] for each in gate]
    of_learned = [sum_over_ranks(grad, context.shards) for grad in grads[1:]]
    return [out[drawn.queries], q[drawn.queries], k, v, *gate, *of_learned]


def _expected(block: HeadsOnly, shape: HeadShape, rows: Rows, drawn: Draw) -> list[Tensor]:
    parts = _split(drawn.hidden, block, shape)
    leaves = [x.detach().double().requires_grad_() for x in parts]
    learned = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in block.learned().items()
    }
    queries = drawn.queries.to(shape.device)
    q, k, v, *gate = leaves
    gates = dict(zip(block.names[3:], (each[queries] for each in gate), strict=True))
    scheme, starts = block.attention.scheme, rows.starts.to(shape.device)
    out = expected_output(scheme, (q, k, v), learned, gates, starts, queries)
    grad_output = drawn.grad_output[queries].double()
    of_q, of_k, of_v, *others = torch.autograd.grad(
        (out * grad_output).sum(), (*leaves, *learned.values())
    )
    of_gate = [others.pop(0)[queries] for _ in gate]
    return [out.detach(), of_q[queries], of_k, of_v, *of_gate, *others]


def _split(wide: Tensor, block: HeadsOnly, shape: HeadShape) -> list[Tensor]:
    """q, k and v [..., heads, head_dim], and each gate [..., its heads, values of each]."""
    q, k, v, *gates = wide.split(block.sizes, dim=-1)
    return [
        *(_heads(part, shape) for part in (q, k, v)),
        *(g.unflatten(-1, made) for g, made in zip(gates, block.gates.values(), strict=True)),
    ]


def _heads(x: Tensor, shape: HeadShape) -> Tensor:
    return x.unflatten(-1, (-1, shape.head_dim))


def _demand_each(
    what: str,
    got: Tensor,
    right: Tensor,
    weight: Tensor | None,
    places: Tensor,
    rows: Rows,
    shape: HeadShape,
    tolerance: float,
) -> None:
    """Each [token, row, head] for itself; `weight` [tokens, rows, 1] makes them alike in size."""
    wrong, size = ((x.detach().double()).norm(dim=-1) for x in (got.double() - right, right))
    if weight is not None:
        wrong, size = wrong * weight, size * weight
    usual = USUAL * size.square().mean().sqrt()
    least = LEAST * math.sqrt(shape.head_dim)
    relative = wrong / torch.maximum(size, usual).clamp(min=least)
    if (relative <= tolerance).all():
        return
    relative = relative.nan_to_num(nan=math.inf)
    token, row, head = (int(n) for n in (relative == relative.max()).nonzero()[0])
    place = int(places[token])
    begin = int(rows.starts[row, place])
    raise Violation(
        f"computes another {what} than it says: off by {float(relative[token, row, head]):.2g} "
        f"(relative) at token {place} of row {row} (position {place - begin} of its document), "
        f"head {head}",
        token=place,
    )


def _demand_whole(
    what: str, got: Tensor, right: Tensor, tolerance: float, summed: Tensor | None
) -> None:
    """A parameter's gradient, relative to itself and not below what a few queries give, nor below
    what is `summed` up to it: without a rotation all keys' gradients together are 0."""
    least = 10 * LEAST * math.sqrt(right.numel())
    if summed is not None:
        least = max(least, float(summed.norm()))
    wrong = float((got.double() - right).norm() / right.norm().clamp(min=least))
    if not wrong <= tolerance:
        raise Violation(f"computes another {what} than it says: off by {wrong:.2g} (relative)")
