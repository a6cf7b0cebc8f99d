"""Takes models through a step on a device that answers and computes nothing, a line for each case.

    python tests/fake_cuda/program.py [HOW A CASE BEGINS …]

By its path: the package `tests` would have annotations checked, which cannot be traced. A mistake
of device, dtype or shape, and every wait of the host for the device, is an error there; what
torch.compile makes is compiled for an H200, and its spills are told.
"""

import contextlib
import json
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from benchmarks.no_device import pretend, programs_kept, restart_without_device

LENGTH, ROWS, LAYERS = 8192, 2, 4
# A block, and what each of the four layers recomputes.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "parallel, none": ("parallel", ("none",) * LAYERS),
    "parallel, selective": ("parallel", ("selective",) * LAYERS),
    "parallel, chunked": ("parallel", ("chunked",) * LAYERS),
    "parallel, full": ("parallel", ("full",) * LAYERS),
    "parallel, offload": ("parallel", ("offload",) * LAYERS),
    "pre_norm, mixed": ("pre_norm", ("full", "chunked", "selective", "none")),
    "post_norm, selective": ("post_norm", ("selective",) * LAYERS),
}
LAST_QUERIES = "queries that are the last of their keys"
TENSOR_OF_THE_HOST, WAIT = "a tensor of the host", "a wait for the device"
MISTAKES = (TENSOR_OF_THE_HOST, WAIT)

Kept = tuple[Any, list[dict[str, Any]]]  # the compiler, and the programs that it made


def main() -> None:
    """Print {"case", "error", ...} as each case ends."""
    folder = restart_without_device()
    try:
        pretend()
        # One compiler for all: what two cases share is made once.
        with substitutes(), programs_kept() as kept:
            for name, run in cases():
                if sys.argv[1:] and not name.startswith(tuple(sys.argv[1:])):
                    continue
                told: dict[str, Any] = {"case": name, "error": None}
                try:
                    told |= run(kept)
                except Exception:
                    told["error"] = traceback.format_exc()[-3000:]
                print(json.dumps(told), flush=True)
    finally:
        shutil.rmtree(folder)


def cases() -> Iterator[tuple[str, Callable[[Kept], dict[str, Any]]]]:
    """Each block and policy plain and compiled, whole rows and packed; and planted mistakes."""
    for name, (block, policies) in CASES.items():
        yield f"{name}, plain", lambda kept, b=block, p=policies: step(b, p)
        yield f"{name}, compiled", lambda kept, b=block, p=policies: compiled_step(b, p, kept)
    yield LAST_QUERIES, lambda kept: last_queries()
    for mistake in MISTAKES:
        yield mistake, lambda kept, m=mistake: step("parallel", ("none",) * LAYERS, planted=m)


def last_queries() -> dict[str, Any]:
    """Attention of the last tokens of rows to all of their keys, forward and backward, by every
    kernel that `auto` could take; and the two apart."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from megahybrid.model.kernels import AttentionSpec, Documents, attend, halves

    device, before = torch.device("cuda", 0), 3 * LENGTH // 4
    lengths = [[3000, LENGTH - 3000], [LENGTH // 4, *[128] * 16, LENGTH // 2]]
    with unset_fake_temporarily():
        packed = Documents.from_lengths(lengths)
        packed.spans()
    packed = packed.to(device)
    cases = [
        ("sdpa", None, torch.bfloat16),
        ("sdpa", None, torch.float32),
        ("blocked", 512, torch.bfloat16),
        ("blocked", 4096, torch.float32),
        ("varlen", None, torch.bfloat16),
        ("varlen", 4096, torch.bfloat16),
    ]
    for (kernel, window, dtype), documents in ((c, d) for c in cases for d in (None, packed)):
        q, k, v = (
            torch.empty(tokens, ROWS, heads, 128, device=device, dtype=dtype, requires_grad=True)
            for tokens, heads in ((LENGTH - before, 8), (LENGTH, 2), (LENGTH, 2))
        )
        spec = AttentionSpec(scale=0.1, window=window, documents=documents, before=before)
        out = attend(q, k, v, spec, kernel)
        found = [out]
        # torch 2.11's description of the fp32 kernel's backward lacks an argument of it.
        if dtype == torch.bfloat16:
            found += torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        apart = halves(q, k, spec, kernel)
        assert (apart is None) == (kernel == "blocked" or dtype == torch.float32), kernel
        if apart is not None:
            out, kept = apart[0].forward(q, k, v, apart[1])
            grads = apart[0].backward(out, q, k, v, out, kept, apart[1])
            found += [out, *grads]
        for x, like in zip(found, (q, q, k, v, q, q, k, v), strict=False):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, device), kernel
    return {}


def compiled_step(block: str, policies: tuple[str, ...], kept: Kept) -> dict[str, Any]:
    """The same through torch.compile, and what is new in it compiled for an H200: how many kernels,
    and which of them spill."""
    backend, made = kept
    before = len(made)
    step(block, policies, backend)
    spilled: dict[str, int] = {}
    for program in made[before:]:
        spilled |= spills(program["code"])
    spilling = [name for name, size in spilled.items() if size]
    return {"programs": len(made) - before, "kernels": len(spilled), "spilling": spilling}


def step(
    block: str, policies: tuple[str, ...], backend: Any = None, planted: str = ""
) -> dict[str, Any]:
    """The 1B shape, four layers of it, in bf16: loss, backward and update, on rows of one document
    and on packed ones."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from benchmarks.shapes import hybrid
    from benchmarks.steps import MasterAdamW, our_loss
    from megahybrid.model import compiled
    from megahybrid.model.kernels import Documents
    from megahybrid.model.transformer import Transformer
    from megahybrid.parallel.mesh import ParallelMesh

    config = hybrid("1b")
    layers = config.layer_plan.model_copy(update={"num_layers": LAYERS})
    config = config.model_copy(update={"layer_plan": layers, "block": block})
    device = torch.device("cuda", 0)
    torch.set_default_dtype(torch.bfloat16)
    lengths = [[3000, LENGTH - 3000], [LENGTH // 4] * 4]
    with unset_fake_temporarily():  # on the host, where batches are made
        packed = Documents.from_lengths(lengths).starts
    model = Transformer(config, ParallelMesh.single(device), recompute=list(policies))
    if backend is not None:
        compiled.patch_inductor_cat()
        model.compile_blocks(backend)
    optimizer = MasterAdamW(model.parameters())
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH), device=device)
    if planted == TENSOR_OF_THE_HOST:
        model.final_norm.weight = torch.nn.Parameter(torch.empty(config.hidden_size, device="cpu"))
    for starts in (None, packed):
        loss = our_loss(model, tokens, tokens, starts)
        if planted == WAIT:
            float(loss)
        loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None and gradient.device == device, name
            assert (gradient.shape, gradient.dtype) == (parameter.shape, torch.bfloat16), name
    optimizer.step()
    assert all(weight.device == device for weight in optimizer.masters)
    return {}


@cache
def compiled_for_an_h200(name: str, source: str) -> int:
    """Bytes that a kernel spills, in the first of its configurations."""
    from torch._inductor.codecache import PyCodeCache

    from benchmarks.generated_code import tool

    tuner = getattr(PyCodeCache.load(source), name)
    kernel = tuner._precompile_config(tuner.configs[0]).kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(counts["STACK"]) + int(counts["LOCAL"])


def spills(code: str) -> dict[str, int]:
    """Bytes that each Triton kernel of a program spills."""
    sources = r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
    found = re.findall(sources, code, re.MULTILINE | re.DOTALL)
    return {name: compiled_for_an_h200(name, source) for name, source in found}


@contextlib.contextmanager
def substitutes() -> Iterator[None]:
    """What a driver alone can do: pinned memory, streams and events; and what it would say."""
    from unittest import mock

    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from megahybrid.model import activation_offload
    from megahybrid.model.kernels import documents, varlen

    found = documents.Documents.spans

    def on_the_host(self: documents.Documents) -> list[documents.Span]:
        with unset_fake_temporarily():
            return found(self)

    def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return empty(tensor.shape, dtype=tensor.dtype, device=device)

    empty = torch.empty

    def unpinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)

    def sdpa(
        q: Any, k: Any, v: Any, *, attn_mask: Any, is_causal: bool, scale: float, **_: Any
    ) -> Any:
        """The kernels that SDPA would take, of which it asks the driver; grouped heads are theirs
        where there is no mask."""
        ops = torch.ops.aten
        if attn_mask is None:
            return ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        assert q.shape[1] == k.shape[1] and attn_mask.device == q.device
        mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        return ops._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)[0]

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (documents.Documents, "spans", on_the_host),
            (documents, "to_device", to),
            (varlen, "to_device", to),
            (varlen, "_shares_heads", lambda device, dtype: True),
            (activation_offload, "_one_stream", lambda device: mock.MagicMock()),
            (torch.Tensor, "record_stream", lambda tensor, stream: None),
            (torch, "empty", unpinned),
            (torch.nn.functional, "scaled_dot_product_attention", sdpa),
            (torch.cuda, "current_stream", lambda device=None: mock.MagicMock()),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.cuda, "Event", mock.MagicMock),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


if __name__ == "__main__":
    main()
