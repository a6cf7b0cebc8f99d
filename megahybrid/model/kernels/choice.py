"""The choice of a kernel for each kind of layer: named, kept from a checkpoint, or the fastest by
measure."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.training import KernelConfig
from megahybrid.errors import first_line
from megahybrid.model.core_attention import core_attention
from megahybrid.model.kernels import AttentionSpec, choose
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.registry import REGISTRY, measured
from megahybrid.parallel import matmul

WINDOWS = {"full": None, "windowed": 1}  # of each kind of layer; 1 is shorter than every row
KINDS = tuple(WINDOWS)
REPEATS = 3
# Of results that differ by rounding alone, relative: bf16 kernels are some 0.005 apart.
DISAGREEMENT = 0.03
# Rows of a measurement with documents are cut into pieces of about this many tokens.
DOCUMENT_TOKENS = 2048

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """The size of a layer's attention: the shape of one micro batch."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    documents: bool  # rows may hold several
    before: int = 0  # keys ahead of the first of `length` queries


def resolve_kernels(
    wanted: KernelConfig,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    pinned: ChosenKernels | None = None,
    last_queries: Collection[str] = (),
    sinks: Collection[str] = (),
) -> ChosenKernels:
    """Return what the run file names, else what the checkpoint had on the same kind of device (so
    that a resume repeats its bits), else a choice without a measurement. `length` is there where
    the checkpoint's choice was measured at that length.

    `last_queries` names the kinds of layers whose queries are the last of more keys: a checkpoint's
    kernel that cannot do that is not taken. `sinks` names the kinds of which some layers have
    learned sinks."""
    kept = pinned if pinned is not None and pinned.device == device.type else None
    measured_length = None if kept is None else kept.length
    # A window shorter than the row: it serves every batch.
    several = Documents(torch.zeros(1, 2, dtype=torch.int64))
    kinds: dict[str, str] = {}
    for kind, window in WINDOWS.items():
        name = getattr(wanted, kind)
        if name == "auto":
            known = None if kept is None else getattr(kept, kind)
            before = 1 if kind in last_queries else None
            if known and before and "before" not in REGISTRY[known].serves:
                known = measured_length = None  # measured anew, if that is worth it
            name = known or choose(
                window, 2, several, device, dtype, head_dim, before, kind in sinks
            )
        kinds[kind] = name
    products: str | None = None
    if device.type == "cpu":
        known = None if kept is None else kept.products
        usual = known or matmul.usual_routine()
        products = usual if wanted.products == "auto" else wanted.products
    kept_blocks = "plain" if kept is None else kept.blocks
    return ChosenKernels(
        device=device.type,
        **kinds,
        blocks=kept_blocks if wanted.blocks == "auto" else wanted.blocks,
        products=products,
        length=measured_length,
    )


def candidates(
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    before: int | None = None,
    sinks: bool = False,
) -> list[str]:
    """Return the exact kernels with a backward that are measured for a kind of layer there, the
    usual one first; `before` as in a spec, `sinks` where some of these layers have them."""
    return measured(WINDOWS[kind], device, dtype, head_dim, before, sinks)


def kinds_with_sinks(schemes: Iterable[AttentionScheme]) -> set[str]:
    """Return the kinds of layers of which some have learned sinks."""
    return {"full" if scheme.reach is None else "windowed" for scheme in schemes if scheme.sink}


def measure(
    names: Sequence[str],
    window: int | None,
    work: Workload,
    seconds_of: Callable[[Callable[[], object], torch.device], float] | None = None,
) -> dict[str, float | str]:
    """Seconds of one forward and backward of each kernel, or why it has none.

    Rows are one document; where they may hold several, the time of rows cut into pieces is added.
    A kernel whose output or gradients are not those of the first that ran is not chosen either: at
    the stage's own length, of which no small test knows.
    """
    clock = seconds_of or least_seconds
    found: dict[str, float | str] = {}
    situations = _situations(work)
    first: list[Results] = []
    for name in names:
        try:
            runs = [_both(name, window, work, documents) for documents in situations]
            seconds = sum(clock(run, work.device) for run in runs)
            results = [run() for run in runs] if len(names) > 1 else []
            first = first or results
            for ours, expected in zip(results, first, strict=True):
                demand_agreement(ours, expected, "the first kernel's")
            found[name] = seconds
        except Exception as error:  # a kernel may fail in any way: then it is not chosen
            found[name] = why_it_failed(error)
    return found


def demand_agreement(results: Results, expected: Results, whose: str) -> None:
    """Raises ArithmeticError at the first of `results` that differs from `expected`, which are
    `whose`, by more than rounding."""
    for (what, result), other in zip(results.items(), expected.values(), strict=True):
        apart, size = (vector_norm(x, dtype=torch.float32) for x in (result - other, other))
        if not apart <= DISAGREEMENT * size:  # NaN is no agreement
            raise ArithmeticError(f"another {what} than {whose} by {apart / size:.2g}")


def why_it_failed(error: Exception) -> str:
    """In one short line, for a table of milliseconds."""
    return f"{type(error).__name__}: {first_line(error)[:120]}"


def fastest(found: dict[str, float | str]) -> str | None:
    """The name with the fewest seconds; None where nothing ran."""
    ran = {name: value for name, value in found.items() if isinstance(value, float)}
    return min(ran, key=lambda name: ran[name]) if ran else None


def _situations(work: Workload) -> list[Documents | None]:
    tokens = work.before + work.length
    pieces = tokens // DOCUMENT_TOKENS
    if not work.documents or pieces < 2:
        return [None]
    lengths = [DOCUMENT_TOKENS] * (pieces - 1)
    lengths.append(tokens - sum(lengths))
    return [None, Documents.from_lengths([lengths] * work.rows).to(work.device)]


def _both(
    name: str, window: int | None, work: Workload, documents: Documents | None
) -> Callable[[], Results]:
    """A forward and backward on drawn values, the same for every kernel."""
    generator = torch.Generator(work.device).manual_seed(1)

    def draw(heads: int, tokens: int = work.length) -> Tensor:
        shape = (tokens, work.rows, heads, work.head_dim)
        drawn = torch.randn(shape, generator=generator, device=work.device, dtype=work.dtype)
        return drawn.requires_grad_()

    keys = work.before + work.length
    q, k, v = draw(work.heads), draw(work.kv_heads, keys), draw(work.kv_heads, keys)
    grad_output = draw(work.heads).detach()
    spec = AttentionSpec(
        window=window, documents=documents, before=work.before, scale=work.head_dim**-0.5
    )

    def run() -> Results:
        out = core_attention(q, k, v, spec, name)
        results = (out.detach(), *torch.autograd.grad(out, (q, k, v), grad_output))
        return dict(zip(("output", "dq", "dk", "dv"), results, strict=True))

    return run


def least_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of a few runs: neighbours and clocks only ever add."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    # One thread's own seconds, which neighbours disturb least.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    once()
    return min(once() for _ in range(REPEATS))
