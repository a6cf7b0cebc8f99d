"""cuDNN's attention through nvidia-cudnn-frontend: windows and grouped heads, near FA3's rates.

A graph is built and compiled, about half a second, for each shape, window and scale that a thread
meets, and kept: plans and handles must not be shared by threads (cuDNN's release notes), and
autograd has its own.
"""

import importlib
import threading
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megahybrid.errors import ConfigError, first_line
from megahybrid.model.kernels.cuda_limits import fused_refusal, within_int32_offsets
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.spec import AttentionSpec
from megahybrid.model.kernels.varlen import attend_varlen, without_varlen

LARGEST_HEAD_DIM = 128
OLDEST_CUDNN = 91500
ALIGNMENT = 16  # bytes; every step between heads, rows and tokens is a multiple, or reads are wrong

# What a graph calls its tensors.
Q, K, V, OUT, STATS, GRAD_OUTPUT, DQ, DK, DV = range(1, 10)


class Layout(NamedTuple):
    """[batch, heads, seq, head_dim], the order in which cuDNN names them, and steps in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Case(NamedTuple):
    """The case that one plan is for. `grad_output` is there for a backward."""

    device: torch.device
    dtype: torch.dtype
    window: int | None
    scale: float
    deterministic: bool
    q: Layout
    k: Layout
    v: Layout
    grad_output: Layout | None = None


class Plan(NamedTuple):
    """A compiled graph, and the bytes it needs beside its tensors."""

    graph: Any
    workspace: int


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why this kernel cannot run there, or None if it can."""
    why_not = fused_refusal(device, dtype, head_dim, LARGEST_HEAD_DIM)
    if why_not:
        return why_not
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs a Hopper device or newer"
    if package() is None:
        return "needs the package nvidia-cudnn-frontend"
    version = package().backend_version()
    if version < OLDEST_CUDNN:
        return f"needs cuDNN {OLDEST_CUDNN} or newer (cuDNN={version})"
    if version != torch.backends.cudnn.version():
        return f"found cuDNN {version} beside torch's {torch.backends.cudnn.version()}"
    return None


def attend_cudnn_frontend(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention over rows that are one document each, wherever their tokens lie.

    Batches with documents go to varlen, since a graph would be needed for each length; so do rows
    of a single token, which have no backward here.
    """
    if spec.documents is not None or q.shape[0] == 1:
        return attend_varlen(q, k, v, spec)
    return _Attention.apply(q, k, v, spec.window, spec.scale)


KERNEL = Kernel(
    "cudnn_frontend",
    attend_cudnn_frontend,
    serves=frozenset({"window", "documents"}),
    unavailable=lambda spec, place: refusal(*place[:3]) or without_varlen(spec, place),
    measured=Measured.FUSED,
)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output, and the logarithm of each query's sum, fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Any:
        seq, batch, heads, _ = q.shape
        stats = torch.empty(batch, heads, seq, 1, dtype=torch.float32, device=q.device)
        buffers = {Q: readable(q), K: readable(k), V: readable(v), STATS: stats}
        out = buffers[OUT] = empty(q, buffers[Q])
        _execute(_case(buffers, window, scale), buffers)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        q, k, v, out, stats = ctx.saved_tensors
        buffers = {Q: readable(q), K: readable(k), V: readable(v), OUT: out, STATS: stats}
        buffers[GRAD_OUTPUT] = readable(grad_output)
        for uid, x in ((DQ, q), (DK, k), (DV, v)):
            buffers[uid] = empty(x, buffers[Q])
        _execute(_case(buffers, ctx.window, ctx.scale), buffers)
        return buffers[DQ], buffers[DK], buffers[DV], None, None


def readable(x: Tensor) -> Tensor:
    """x [seq, batch, heads, head_dim], or a copy where cuDNN would read it wrongly: unaligned, or
    not `within_int32_offsets`."""
    steps = [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    aligned = all(step > 0 and step * x.element_size() % ALIGNMENT == 0 for step in steps[:-1])
    aligned &= x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
    return within_int32_offsets(x) if aligned else x.clone(memory_format=torch.contiguous_format)


def layout(x: Tensor) -> Layout:
    """Return x's layout [seq, batch, heads, head_dim]; an axis of one steps as far as the next in
    memory, whatever torch says of it."""
    (seq, batch, heads, head_dim), (by_seq, by_batch, by_head, _) = x.shape, x.stride()
    by_head = by_head if heads > 1 else head_dim
    by_batch = by_batch if batch > 1 else by_seq
    return Layout((batch, heads, seq, head_dim), (by_batch, by_head, by_seq, 1))


def empty(like: Tensor, order: Tensor) -> Tensor:
    """Room for a result of like's shape, its rows one behind the other if those of `order` are: a
    layer whose heads lie so wants its results so."""
    (seq, batch, *rest), (by_seq, by_batch, *_) = like.shape, order.stride()
    if batch > 1 and by_batch > by_seq:
        return like.new_empty((batch, seq, *rest)).transpose(0, 1)
    return like.new_empty(like.shape)


def dense(like: Layout, order: Layout) -> Layout:
    """Return the layout that `empty` gives a tensor."""
    batch, heads, seq, head_dim = like.sizes
    row, (by_batch, _, by_seq, _) = heads * head_dim, order.strides
    if by_batch > by_seq:
        return Layout(like.sizes, (seq * row, head_dim, row, 1))
    return Layout(like.sizes, (row, head_dim, batch * row, 1))


def _case(buffers: dict[int, Tensor], window: int | None, scale: float) -> Case:
    q = buffers[Q]
    return Case(
        device=q.device,
        dtype=q.dtype,
        window=window,
        scale=scale,
        # Its backward then needs work space that grows with the square of the length.
        deterministic=torch.are_deterministic_algorithms_enabled(),
        q=layout(q),
        k=layout(buffers[K]),
        v=layout(buffers[V]),
        grad_output=layout(buffers[GRAD_OUTPUT]) if GRAD_OUTPUT in buffers else None,
    )


def build(case: Case, **where: Any) -> Plan:
    """The compiled graph of a case; `where` has the handle of a device, or the properties of one
    that is elsewhere. Raises ConfigError where cuDNN has no kernel."""
    cudnn = package()
    kind = cudnn.data_type
    half = kind.BFLOAT16 if case.dtype == torch.bfloat16 else kind.HALF
    graph = cudnn.pygraph(
        io_data_type=half,
        intermediate_data_type=kind.FLOAT,
        compute_data_type=kind.FLOAT,
        **where,
    )
    batch, heads, seq, _ = case.q.sizes
    stats = Layout((batch, heads, seq, 1), (heads * seq, seq, 1, 1))

    def given(uid: int, at: Layout, dtype: Any = half) -> Any:
        return graph.tensor(dim=list(at.sizes), stride=list(at.strides), data_type=dtype, uid=uid)

    rule = {
        "attn_scale": case.scale,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0,
    }
    if case.window is not None:
        # Keeps key j where j + bound > i (sliding_window_mask in its attn_score_modifiers.h): the
        # bound counts the query's own key, as ours does.
        rule["diagonal_band_left_bound"] = case.window
    q, k, v = given(Q, case.q), given(K, case.k), given(V, case.v)
    if case.grad_output is None:
        out, sums = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **rule)
        results = [(OUT, out, dense(case.q, case.q), half), (STATS, sums, stats, kind.FLOAT)]
    else:
        grads = graph.sdpa_backward(
            q=q,
            k=k,
            v=v,
            o=given(OUT, dense(case.q, case.q)),
            dO=given(GRAD_OUTPUT, case.grad_output),
            stats=given(STATS, stats, kind.FLOAT),
            use_deterministic_algorithm=case.deterministic,
            **rule,
        )
        of = zip((DQ, DK, DV), grads, (case.q, case.k, case.v), strict=True)
        results = [(uid, grad, dense(like, case.q), half) for uid, grad, like in of]
    for uid, result, at, dtype in results:
        result.set_output(True).set_uid(uid).set_data_type(dtype)
        result.set_dim(list(at.sizes)).set_stride(list(at.strides))
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as error:
        raise ConfigError(
            f"kernels=cudnn_frontend has no plan for {case.q.sizes} [batch, heads, seq, head_dim] "
            f"({first_line(error)[:120]}). Use varlen or auto."
        ) from error
    return Plan(graph, graph.get_workspace_size())


def _execute(case: Case, buffers: dict[int, Tensor]) -> None:
    """Queues a plan on torch's current stream."""
    with torch.cuda.device(case.device):
        handle, plan = _own.handle(case.device), _own.plan(case)
        workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=case.device)
        package().set_stream(handle, torch.cuda.current_stream(case.device).cuda_stream)
        pointers = {uid: x.data_ptr() for uid, x in buffers.items()}
        plan.graph.execute(pointers, workspace.data_ptr(), handle)


class _OfThread(threading.local):
    """The cuDNN handles and plans of one thread."""

    def __init__(self) -> None:
        self.handle = cache(lambda device: package().create_handle())
        self.plan = cache(lambda case: build(case, handle=self.handle(case.device)))


_own = _OfThread()


@cache
def package() -> Any:
    """nvidia-cudnn-frontend; None where it, or the cuDNN that torch brings, cannot be had."""
    try:
        found = importlib.import_module("cudnn")
        found.backend_version()
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    return found if hasattr(found, "pygraph") else None
