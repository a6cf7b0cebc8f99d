"""cuDNN's attention without a device: what reaches its graphs, and, where the package and torch's
cuDNN are installed, that cuDNN compiles them for an H200."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megahybrid.model.kernels import AttentionSpec, attend
from megahybrid.model.kernels import cudnn_frontend as kernel
from megahybrid.model.kernels.cudnn_frontend import Case, Layout
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.reference import attend_reference
from tests.parallel.compare import EXACT

HEAD_DIM = 16
HOPPER = torch.device("cuda:0")


def stand_in(case: Case, buffers: dict[int, Tensor]) -> None:
    """What the plan of a case does to its buffers, by the reference."""
    for uid, wanted in ((kernel.Q, case.q), (kernel.K, case.k), (kernel.V, case.v)):
        assert kernel.layout(buffers[uid]) == wanted
    q, k, v = (buffers[uid].clone().requires_grad_() for uid in (kernel.Q, kernel.K, kernel.V))
    with torch.enable_grad():
        out = attend_reference(q, k, v, AttentionSpec(window=case.window, scale=case.scale))
    results = {kernel.OUT: out.detach()}
    if case.grad_output is not None:
        grad_output = buffers[kernel.GRAD_OUTPUT]
        assert kernel.layout(grad_output) == case.grad_output
        assert torch.equal(buffers[kernel.OUT], out)
        grads = torch.autograd.grad(out, (q, k, v), grad_output)
        results = dict(zip((kernel.DQ, kernel.DK, kernel.DV), grads, strict=True))
    for uid, result in results.items():
        assert kernel.layout(buffers[uid]) == kernel.dense(kernel.layout(result), case.q)
        buffers[uid].copy_(result)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that were asked for, in order; the reference stands in for cuDNN."""
    cases: list[Case] = []

    def execute(case: Case, buffers: dict[int, Tensor]) -> None:
        stand_in(case, buffers)
        cases.append(case)

    monkeypatch.setattr(kernel, "refusal", lambda *where: None)
    monkeypatch.setattr(kernel, "_execute", execute)
    return cases


def drawn(
    seq: int, batch: int, heads: int, kv_heads: int, rows_first: bool = False
) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output; v is a slice of wider rows. With `rows_first` they lie
    as a compiled layer leaves them."""
    generator = torch.Generator().manual_seed(seq)
    counts = (heads, kv_heads, 3 * kv_heads, heads)
    q, k, wide, grad_output = (
        torch.randn(batch, seq, n, HEAD_DIM, generator=generator, dtype=torch.float64)
        for n in counts
    )
    if rows_first:
        q, k, wide, grad_output = (x.transpose(0, 1) for x in (q, k, wide, grad_output))
    else:
        q, k, wide, grad_output = (
            x.transpose(0, 1).contiguous() for x in (q, k, wide, grad_output)
        )
    return q.requires_grad_(), k.requires_grad_(), wide[:, :, kv_heads:-kv_heads], grad_output


@pytest.mark.parametrize("window", [None, 1, 7, 70])
@pytest.mark.parametrize(
    "shape",
    [(50, 1, 4, 2), (33, 3, 6, 1), (2, 2, 2, 2), (33, 3, 6, 1, True), (50, 1, 4, 2, True)],
    ids=str,
)
def test_values_and_gradients_reach_their_places(
    shape: tuple[int, ...], window: int | None, executed: list[Case]
) -> None:
    q, k, v, grad_output = drawn(*shape)
    v.requires_grad_()
    spec = AttentionSpec(window=window, scale=0.3)
    found, right = (
        (out := attend(q, k, v, spec, name), *torch.autograd.grad(out, (q, k, v), grad_output))
        for name in ("cudnn_frontend", "reference")
    )
    for ours, expected in zip(found, right, strict=True):
        assert ours.shape == expected.shape
        assert ours.transpose(0, 1).is_contiguous() == (shape[1] == 1 or len(shape) == 5)
        assert (ours - expected).norm() <= EXACT * expected.norm().clamp(min=1)
    forward, backward = executed
    inside = window is not None and window < shape[0]
    assert forward.window == backward.window == (window if inside else None)
    assert forward.grad_output is None and backward.grad_output is not None
    row = 3 * shape[3] * HEAD_DIM
    assert forward.v.strides[2] == (row if len(shape) == 5 else row * shape[1])  # where it lies


def test_a_gradient_of_a_sum_is_written_out_first(executed: list[Case]) -> None:
    q, k, v, _ = drawn(20, 1, 2, 1)
    attend(q, k, v, AttentionSpec(window=5, scale=1.0), "cudnn_frontend").sum().backward()
    assert executed[1].grad_output == kernel.dense(executed[1].q, executed[1].q)
    assert q.grad is not None and k.grad is not None


def test_what_cudnn_would_read_wrongly_is_copied() -> None:
    base = torch.zeros(64, 2, 4, 16, dtype=torch.bfloat16)
    for x in (base, base[:, :, 1:3], base[:, :1], base[::2]):
        assert kernel.readable(x) is x
    odd_rows = torch.zeros(64, 2, 4 * 16 + 4, dtype=torch.bfloat16)[..., :64].unflatten(-1, (4, 16))
    shifted = torch.zeros(base.numel() + 4, dtype=torch.bfloat16)[4:].view(base.shape)
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided(
        (131_072, 1, 4, 128), (19_456, 19_456, 128, 1)
    )
    for x in (odd_rows, shifted, base.transpose(2, 3), base[:1].expand(64, 2, 4, 16), far):
        copy = kernel.readable(x)
        assert copy is not x and copy.is_contiguous() and copy.shape == x.shape


def test_an_axis_of_one_steps_as_far_as_the_next_in_memory() -> None:
    x = torch.zeros(50 * 64)
    for strides in ((64, 64, 16, 1), (64, 3, 7, 1), (64, 3200, 64, 1)):
        one = x.as_strided((50, 1, 1, 16), strides)
        assert kernel.layout(one) == Layout((1, 1, 50, 16), (64, 16, 64, 1))


def test_documents_and_single_tokens_go_to_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttentionSpec] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        seen.append(spec)
        return q

    monkeypatch.setattr(kernel, "attend_varlen", varlen)
    documents = Documents.from_lengths([[4, 6]])
    for seq, where in ((10, documents), (1, None)):
        q, k, v, _ = drawn(seq, 1, 2, 1)
        spec = AttentionSpec(window=3, documents=where, scale=0.5)
        kernel.attend_cudnn_frontend(q, k, v, spec)
    assert [spec.documents for spec in seen] == [documents, None]
    assert all(spec.window == 3 and spec.scale == 0.5 for spec in seen)


@pytest.mark.parametrize("asked", [False, True])
def test_a_case_says_whether_torch_is_asked_to_repeat_its_bits(
    asked: bool, executed: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: asked)
    q, k, v, _ = drawn(20, 1, 2, 1)
    attend(q, k, v, AttentionSpec(window=5, scale=1.0), "cudnn_frontend").sum().backward()
    assert executed[1].deterministic is asked


# An H200, as cuDNN writes a device's properties down.
H200 = {
    "deviceName": "NVIDIA H200",
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "totalGlobalMem": 150_110_011_392,
    "multiProcessorCount": 132,
    "warpSize": 32,
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232_448,
    "reservedSharedMemoryPerBlock": 1024,
    "l2CacheSize": 62_914_560,
    "smClockRateKHz": 1_980_000,
    "memClockRateKHz": 3_201_000,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
}
# Of the driver, what cuDNN looks for before it compiles. It loads what it compiled, and here
# nothing is loaded; the rest answers that there is no device.
LOADING = "LibraryLoadData LibraryGetKernel"
ABSENT = """CtxGetCurrent CtxGetLimit CtxPopCurrent CtxPushCurrent DeviceGet DeviceGetCount
GetErrorName GetErrorString GetProcAddress_v2 Init KernelGetAttribute KernelSetAttribute
LaunchCooperativeKernel LaunchKernel LaunchKernelEx LibraryLoadFromFile LibraryUnload LinkAddData
LinkComplete LinkCreate LinkDestroy OccupancyMaxPotentialClusterSize StreamGetCtx
ThreadExchangeStreamCaptureMode"""
COMPILING = """
import json, sys, torch
from megahybrid.model.kernels.cudnn_frontend import Case, Layout, build, dense, package
where = {"device_property": package().create_device_properties(sys.argv[1]), "sm_version": 90}
for length, rows, heads, kv_heads, head_dim, window, half in json.loads(sys.argv[2]):
    def layout(count, row=None):
        row = row or count * head_dim
        sizes = (rows, count, length, head_dim)
        rows_first = half == "bfloat16"
        return Layout(sizes, (length * row if rows_first else row, head_dim,
                              row if rows_first else rows * row, 1))
    q, k, v = layout(heads), layout(kv_heads), layout(kv_heads, 19456)
    dtype = getattr(torch, half)
    for grad_output in (None, q):
        case = Case(torch.device("cuda:0"), dtype, window, 0.09, False, q, k, v, grad_output)
        print(build(case, **where).workspace, flush=True)
"""
# Length, rows, heads, KV heads, head_dim, window, dtype: the 1B shape, and the self-test's.
SHAPES = [
    (8192, 4, 16, 4, 128, None, "bfloat16"),
    (131_072, 1, 16, 4, 128, 4096, "bfloat16"),
    (262_144, 1, 16, 4, 128, None, "bfloat16"),
    (4168, 1, 2, 1, 128, 4096, "bfloat16"),
    (137, 2, 4, 2, 64, 24, "float16"),
    (2, 1, 4, 2, 8, 1, "bfloat16"),
]


def test_cudnn_compiles_the_graphs_for_a_device_that_is_elsewhere(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("judged on CUDA in test_kernels.py")
    if kernel.package() is None:
        pytest.skip("needs nvidia-cudnn-frontend, and a torch that brings cuDNN")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, for the driver that is missing")
    source = ["int cuDriverGetVersion(int *version) { *version = 13000; return 0; }"]
    source += [f"int cu{n}(void **made) {{ *made = made; return 0; }}" for n in LOADING.split()]
    source += [f"int cu{name}(void) {{ return 100; }}" for name in ABSENT.split()]
    (tmp_path / "driver.c").write_text("\n".join(source) + "\n")
    made = [compiler, "-w", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(made, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", COMPILING, json.dumps(H200), json.dumps(SHAPES)],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    other = kernel.package().backend_version() // 100 != 919
    if other and "RUNTIME_PREREQUISITE_MISSING" in done.stderr:
        pytest.skip("this cuDNN looks for more of a driver than 9.19 does")
    assert done.returncode == 0, done.stderr[-3000:]
    workspaces = [int(line) for line in done.stdout.split()]
    for (length, rows, heads, _, head_dim, *_), forward, backward in zip(
        SHAPES, workspaces[::2], workspaces[1::2], strict=True
    ):
        # fp32 gradients of queries, and those of keys and values for each query head, as the
        # memory model counts them; in whole blocks of 128 tokens, and some words a token.
        tokens = rows * heads * -(-length // 128) * 128
        assert forward < 2**16 and backward <= tokens * (8 * head_dim + 64)
