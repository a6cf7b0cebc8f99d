"""cuDNN's graphs as they are asked for, and how a plan is run: against a package that takes every
call. Nothing of cuDNN's is needed."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megahybrid.errors import ConfigError
from megahybrid.model.kernels import AttentionSpec, attend
from megahybrid.model.kernels import cudnn_frontend as kernel
from megahybrid.model.kernels.cudnn_frontend import Case, Layout
from tests.model.test_cudnn_frontend import HOPPER, drawn


class Made:
    """A result of an operation, and what it was told to be."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def tell(value: Any) -> Made:
            self.told[name.removeprefix("set_")] = value
            return self

        return tell


class Recorder:
    """A package that takes every call and keeps what the two attention operations were told, and
    what they made."""

    data_type = SimpleNamespace(BFLOAT16="BFLOAT16", HALF="HALF", FLOAT="FLOAT")
    diagonal_alignment = SimpleNamespace(TOP_LEFT="TOP_LEFT", BOTTOM_RIGHT="BOTTOM_RIGHT")
    made: tuple[Made, ...]

    def __init__(self, version: int = 91900) -> None:
        self.version, self.told = version, {}

    def backend_version(self) -> int:
        return self.version

    def get_workspace_size(self) -> int:
        return 256

    def sdpa(self, **told: Any) -> tuple[Any, ...]:
        self.told, self.made = told, (Made(), Made())
        return self.made

    def tensor(self, **told: Any) -> dict[str, Any]:
        return told

    def sdpa_backward(self, **told: Any) -> tuple[Any, ...]:
        self.told, self.made = told, (Made(), Made(), Made())
        return self.made

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


def case(window: int | None, backward: bool) -> Case:
    """A case of one row of 128 tokens."""
    q, k = (Layout((1, heads, 128, 64), (64 * heads, 64, 64 * heads, 1)) for heads in (4, 2))
    return Case(HOPPER, torch.bfloat16, window, 0.125, False, q, k, k, q if backward else None)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("window", [None, 1, 32])
def test_a_graph_is_told_the_window_as_it_is(
    window: int | None, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Recorder()
    monkeypatch.setattr(kernel, "package", lambda: package)
    assert kernel.build(case(window, backward)).workspace == 256
    assert package.told["attn_scale"] == 0.125
    assert package.told["diagonal_alignment"] == "TOP_LEFT"
    assert package.told["diagonal_band_right_bound"] == 0
    assert package.told.get("diagonal_band_left_bound") == window


@pytest.mark.parametrize("rows_first", [False, True], ids=["tokens_first", "rows_first"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_graphs_tensors_are_the_buffers_that_it_is_given(
    backward: bool, rows_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Recorder()
    monkeypatch.setattr(kernel, "package", lambda: package)
    rows, length, heads, kv_heads, head_dim = 3, 40, 4, 2, 16

    def of(count: int, *, of_sums: bool = False) -> dict[str, list[int]]:
        """As the kernel makes its buffers, in cuDNN's order of axes."""
        x = torch.empty(length, rows, count, head_dim).transpose(0, 1)
        x = (x.contiguous() if rows_first else x).transpose(1, 2)
        x = torch.empty(rows, count, length, 1) if of_sums else x
        return {"dim": list(x.shape), "stride": list(x.stride())}

    queries, keys, sums = of(heads), of(kv_heads), of(heads, of_sums=True)
    q, k = (Layout(tuple(x["dim"]), tuple(x["stride"])) for x in (queries, keys))
    here = Case(HOPPER, torch.bfloat16, None, 1.0, False, q, k, k, q if backward else None)
    kernel.build(here)
    given = {"q": (kernel.Q, queries), "k": (kernel.K, keys), "v": (kernel.V, keys)}
    made = [(kernel.OUT, queries), (kernel.STATS, sums)]
    if backward:
        given |= {"o": (kernel.OUT, queries), "dO": (kernel.GRAD_OUTPUT, queries)}
        given |= {"stats": (kernel.STATS, sums)}
        made = [(kernel.DQ, queries), (kernel.DK, keys), (kernel.DV, keys)]
    else:
        assert package.told["generate_stats"] is True
    kinds = {kernel.STATS: "FLOAT"}
    for name, (uid, where) in given.items():
        expected = {"uid": uid, "data_type": kinds.get(uid, "BFLOAT16"), **where}
        assert package.told[name] == expected, name
    for result, (uid, where) in zip(package.made, made, strict=True):
        expected = {"uid": uid, "data_type": kinds.get(uid, "BFLOAT16"), "output": True, **where}
        assert result.told == expected


@pytest.mark.parametrize("asked", [False, True])
def test_a_backward_repeats_its_bits_where_the_case_says_so(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Recorder()
    monkeypatch.setattr(kernel, "package", lambda: package)
    kernel.build(case(None, backward=True)._replace(deterministic=asked))
    assert package.told["use_deterministic_algorithm"] is asked


@pytest.mark.parametrize("dtype,name", [(torch.bfloat16, "BFLOAT16"), (torch.float16, "HALF")])
def test_a_graph_reads_numbers_of_the_runs_precision(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    package = Recorder()
    package.pygraph = lambda **how: told.update(how) or package
    monkeypatch.setattr(kernel, "package", lambda: package)
    kernel.build(case(None, backward=True)._replace(dtype=dtype))
    assert told["io_data_type"] == name
    assert told["intermediate_data_type"] == told["compute_data_type"] == "FLOAT"


def test_a_plan_runs_on_torchs_stream_and_is_built_once_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Package(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.handles, self.graphs, self.streams, self.runs = 0, 0, [], []

        def create_handle(self) -> str:
            self.handles += 1
            return f"handle {self.handles}"

        def pygraph(self, **how: Any) -> Any:
            self.graphs += 1
            assert how["handle"] == f"handle {self.handles}"
            return self

        def set_stream(self, handle: str, stream: int) -> None:
            self.streams.append((handle, stream))

        def execute(self, pointers: dict[int, int], workspace: int, handle: str) -> None:
            assert workspace % 16 == 0 and set(pointers) == {1, 2, 3, 4, 5}
            self.runs.append(handle)

    package = Package()
    monkeypatch.setattr(kernel, "package", lambda: package)
    monkeypatch.setattr(kernel, "_own", kernel._OfThread())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77)
    )
    here = case(32, backward=False)._replace(device=torch.device("cpu"))
    buffers = {uid: torch.zeros(4) for uid in range(1, 6)}
    kernel._execute(here, buffers)
    kernel._execute(here, buffers)
    assert (package.handles, package.graphs) == (1, 1)
    other = threading.Thread(target=kernel._execute, args=(here, buffers))
    other.start()
    other.join()
    assert (package.handles, package.graphs) == (2, 2)
    assert package.runs == ["handle 1", "handle 1", "handle 2"]
    assert package.streams == [(handle, 77) for handle in package.runs]


def test_a_graph_that_cudnn_has_no_kernel_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsupported(Exception):
        pass

    def validate() -> None:
        raise Unsupported("no engine proposed a plan\nfor many reasons")

    package = Recorder()
    package.validate, package.cudnnGraphNotSupportedError = validate, Unsupported
    monkeypatch.setattr(kernel, "package", lambda: package)
    with pytest.raises(ConfigError) as refused:
        kernel.build(case(None, backward=False))
    assert str(refused.value) == (
        "kernels=cudnn_frontend has no plan for (1, 4, 128, 64) [batch, heads, seq, head_dim] "
        "(no engine proposed a plan). Use varlen or auto."
    )


def test_a_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return kernel.refusal(HOPPER, dtype, head_dim)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(kernel, "package", lambda: None)
    assert refusal() == "needs the package nvidia-cudnn-frontend"
    monkeypatch.setattr(kernel, "package", lambda: Recorder(90100))
    assert refusal() == "needs cuDNN 91500 or newer (cuDNN=90100)"
    monkeypatch.setattr(kernel, "package", Recorder)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    assert refusal() == "found cuDNN 91900 beside torch's 92000"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert refusal() is None
    assert "head_dim" in str(refusal(head_dim=256)) and "bf16" in str(refusal(dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert refusal() == "needs a Hopper device or newer"
    q, k, v, _ = drawn(8, 1, 2, 1)
    with pytest.raises(ConfigError, match="kernels=cudnn_frontend needs a CUDA device"):
        attend(q, k, v, AttentionSpec(window=3, scale=1.0), "cudnn_frontend")
