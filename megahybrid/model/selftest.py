"""The positional self-test before step 0: does each scheme, on this device, see what it says?

Synthetic q, k and v go through the code that trains. Never the run's weights: on trained or bf16
weights a distant token may move nothing, and a wrong window would pass. Nothing is drawn at random
but from a generator of the test's own.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megahybrid.config.attention import (
    AttentionScheme,
    FixedScale,
    Llama4Scale,
    LogScale,
    Nope,
    Rope,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.errors import AuditError
from megahybrid.model.context import SequenceContext
from megahybrid.model.kernels import choose
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.reference import attend_reference
from megahybrid.model.logit_scale import QueryScale
from megahybrid.model.mixing import attended, mix, positioned, score_scale
from megahybrid.model.rotary import RotaryTable, rotate
from megahybrid.parallel.mesh import ParallelMesh

BEYOND_WINDOW = 72  # tokens past the window, and no multiple of any kernel's block
FULL_LENGTH = 640  # of layers without a window: more than any kernel treats as a special case
GRADIENT_WINDOW = 24  # keys
# Tokens, two rows. Of 192 tokens the last 64 are half of a block of keys: cuDNN's backward under a
# mask reads the other half as keys of score 0, and gives NaN where all others are below
# LOW_SCORE (github.com/pytorch/pytorch/issues/196678).
GRADIENT_DOCUMENTS = [[30, 1, 66, 95], [192]]
LOW_SCORE = -120.0
PROBED_SCORE = 20.0  # a probed key outweighs exp(20) keys that nothing points at
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


class _Violation(Exception):
    """What a scheme did that it must not."""


def run_self_test(
    schemes: Mapping[str, AttentionScheme],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Mapping[str, str],
    rank: int,
) -> list[tuple[str, str, float]]:
    """(scheme, kernel, seconds) of every scheme; `kernels` holds each one's name for attend().

    Raises AuditError with scheme, kernel, rank and what was violated.
    """
    report = []
    for name, scheme in schemes.items():
        began = time.perf_counter()
        kernel = kernels[name]
        run = _Run(scheme, kernel, head_dim, dtype, device)
        try:
            run.everything()
        except _Violation as violation:
            raise AuditError(
                f"self-test: scheme '{name}' with kernel {run.kernel_name()} on rank {rank} "
                f"{violation}. Do not train with it: choose another kernel, or mend this one."
            ) from None
        report.append((name, run.kernel_name(), time.perf_counter() - began))
    return report


class _Run:
    """One scheme, on one kernel, in the run's head_dim, dtype and device."""

    def __init__(
        self,
        scheme: AttentionScheme,
        kernel: str,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # The fixed part of the scale is set to 1 / sqrt(head_dim): the probes assume nothing else.
        # The part that depends on the query is checked on its own.
        self.scheme = scheme.model_copy(update={"logit_scale": SqrtDimScale()})
        self.logit_scale = scheme.logit_scale
        self.kernel, self.head_dim, self.dtype, self.device = kernel, head_dim, dtype, device
        self.generator = torch.Generator().manual_seed(20250118)
        window = scheme.window
        self.length = FULL_LENGTH if window is None else window + BEYOND_WINDOW

    @torch.no_grad()
    def everything(self) -> None:
        """All laws. Raises _Violation at the first that does not hold."""
        if isinstance(self.scheme.position, Rope):
            self.turns_by_its_frequencies(self.scheme.position)
            self.restarts_at_documents(self.scheme.position)
        else:
            self.turns_nothing(self.scheme.position)
        self.shares_each_kv_head()
        self.sees_its_keys(None)
        self.sees_its_keys(self.some_documents())
        self.differentiates(None)
        self.differentiates(Documents.from_lengths(GRADIENT_DOCUMENTS).to(self.device))
        if isinstance(self.scheme.position, Nope):
            self.is_blind_to_position()
        if not isinstance(self.logit_scale, SqrtDimScale | FixedScale):
            self.scales_its_queries()

    def kernel_name(self) -> str:
        """The kernel asked for, or the one that `auto` means here."""
        if self.kernel != "auto":
            return self.kernel
        window = self.scheme.window
        return choose(window, self.length, None, self.device, self.dtype, self.head_dim)

    def some_documents(self) -> Documents:
        """Short documents, one of a single token, and one that is longer than the window."""
        return Documents.from_lengths([[40, 1, 24, self.length - 65]]).to(self.device)

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers in the run's dtype."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.device, self.dtype)

    def context(self, length: int, documents: Documents | None) -> SequenceContext:
        """What the layers of one batch share."""
        return SequenceContext(length, documents, self.device, self.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """The scheme's attention, without its query scale."""
        return mix(
            q,
            k,
            v,
            scheme=self.scheme,
            kernel=self.kernel,
            context=self.context(q.shape[0], documents),
            query_scale=None,
        )

    def sees_its_keys(self, documents: Documents | None) -> None:
        """Causality, exactly `window` keys, documents isolated: one pass, several probed keys.

        Every query points at the probed keys alone, and each has a value channel of its own, so
        channel c of a query's output is 1 / (probes it sees) where it sees probe c, and else 0.
        """
        probes = self.probes(documents)
        direction = self.draw(self.head_dim).double()
        wanted = math.sqrt(PROBED_SCORE / score_scale(self.scheme, self.head_dim))
        pointed = (direction * wanted / direction.norm()).to(self.dtype)
        q = pointed.expand(self.length, 1, 2, -1).contiguous()
        k = torch.zeros(self.length, 1, 1, self.head_dim, dtype=self.dtype, device=self.device)
        v = torch.zeros_like(k)
        for channel, probe in enumerate(probes):
            k[probe] = pointed
            v[probe, ..., channel] = 1
        if isinstance(self.scheme.position, Rope):
            q, k = (self.turned_back(x, self.scheme.position, documents) for x in (q, k))
        out = self.mix(q, k, v, documents)[:, 0, :, : len(probes)]  # [seq, heads, probes]
        seen = (out > 0.5 / len(probes)).cpu()

        query = torch.arange(self.length)[:, None]
        key = torch.tensor(probes)
        starts = torch.zeros(self.length, 1) if documents is None else documents.starts[0].cpu()
        begins = starts.view(-1, 1)
        causal, alike = key <= query, key >= begins
        within = torch.ones_like(causal)
        if self.scheme.window is not None:
            within = key > query - self.scheme.window
        for head in range(2):
            got = seen[:, head]
            self.refuse(got & ~causal, "is not causal: query {0} sees key {1}", probes)
            self.refuse(got & ~alike, "mixes documents: query {0} sees key {1} of another", probes)
            window = f"does not see exactly window={self.scheme.window} keys"
            self.refuse(got & ~within, window + ": query {0} sees key {1}", probes)
            missed = causal & alike & within & ~got
            self.refuse(missed, window + ": query {0} misses key {1}", probes)

    def probes(self, documents: Documents | None) -> list[int]:
        """Keys at the ends, at the window's edge and at the documents' borders."""
        last = self.length - 1
        window = min(self.scheme.window or self.length, self.length)
        wanted = [0, self.length - window, last, last // 2]
        if documents is not None:
            borders = [span.start for span in documents.spans()[1:]]
            wanted = [0, borders[-1], borders[-1] - 1, borders[0], borders[0] - 1, last]
        wanted += [last - window, last - 1, 1]
        kept = [p for n, p in enumerate(wanted) if 0 <= p <= last and p not in wanted[:n]]
        return kept[: min(8, self.head_dim)]

    def turned_back(self, x: Tensor, rope: Rope, documents: Documents | None) -> Tensor:
        """x so that the rotation turns it to what it is now, times the factor squared."""
        table = self.context(x.shape[0], documents).rotary_table(rope, self.head_dim)
        return rotate(x, RotaryTable(table.cos, -table.sin))

    def refuse(self, wrong: Tensor, message: str, probes: list[int]) -> None:
        """Raises at the first wrong (query, probe)."""
        if wrong.any():
            query, channel = wrong.nonzero()[0].tolist()
            raise _Violation(message.format(query, probes[channel]))

    def shares_each_kv_head(self) -> None:
        """Query head h reads KV head h // (heads / kv_heads)."""
        length = min(self.length, 24)
        q, k = self.draw(length, 1, 4, self.head_dim), self.draw(length, 1, 2, self.head_dim)
        v = torch.tensor([0.0, 1.0], dtype=self.dtype, device=self.device)[:, None].expand_as(k)
        out = self.mix(q, k, v.contiguous())[0, 0].mean(-1).cpu()
        if (out.double() - torch.tensor([0.0, 0.0, 1.0, 1.0])).abs().max() > 0.1:
            raise _Violation("does not read KV head h // (heads / kv_heads) at query head h")

    @torch.enable_grad()
    def differentiates(self, documents: Documents | None) -> None:
        """Output and gradients of two short rows against the reference's in fp64.

        The window is cut to a few keys, of which one too many or too few moves every gradient by a
        fifth. The values are a slice of wider rows, as a fused product leaves them.
        """
        length, heads, kv_heads = sum(GRADIENT_DOCUMENTS[0]), 4, 2
        window = self.scheme.window and min(self.scheme.window, GRADIENT_WINDOW)
        scheme = self.scheme.model_copy(update={"window": window})
        scale = score_scale(scheme, self.head_dim)
        counts = (heads, kv_heads, 2 * kv_heads, heads)
        q, k, wide, slope = (self.draw(length, 2, n, self.head_dim) for n in counts)

        def results(attention: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
            q, k, wide = (x.detach().requires_grad_() for x in leaves)
            v = wide[:, :, kv_heads:]
            out = attention(q, k, v)
            # Of a sum: for a gradient given by hand autograd imports sympy, a third of a second.
            grads = torch.autograd.grad((out * slope).sum(), (q, k, v))
            return [x.detach().double() for x in (out, *grads)]

        how: dict[str, Any] = {"window": window, "documents": documents, "scale": scale}
        exact = partial(attend_reference, **how)
        context = self.context(length, documents)
        ours = partial(attended, scheme=scheme, kernel=self.kernel, context=context)
        expected = results(exact, q.double(), k.double(), wide.double())
        names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
        least = 0.1 * slope.double().norm()  # under a window of one key two gradients are 0
        for name, got, right in zip(names, results(ours, q, k, wide), expected, strict=True):
            wrong = (got - right).norm() / torch.maximum(right.norm(), least)
            if not wrong < min(0.03, 2e3 * ROUNDING[self.dtype]):
                rows = "one document" if documents is None else "several documents"
                raise _Violation(
                    f"computes another {name} than the reference in rows of {rows} "
                    f"({float(wrong):.2g} relative)"
                )
        low = math.sqrt(-LOW_SCORE / (scale * self.head_dim))
        if not all(x.isfinite().all() for x in results(ours, q - low, k + low, wide)):
            raise _Violation(f"computes what is no number where all scores are about {LOW_SCORE}")

    def turns_nothing(self, nope: Nope) -> None:
        """Queries and keys of a layer without position stay as they are."""
        q, k = self.draw(8, 1, 2, self.head_dim), self.draw(8, 1, 1, self.head_dim)
        turned_q, turned_k = positioned(q, k, nope, self.context(8, None))
        if not (torch.equal(turned_q, q) and torch.equal(turned_k, k)):
            raise _Violation("is not blind to position: its queries or keys are turned")

    def is_blind_to_position(self) -> None:
        """Keys in another order, or the same text further on, leave a NoPE query's output alone."""
        window = self.scheme.window
        length = 96 if window is None else min(window, 96)
        q = self.draw(length, 1, 1, self.head_dim) * 2
        k, v = self.draw(length, 1, 1, self.head_dim), self.draw(length, 1, 1, self.head_dim)
        before = self.mix(q, k, v)[-1]
        order = torch.cat((torch.arange(length - 2, -1, -1), torch.tensor([length - 1])))
        after = self.mix(q, k[order], v[order])[-1]
        self.demand_same(before, after, "is not blind to position: the order of keys matters")
        # The same text as a document of its own, behind another: positions differ, text does not.
        apart_q, apart_k, apart_v = (
            torch.cat((self.draw(33, 1, 1, self.head_dim), x)) for x in (q, k, v)
        )
        documents = Documents.from_lengths([[33, length]]).to(self.device)
        after = self.mix(apart_q, apart_k, apart_v, documents)[-1]
        self.demand_same(before, after, "is not blind to position: a common shift matters")

    def demand_same(self, before: Tensor, after: Tensor, message: str) -> None:
        """Raises where two outputs differ by more than rounding."""
        difference = (before.double() - after.double()).norm() / before.double().norm()
        if not difference < min(0.1, 1e3 * ROUNDING[self.dtype]) + 10 * ROUNDING[self.dtype]:
            raise _Violation(f"{message} ({float(difference):.2g} relative)")

    def turns_by_its_frequencies(self, rope: Rope) -> None:
        """Scores depend on relative position alone, and as the scheme's frequencies say.

        fp32 angles are off by about 3 units in their last place, position · frequency · 2⁻²² in
        radians, and a score by as much of |q||k|; rounding of q and k comes on top.
        """
        length, factor = self.length, rope.attention_factor()
        frequencies = rope.frequencies(self.head_dim, torch, torch.float64)
        pairs = len(frequencies)
        a = self.draw(self.head_dim)
        # Each pair of k is that of q turned by an eighth: scores are large, and show the direction.
        b = torch.cat((a[:pairs] - a[pairs : 2 * pairs], a[:pairs] + a[pairs : 2 * pairs]))
        b = torch.cat((b * math.sqrt(0.5), a[2 * pairs :]))
        q, k = (x.expand(length, 1, 1, -1).contiguous() for x in (a, b))
        turned = positioned(q, k, rope, self.context(length, None))
        q_turned, k_turned = (x[:, 0, 0].double().cpu() for x in turned)
        a, b = a.double().cpu(), b.double().cpu()
        size = factor**2 * float(a.norm() * b.norm())
        tolerance = size * (
            length * float(frequencies.max()) * 2.0**-22 + 4 * ROUNDING[self.dtype] + 2.0**-20
        )

        distance = torch.tensor(sorted({n for n in (0, 1, 2, 5, 17, length - 2) if n < length - 1}))
        near = (q_turned[distance] * k_turned[0]).sum(-1)
        shift = length - 1 - int(distance.max())
        far = (q_turned[distance + shift] * k_turned[shift]).sum(-1)
        if (near - far).abs().max() > tolerance:
            raise _Violation(f"is not blind to a common shift of {shift} positions")

        (a1, a2), (b1, b2) = a[: 2 * pairs].view(2, pairs), b[: 2 * pairs].view(2, pairs)
        angle = distance[:, None].double() * frequencies
        turned_part = (a1 * b1 + a2 * b2) * angle.cos() + (a1 * b2 - a2 * b1) * angle.sin()
        still = (a[2 * pairs :] * b[2 * pairs :]).sum()
        if (near - factor**2 * turned_part.sum(-1) - still).abs().max() > tolerance:
            raise _Violation("does not turn by position * frequency")

    def restarts_at_documents(self, rope: Rope) -> None:
        """The first token of every document is at position 0."""
        documents = self.some_documents()
        x = self.draw(self.head_dim).expand(self.length, 1, 1, -1).contiguous()
        turned, _ = positioned(x, x, rope, self.context(self.length, documents))
        begins = [span.start for span in documents.spans()]
        if not torch.equal(turned[begins], turned[:1].expand(len(begins), -1, -1, -1)):
            raise _Violation("does not restart its positions at documents")

    def scales_its_queries(self) -> None:
        """The factor that depends on the query, against its formula in Python's own arithmetic."""
        scale = self.logit_scale
        length = self.length
        if isinstance(scale, Llama4Scale):
            length = max(length, 3 * scale.floor + 2)
        documents = Documents.from_lengths([[length // 3, length - length // 3]]).to(self.device)
        scheme = self.scheme.model_copy(update={"logit_scale": scale})
        module = QueryScale.of(scheme, 1, "selftest", ParallelMesh.single(self.device))
        assert module is not None
        for where, begins in ((None, 0), (documents, length // 3)):
            ones = torch.ones(length, 1, 1, 1, dtype=self.dtype, device=self.device)
            factors = module(ones, where, length)[:, 0, 0, 0].double().cpu()
            for index in self.places(scale, begins, length):
                wanted = _factor(scale, index - begins, self.scheme.window)
                if abs(factors[index] - wanted) > 1e-5 + 4 * ROUNDING[self.dtype] * abs(wanted):
                    raise _Violation(
                        f"scales the query at position {index - begins} of its document by "
                        f"{float(factors[index]):.6g}, not {wanted:.6g}"
                    )

    def places(self, scale: object, begins: int, length: int) -> list[int]:
        """Queries at which the factor is about to change, and some where it is not."""
        steps = [0, 1, 7, self.scheme.window or 2, (self.scheme.window or 2) - 1]
        if isinstance(scale, Llama4Scale):
            steps += [scale.floor - 2, scale.floor - 1, 2 * scale.floor - 1]
        steps += [length - begins - 1]
        return sorted({begins + step for step in steps if 0 <= step < length - begins})


def _factor(scale: object, position: int, window: int | None) -> float:
    keys = position + 1 if window is None else min(position + 1, window)
    if isinstance(scale, Llama4Scale):
        return 1 + scale.coefficient * math.log(1 + (position + 1) // scale.floor)
    if isinstance(scale, LogScale):
        return math.log(scale.base + keys) / math.log(scale.base)
    assert isinstance(scale, SsmaxScale)
    return scale.initial * math.log(keys)
