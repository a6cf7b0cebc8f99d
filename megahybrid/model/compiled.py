"""torch.compile's own settings, set the same way everywhere."""

import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megahybrid.parallel import matmul

# Two programs for each kind of layer, and each of these again for every (rows, length) of a run:
# torch's own limit of 8 would refuse a stage that mixes a few lengths.
MOST_PROGRAMS = 256


def traced_whole(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Return `function` compiled at its first call, by input shapes. What cannot be traced whole is
    an error, never a slower program."""
    if backend == "inductor":
        patch_inductor_cat()
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def whole_serves() -> bool:
    """Return whether layers are compiled with their products: compiled, they are always torch's."""
    return matmul.in_use() == "torch"


def prepare_compiler() -> None:
    """Set what a compiler needs before its first program."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = MOST_PROGRAMS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_PROGRAMS
    for name, value in (
        # `PassThrough` is one: without this its programs would be traced again at every restart.
        ("autograd_cache_allow_custom_autograd_functions", True),
        # Values are a slice of the input product's output. Newer torch would have their gradient
        # lie like them, between gaps of the whole product's width.
        ("guess_tangent_strides_as_outputs", False),
    ):
        if hasattr(torch._functorch.config, name):
            setattr(torch._functorch.config, name, value)


@cache
def patch_inductor_cat() -> None:
    """Have what a product reads as one matrix written there part by part, by the kernels that make
    the parts. torch would have one kernel compute every part at every element: for the gradients of
    q, k, v, gate and up its instructions take four times as long as its bytes.

    It replaces inductor's lowering of `cat`, as torch 2.11 to 2.13 have it (the releases that
    pyproject.toml admits); where another torch differs, nothing is replaced.
    """
    try:
        from torch._inductor import ir, lowering
        from torch._inductor.virtualized import V

        plain = lowering.lowerings[torch.ops.aten.cat.default]
        joined = ir.ConcatKernel.create
    except (ImportError, AttributeError, KeyError):
        return  # another torch: the same numbers, more slowly

    def cat(parts: Any, dim: int = 0) -> Any:
        alike = len({part.get_dtype() for part in parts}) == 1
        if len(parts) > 1 and alike and _only_multiplied(V.current_node):
            try:
                return lowering.TensorBox(joined(parts, dim % len(parts[0].get_size())))
            except (AttributeError, TypeError):
                pass  # another torch
        return plain(parts, dim)

    lowering.lowerings[torch.ops.aten.cat.default] = cat


def _only_multiplied(node: Any) -> bool:
    """Return whether matrix products alone read this node of a graph, through views."""
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default, aten.permute.default)
    return bool(node.users) and all(
        user.target is aten.mm.default or (user.target in views and _only_multiplied(user))
        for user in node.users
    )


class PassThrough(torch.autograd.Function):
    """A region's input among its outputs: what comes back for it is then added inside of the
    region's backward, not by a kernel of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def rows_first(x: Tensor) -> Tensor:
    """[seq, batch, ...] as [batch, seq, ...], copied only where it does not lie so. Flattened in
    between: programs are kept by strides, those of an axis of 1 as well."""
    x = x.transpose(0, 1)
    return x.flatten(0, 1).unflatten(0, x.shape[:2])


def keep_programs(folder: Path, first: bool = True) -> None:
    """Compiled programs outlive the process in `folder`, unless the user has named a place: a
    restart takes them from there. Call it before anything is compiled.

    The `first` rank removes what a killed compiler left half written: torch takes whatever lies
    there, and no restart would get past it.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))
    if first and folder.is_dir():
        for library in folder.rglob("*.so"):
            if not _is_whole_library(library):
                library.unlink(missing_ok=True)


def _is_whole_library(path: Path) -> bool:
    """Return whether an ELF file has all that its header speaks of: section headers come last."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return True  # not ours to judge
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    (offset,) = struct.unpack_from("=Q", head, 40)
    entry_size, entries = struct.unpack_from("=HH", head, 58)
    return offset > 0 and size >= offset + entry_size * entries
