"""What every scheme must obey, by probes that name the law: which keys are seen, where positions
begin, how queries are scaled. Each goes through the code that trains."""

import math

import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, NearView, Nope, Rope
from megahybrid.config.score_scale import (
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    ScoreScale,
    SsmaxScale,
)
from megahybrid.config.ssmax_start import start_of
from megahybrid.model.context import SequenceContext
from megahybrid.model.core_attention import prepare_queries_keys
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.score_scale import QueryScale
from megahybrid.model.selftest.comparison import normal
from megahybrid.model.selftest.expected import angles, score_factor, visible_keys
from megahybrid.model.selftest.subject import (
    ROUNDING,
    Contexts,
    HeadShape,
    HeadsOnly,
    Rows,
    Violation,
)
from megahybrid.model.selftest.whole_rows import own_places
from megahybrid.parallel.mesh import ParallelMesh

PROBED_SCORE = 20.0  # a probed key outweighs exp(20) keys that nothing points at
MOST_PROBES = 32
LOW_SCORE = -120.0
POINTED, SCALED_KEYS = 8.0, 64  # a key's score, and how many keys share what it leaves
# Relative, of a score: bf16 rounds the scaled query, and in the reference the score as well.
SCALE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.01}


def bare(scheme: AttentionScheme) -> AttentionScheme:
    """Return a scheme that sees the same keys, without all else, of which `compare` judges."""
    nope, near = Nope(kind="nope"), None
    if scheme.near is not None:
        near = NearView(position=nope, window=scheme.near.window)
    return AttentionScheme(
        position=nope, window=scheme.window, chunk=scheme.chunk, near=near, fuse=scheme.fuse
    )


def sees_its_keys(
    block: HeadsOnly,
    shape: HeadShape,
    context: SequenceContext,
    rows: Rows,
    view: AttentionScheme | None = None,
) -> None:
    """Causality, exactly `window` keys, documents isolated, KV heads shared in groups; `view` is
    the one of two that has all of a fused output.

    Every query points at the probed keys alone, and each has a value channel of its own, so channel
    c of a query's output is 1 / (probes it sees) where it sees probe c, and else 0. The last
    channel holds the number of the KV head.
    """
    scheme = view or block.attention.scheme
    window = scheme.reach
    probes = [_probes(rows, row, window, shape.head_dim) for row in range(len(rows.documents))]
    direction = normal(torch.Generator().manual_seed(1), shape.head_dim)
    pointed = direction * math.sqrt(PROBED_SCORE * math.sqrt(shape.head_dim)) / direction.norm()
    length, count = rows.length, len(probes[0])
    q = pointed.expand(length, len(probes), shape.heads, -1)
    k = torch.zeros(length, len(probes), shape.kv_heads, shape.head_dim, dtype=torch.float64)
    v = torch.zeros_like(k)
    v[..., -1] = torch.arange(shape.kv_heads) / shape.kv_heads
    for row, these in enumerate(probes):
        for channel, probe in enumerate(these):
            k[probe, row] = pointed
            v[probe, row, :, channel] = 1
    hidden = torch.cat([x.flatten(-2) for x in (q, k, v)], dim=-1)
    out = block.attention_output(hidden.to(shape.device, shape.dtype), context)
    out = out.detach().double().cpu()

    of_group = torch.arange(shape.heads) // (shape.heads // shape.kv_heads) / shape.kv_heads
    wrong = (out[..., -1] - of_group).abs().amax((1, 2))
    if shape.head_dim > count and not wrong.max() < 0.3 / shape.kv_heads:
        raise Violation(
            "does not read KV head h // (heads / kv_heads) at query head h",
            token=int(wrong.argmax()),
        )
    seen = out[..., :count] > 0.5 / count
    for row, these in enumerate(probes):
        for head in range(shape.heads):
            _demand_right(seen[:, row, head], torch.tensor(these), rows.starts[row], scheme)


def _demand_right(got: Tensor, probes: Tensor, starts: Tensor, scheme: AttentionScheme) -> None:
    """`got` [queries, probes]: whether a query sees a probe."""
    query = torch.arange(len(got))[:, None]
    causal, alike = probes <= query, probes >= starts[:, None]
    window, chunk = scheme.window, scheme.chunk
    within = torch.ones_like(causal) if window is None else probes > query - window
    exactly = f"does not see exactly window={window} keys"
    if chunk is not None:
        begins = starts[:, None]
        within = (query - begins) // chunk == (probes - begins) // chunk
        exactly = f"does not see exactly the keys of its chunk={chunk}"
    for wrong, message in (
        (got & ~causal, "is not causal: query {0} sees key {1}"),
        (got & ~alike, "mixes documents: query {0} sees key {1} of another"),
        (got & ~within, exactly + ": query {0} sees key {1}"),
        (causal & alike & within & ~got, exactly + ": query {0} misses key {1}"),
    ):
        if wrong.any():
            at, channel = (int(n) for n in wrong.nonzero()[0])
            raise Violation(message.format(at, int(probes[channel])), token=at)


def _probes(rows: Rows, row: int, window: int | None, head_dim: int) -> list[int]:
    """Keys at the ends, at the window's edge and at the documents' borders: as many in each row."""
    length = rows.length
    last, reach = length - 1, min(window or length, length)
    borders = rows.borders(row)
    wanted = [0, borders[-1] - 1, borders[-1], borders[0] - 1, borders[0]] if borders else []
    turn = row % max(1, len(rows.edges))
    for edge in (rows.edges[turn:] + rows.edges[:turn])[:3]:
        wanted = [edge - reach + 1, edge - 1, edge, edge - reach, *wanted]
    wanted += [reach - 1, reach] if reach < length else []  # about the end of a first chunk
    wanted += [0, length - reach, last, last // 2, last - reach, last - 1, 1]
    wanted += [key for border in borders[::-1] for key in (border - 1, border)]
    wanted += list(range(2, length, max(1, length // MOST_PROBES)))
    kept = list(dict.fromkeys(key for key in wanted if 0 <= key <= last))
    # One channel is the KV head's, where there is one to spare.
    return kept[: min(MOST_PROBES, max(head_dim - 1, 1), length)]


def stays_finite(block: HeadsOnly, shape: HeadShape, context: SequenceContext, rows: Rows) -> None:
    """Demand gradients that are numbers where all scores are low."""
    generator = torch.Generator().manual_seed(2)
    hidden = normal(generator, rows.length, len(rows.documents), shape.features)
    grad_output = normal(generator, *hidden.shape[:2], shape.heads, shape.head_dim)
    low = math.sqrt(-LOW_SCORE / math.sqrt(shape.head_dim))
    of_queries = shape.heads * shape.head_dim
    hidden[..., :of_queries] -= low
    hidden[..., of_queries : of_queries + shape.kv_heads * shape.head_dim] += low
    moved = hidden.to(shape.device, shape.dtype).requires_grad_()
    out = block.attention_output(moved, context)
    (grad,) = torch.autograd.grad((out * grad_output.to(out)).sum(), moved)
    if not (out.isfinite().all() and grad.isfinite().all()):
        raise Violation(f"computes what is no number where all scores are about {LOW_SCORE}")


def is_blind_to_position(
    block: HeadsOnly,
    shape: HeadShape,
    contexts: Contexts,
    length: int = 192,
    view: AttentionScheme | None = None,
) -> None:
    """Keys in another order, or the same text further on, leave a NoPE query's output alone;
    `view` is the one of two that has all of a fused output."""
    apart = 33
    scheme = view or block.attention.scheme
    reach = min(scheme.window or length, length)
    if scheme.chunk is not None:  # from the start of the last query's chunk
        reach = (length - 1) % scheme.chunk + 1
    generator = torch.Generator().manual_seed(3)
    text = normal(generator, length, 1, sum(block.sizes)).expand(-1, 2, -1).clone()
    kv = slice(shape.heads * shape.head_dim, None)
    text[length - reach : -1, 1, kv] = text[length - reach : -1, 1, kv].flip(0)
    rows = Rows.of([length], [length])
    out = block.attention_output(text.to(shape.device, shape.dtype), contexts.of(rows)).detach()
    ordered = out

    text = normal(generator, length, 2, sum(block.sizes))
    text[apart:, 0] = text[: length - apart, 1]
    rows = Rows.of([apart, length - apart], [length - apart, apart])
    out = block.attention_output(text.to(shape.device, shape.dtype), contexts.of(rows)).detach()
    _demand_same(ordered[-1, 0], ordered[-1, 1], "the order of keys matters", shape)
    _demand_same(out[apart:, 0], out[: length - apart, 1], "a common shift matters", shape)


def _demand_same(before: Tensor, after: Tensor, what: str, shape: HeadShape) -> None:
    difference = float((before.double() - after.double()).norm() / before.double().norm())
    if not difference < min(0.1, 1e3 * ROUNDING[shape.dtype]) + 10 * ROUNDING[shape.dtype]:
        raise Violation(f"is not blind to position: {what} ({difference:.2g} relative)")


def rotates_by_its_frequencies(
    rope: Rope, shape: HeadShape, context: SequenceContext, rows: Rows
) -> None:
    """The table that layers turn by has this scheme's angles, from 0 at each document's start, in
    every pair: those that turn by a thousandth of a radian here turn round at a million tokens."""
    table = context.rotary_table(rope, shape.head_dim)
    here = own_places(context.shards)
    positions = torch.arange(rows.length)[:, None] - (rows.starts.T if rows.several else 0)
    positions = positions[here]
    angle = angles(positions, rope, shape.head_dim)[:, :, None]
    factor, pairs = rope.attention_factor(), angle.shape[-1]
    for got, right in ((table.cos[..., :pairs], angle.cos()), (table.sin, angle.sin())):
        expected = right.double() * factor
        wrong = (got.double().cpu() - expected).abs()
        if not (wrong <= 2 * ROUNDING[shape.dtype] * expected.abs() + 5e-7).all():
            where = int(torch.arange(rows.length)[here][(wrong.amax((1, 2, 3)) > 0).nonzero()[0]])
            if rows.several:
                raise Violation(
                    f"does not restart its positions at documents (token {where}), or does not "
                    "turn by position * frequency there",
                    token=where,
                )
            raise Violation("does not turn by position * frequency", token=where)


def scales_its_scores(scheme: AttentionScheme, shape: HeadShape, kernel: str) -> None:
    """Check the factor of q·k, within a hundredth even in bf16: the last query points at its own
    key alone, by a score of POINTED, and what is left for the other keys tells the score that was.
    Of vectors drawn at random a factor moves the output by less than bf16 rounds."""
    if scheme.reach == 1:
        return  # one key gets everything, whatever its score
    length = min(scheme.reach or SCALED_KEYS, SCALED_KEYS)
    scaled = bare(scheme).model_copy(update={"score_scale": scheme.score_scale})
    block = HeadsOnly(shape, scaled, kernel)
    scale, last = scheme.score_scale, torch.tensor([[length - 1]])
    learned = None
    if isinstance(scale, SsmaxScale):
        learned = torch.full((shape.heads,), start_of(scale), dtype=torch.float64)
    factor = float(score_factor(scale, last, last + 1, learned, shape.head_dim).flatten()[0])
    if not factor:
        return
    hidden = torch.zeros(length, 1, shape.features, dtype=torch.float64)
    of_queries, of_keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    side = torch.tensor(math.sqrt(POINTED / abs(factor))).to(shape.dtype).double()
    hidden[-1, 0, : of_queries : shape.head_dim] = math.copysign(1.0, factor) * side
    hidden[-1, 0, of_queries : of_queries + of_keys : shape.head_dim] = side
    hidden[:-1, 0, of_queries + of_keys :: shape.head_dim] = 1  # values of the other keys
    context = Contexts(shape).of(Rows.of([length]))
    with torch.no_grad():
        out = block.attention_output(hidden.to(shape.device, shape.dtype), context)
    left = out[-1, 0, :, 0].double().cpu()
    score, wanted = ((1 - left) / left * (length - 1)).log(), float(side**2) * abs(factor)
    wrong = (score / wanted - 1).abs()
    if not (wrong <= SCALE_TOLERANCE[shape.dtype]).all():
        head = int(wrong.nan_to_num(nan=math.inf).argmax())
        raise Violation(
            f"multiplies q·k by {factor * float(score[head]) / wanted:.4g}, not {factor:.4g} "
            f"(head {head})"
        )


def scales_its_queries(scheme: AttentionScheme, shape: HeadShape, length: int) -> None:
    """The factor that depends on the query, number by number: at the steps of `llama4` as well,
    which may be beyond any probe."""
    module = QueryScale.of(scheme, 1, "selftest", ParallelMesh.single(shape.device))
    if module is None:
        return  # the same for every query
    scale = module.scale
    if isinstance(scale, Llama4Scale):
        length = max(length, 3 * scale.floor + 2)
    if isinstance(scale, PowerScale | LogFromScale):
        length = max(length, 3 * scale.length + 2)
    for rows in (Rows.of([length]), Rows.of([length // 3, length - length // 3])):
        documents = Documents(rows.starts).to(shape.device) if rows.several else None
        ones = torch.ones(length, 1, 1, 1, dtype=shape.dtype, device=shape.device)
        factor = module(module.factor(documents, length, shape.device))
        queries, _ = prepare_queries_keys(ones, ones, None, factor)
        factors = queries[:, 0, 0, 0].detach().double().cpu()
        begins = int(rows.starts[0, -1])
        for index in _places(scheme, begins, length):
            position = torch.tensor([[index - begins]])
            query = torch.tensor([index])
            keys = visible_keys(rows.starts, query, scheme.window, scheme.chunk).sum(-1)
            learned = None
            if isinstance(scale, SsmaxScale):
                learned = torch.tensor([start_of(scale)], dtype=torch.float64)
            wanted = float(score_factor(scale, position, keys, learned, 1))
            if not abs(factors[index] - wanted) <= 1e-5 + _rounding(scale, shape) * abs(wanted):
                raise Violation(
                    f"scales the query at position {index - begins} of its document by "
                    f"{float(factors[index]):.6g}, not {wanted:.6g}"
                )


def _rounding(scale: ScoreScale, shape: HeadShape) -> float:
    """Return by how much a factor may be off, relative to it: it is made in fp32, from logarithms
    which are small for a small base, and multiplies in the run's dtype."""
    of_base = 2.0**-22 / math.log(scale.base) if isinstance(scale, LogScale) else 0.0
    return 4 * ROUNDING[shape.dtype] + 1e-6 + of_base


def _places(scheme: AttentionScheme, begins: int, length: int) -> list[int]:
    """Queries at which the factor is about to change, and some where it is not."""
    window, scale = scheme.reach or 2, scheme.score_scale
    steps = [0, 1, 7, window, window - 1]
    if isinstance(scale, PowerScale | LogFromScale):
        steps += [scale.length - 1, scale.length, 2 * scale.length]
    if isinstance(scale, Llama4Scale):
        steps += [scale.floor, scale.floor - 2, scale.floor - 1, 2 * scale.floor - 1]
    steps += [length - begins - 1]
    return sorted({begins + step for step in steps if 0 <= step < length - begins})
