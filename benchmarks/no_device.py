"""A CUDA device that answers and computes nothing: what torch.compile would run on an H200 can then
be read on any machine with torch's CUDA build, triton (which brings ptxas) and a C compiler.

Tensors have no storage. The driver's few calls that torch makes on the way are answered by a small
library in its place; what torch asks of the device it is told; and where a program would be
loaded, its code is kept instead. Nothing here serves any other purpose.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# One device, whose context is there; named as the driver's own, it is the driver to whoever asks.
DRIVER = """
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaGetLastError(void) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{ *flags = 0; *active = 1; return 0; }
"""
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=141 * 10**9,
    multi_processor_count=132,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    is_integrated=0,
)
MARK = "MEGAHYBRID_WITHOUT_A_DEVICE"


def why_not() -> str | None:
    """What this environment lacks, or None."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"needs a CUDA build of torch (torch={torch.__version__})"
    if find_spec("triton") is None:
        return "needs triton"
    return None if shutil.which("cc") else "needs a C compiler (cc)"


def restart_without_device() -> Path:
    """Starts this very process again, with the library above, from its `main`; there it gives the
    folder that holds all that is made, for the caller to remove."""
    if MARK in os.environ:
        return Path(os.environ[MARK])
    folder = Path(tempfile.mkdtemp(prefix="megahybrid-"))
    library = folder / "libcuda.so.1"
    source = folder / "driver.c"
    source.write_text(DRIVER)
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(build, check=True)
    environment = os.environ | {
        MARK: str(folder),
        "LD_PRELOAD": str(library),
        # Nothing of a real device's programs may be taken for these, nor left to them.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "programs"),
        "TRITON_CACHE_DIR": str(folder / "kernels"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def pretend() -> None:
    """Has torch, its compiler and triton see an H200 and start nothing on it."""
    import torch
    import triton
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    changed: Any = torch.cuda
    changed._lazy_init = lambda: None
    changed.get_device_properties = lambda device=None: H200
    changed._get_device_properties = lambda device=0: H200
    changed.get_device_capability = lambda device=None: (H200.major, H200.minor)
    changed.get_rng_state = lambda device=None: torch.get_rng_state()
    changed.set_rng_state = lambda state, device=None: None
    changed = fake_tensor
    changed.init_gpu_context = lambda device: None
    # Patterns of attention and of padding are learned on real tensors; no region has either.
    for module, learn in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init")):
        setattr(module, learn, lambda *given, **named: None)
    _fold_constants_on_the_host(joint_graph.UniformValueConstantFolder)
    config.compile_threads = 1
    config.force_disable_caches = True
    config.use_static_cuda_launcher = False  # it keeps no code

    class Driver(driver.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            answers = {"max_shared_mem": H200.shared_memory_per_block_optin, "warpSize": 32}
            self.utils = SimpleNamespace(get_device_properties=lambda device: answers)
            self.get_current_device = lambda: 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)

    triton.runtime.driver.set_active(Driver())
    changed = triton_helpers
    changed.set_driver_to_gpu = lambda: None


def _fold_constants_on_the_host(folder: Any) -> None:
    """A constant's value is found by making it, which on the device cannot be."""
    import torch

    plain = folder._deduce_value

    def deduced(self: Any, node: Any) -> Any:
        named = node.kwargs
        if named.get("device") is not None:
            node.kwargs = {**named, "device": torch.device("cpu")}
        try:
            return plain(self, node)
        finally:
            node.kwargs = named

    folder._deduce_value = deduced


class _Kept(Exception):
    """A program's code is there; nothing is loaded."""


@contextmanager
def programs_kept() -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """A backend for torch.compile, inductor up to its code, and what it made: each program's
    `kind`, its `code` and the `bytes` that each of its kernels reads and writes, in their order.
    What it compiled computes shapes alone."""
    import copy

    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: list[dict[str, Any]] = []
    load = GraphLowering.compile_to_module

    def keep(graph: Any) -> Any:
        made[-1]["code"] = graph.codegen()[0].value
        own = (node for node in graph.scheduler.nodes if not node.is_extern())
        made[-1]["bytes"] = [
            node.get_read_write_buffers_sizes()
            for node in own
            if "Nop" not in type(node).__name__  # a buffer that others write into
        ]
        raise _Kept

    def inner(module: Any, inputs: Any, **options: Any) -> Any:
        shapes = copy.deepcopy(module)
        made.append({"kind": "backward" if options.get("is_backward") else "forward"})
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception as error:
            if not isinstance(getattr(error, "inner_exception", error), _Kept):
                raise

        def call(arguments: list[Any]) -> Any:
            given = list(arguments)
            arguments.clear()
            return shapes.forward(*given)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(module, inputs, inner_compile=inner)

    changed: Any = GraphLowering
    changed.compile_to_module = keep
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield backend, made
    finally:
        changed.compile_to_module = load
