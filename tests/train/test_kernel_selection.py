"""Kernels are measured among those that pass their self-test, told, kept, pinned and overruled."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.training import KernelConfig
from megahybrid.model.block import BLOCKS
from megahybrid.model.core_attention import prepare_queries_keys
from megahybrid.model.kernels import choice, choose, cudnn, cudnn_frontend, flash, varlen
from megahybrid.model.kernels.choice import Workload, candidates, fastest, measure, resolve_kernels
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.parallel.matmul import usual_routine
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train import kernel_selection
from tests.parity.cases import model
from tests.train.test_synchronisation import run_config

CPU = torch.device("cpu")
ON_CPU = ChosenKernels(device="cpu", full="sdpa", windowed="blocked")
WORK = Workload(1, 96, 4, 2, 16, torch.float32, CPU, documents=False)
SCHEME = AttentionScheme.model_validate(
    {"position": {"kind": "rope", "theta": 10000.0}, "window": 24}
)


def test_the_fastest_of_those_that_run_is_taken() -> None:
    seconds = iter((0.5, 0.2))
    found = measure(
        ["reference", "varlen", "blocked"], 24, WORK, lambda run, device: run() and next(seconds)
    )
    assert found["reference"] == 0.5 and found["blocked"] == 0.2
    assert "needs a CUDA device" in str(found["varlen"])
    assert fastest(found) == "blocked"
    assert fastest({"flex": "RuntimeError: no"}) is None


def test_a_kernel_that_fails_its_self_test_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megahybrid.model.kernels import AttentionSpec, attend

    def off_by_one(q: Any, k: Any, v: Any, spec: AttentionSpec, kernel: str) -> Any:
        if kernel == "reference" and spec.window is not None:
            spec = replace(spec, window=spec.window + 1)
        return attend(q, k, v, spec, kernel)

    monkeypatch.setattr("megahybrid.model.core_attention.attend", off_by_one)
    clock = {"seconds_of": lambda run, device: 1.0}
    found = kernel_selection.measure_tested(
        ["reference", "blocked"], {"local": SCHEME}, WORK, **clock
    )
    assert "does not see exactly window=24 keys" in str(found["reference"])
    assert fastest(found) == "blocked"


def test_a_kernel_with_other_gradients_than_the_first_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megahybrid.model.kernels import AttentionSpec, attend

    def wrong_backward(q: Any, k: Any, v: Any, spec: AttentionSpec, kernel: str) -> Any:
        out = attend(q, k, v, spec, kernel)
        if kernel != "blocked":
            return out
        assert spec.window is not None
        other = attend(q, k, v, replace(spec, window=spec.window + 1), kernel)
        return other + (out - other).detach()

    monkeypatch.setattr(choice, "core_attention", wrong_backward)
    found = measure(["reference", "blocked"], 24, WORK, lambda run, device: 1.0)
    assert found["reference"] == 1.0
    assert str(found["blocked"]).startswith("ArithmeticError: another dq than the first kernel's")


def test_what_is_no_number_agrees_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megahybrid.model.kernels import attend

    def broken(*args: Any) -> Any:
        out = attend(*args)
        return out * float("nan") if args[-1] == "blocked" else out

    monkeypatch.setattr(choice, "core_attention", broken)
    found = measure(["reference", "blocked"], 24, WORK, lambda run, device: 1.0)
    assert found["reference"] == 1.0
    assert str(found["blocked"]).startswith("ArithmeticError: another output than the first")


def test_rows_of_several_documents_are_measured_too() -> None:
    several = Workload(1, 3 * choice.DOCUMENT_TOKENS, 1, 1, 8, torch.float32, CPU, documents=True)
    assert [d is None for d in choice._situations(several)] == [True, False]
    assert measure(["blocked"], 24, several, lambda run, device: 1.5) == {"blocked": 3.0}
    assert choice._situations(WORK) == [None]


def test_a_cpu_has_one_kernel_and_measures_nothing() -> None:
    assert candidates("full", CPU, torch.float32, 64) == ["sdpa"]
    assert candidates("windowed", CPU, torch.float32, 64) == ["blocked"]
    run = run_config(model("rnope_swa"), "fp32", 1)
    chosen = resolve_kernels(KernelConfig(), CPU, torch.float32, 64)
    by_rule = {"blocks": "plain", "products": usual_routine()}
    assert chosen == replace(ON_CPU, **by_rule)
    assert chosen.to_json() == {"device": "cpu", "full": "sdpa", "windowed": "blocked"} | by_rule
    single = ParallelMesh.single()
    assert kernel_selection.choose_kernels(run, 0, single, chosen, _never) is chosen


def _never(*_: Any) -> None:
    raise AssertionError("nothing was to be told")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, Any]]]:
    """Chooses as on a device with two kernels for windows, of which `reference` is the faster."""

    def choose(chosen: dict[str, str], **wanted: str) -> Any:
        run = run_config(model("rnope_swa"), "fp32", 1)
        run = run.model_copy(update={"kernels": KernelConfig.model_validate(wanted)})
        mesh = ParallelMesh.single()
        monkeypatch.setattr(
            kernel_selection,
            "candidates",
            lambda kind, *_: ["sdpa"] if kind == "full" else ["blocked", "reference"],
        )
        times = {"blocked": 2.0, "reference": 1.0, "plain": 3.0, "compiled": 2.5}
        monkeypatch.setattr(
            kernel_selection,
            "measure",
            lambda names, *_, **__: {name: times[name] for name in names},
        )
        monkeypatch.setattr(
            kernel_selection,
            "measure_blocks",
            lambda *_: {n: times[n] for n in ("plain", "compiled")},
        )
        measured = kernel_selection._measured(run, 0, 700, mesh, ON_CPU)
        return measured

    return choose


def test_the_measured_choice_is_told_with_its_milliseconds(several: Any) -> None:
    measured = several({})
    assert measured["chosen"] == {"windowed": "reference", "blocks": "compiled"}
    assert measured["seconds"]["windowed"] == "blocked 2000.000 ms, reference 1000.000 ms"
    assert measured["seconds"]["blocks"] == "plain 3000.000 ms, compiled 2500.000 ms"


def test_what_the_run_file_names_is_not_measured(several: Any) -> None:
    measured = several({}, windowed="blocked", blocks="plain")
    assert measured == {"chosen": {}, "seconds": {}}


def test_a_resume_keeps_what_was_measured_at_its_length() -> None:
    saved = {
        "device": "cpu",
        "full": "sdpa",
        "windowed": "reference",
        "blocks": "compiled",
        "products": "torch",
        "length": "700",
    }
    kept = ChosenKernels.from_json(saved)
    assert kept is not None and kept.length == 700
    assert resolve_kernels(KernelConfig(), CPU, torch.float32, 64, kept).to_json() == saved
    named = KernelConfig(windowed="blocked", blocks="plain")
    over = resolve_kernels(named, CPU, torch.float32, 64, kept)
    assert (over.windowed, over.blocks) == ("blocked", "plain")
    on_gpu = replace(kept, device="cuda")
    elsewhere = resolve_kernels(KernelConfig(), CPU, torch.float32, 64, on_gpu)
    assert elsewhere.windowed == "blocked" and elsewhere.length is None


def test_kernels_are_read_as_they_were_kept() -> None:
    every = ChosenKernels(
        device="cpu", full="sdpa", windowed="blocked", blocks="compiled", products="torch",
        length=700,
    )  # fmt: skip
    for chosen in (every, ON_CPU, replace(every, products=None)):
        assert ChosenKernels.from_json(chosen.to_json()) == chosen
    assert ChosenKernels.from_json(every.to_json() | {"of_later": "x"}) == every
    assert every.compiler == "inductor" and ON_CPU.compiler is None
    assert ChosenKernels.from_json(None) is None and ChosenKernels.from_json({}) is None
    with pytest.raises(FrozenInstanceError):
        every.full = "cudnn"  # type: ignore[misc]


def test_a_layer_is_timed_as_written_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_selection, "least_seconds", lambda run, device: run() and 1.0)
    run = run_config(model("rnope_swa", "parallel"), "fp32", 1)

    def refused(*_: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("megahybrid.model.block.Block.compile_regions", refused)
    work = kernel_selection.workload(run, 0, 96, ParallelMesh.single())
    found = kernel_selection.measure_blocks(run, run.plan_at(0), work, ON_CPU, ["none", "none"])
    assert found == {"plain": 1.0, "compiled": "RuntimeError: no compiler here"}


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_compiler_that_gives_other_gradients_is_not_chosen(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_selection, "least_seconds", lambda run, device: run() and 1.0)
    monkeypatch.setattr(
        "megahybrid.model.block.traced_whole",
        lambda function, backend: lambda gate, up: function(gate, up) * wrong,
    )
    run = run_config(model("nope", "pre_norm"), "fp32", 3)
    work = kernel_selection.workload(run, 0, 96, ParallelMesh.single())
    found = kernel_selection.measure_blocks(run, run.plan_at(0), work, ON_CPU, ["none"])
    assert found["plain"] == 1.0
    assert str(found["compiled"]).startswith("ArithmeticError: another gradient of")


def test_the_layer_that_is_timed_is_the_first_of_the_commonest_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[Any, ...]] = []

    def layer(index: int, config: Any, scheme: Any, mesh: Any, *how: str, norm: str) -> Any:
        made.append((scheme.window, *how))
        return BLOCKS["parallel"](index, config, scheme, mesh, *how, norm=norm)

    run = run_config(model("rnope_swa", "parallel"), "fp32", 1)
    monkeypatch.setattr(kernel_selection, "least_seconds", lambda run, device: run() and 1.0)
    monkeypatch.setattr(kernel_selection, "BLOCKS", {"parallel": layer})
    for module in ("block", "chunked_mlp"):
        plain = f"megahybrid.model.{module}.traced_whole"
        monkeypatch.setattr(plain, lambda function, backend: function)
    plan = run.plan_at(0)
    windows = [scheme.window for scheme in plan.expand()]
    first = next(n for n, window in enumerate(windows) if window != windows[0])
    policies = ["none"] * first + ["chunked"] * (first + 1)
    work = kernel_selection.workload(run, 0, 96, ParallelMesh.single())
    kernel_selection.measure_blocks(run, plan, work, ON_CPU, policies)
    kernel = "sdpa" if windows[first] is None else "blocked"
    assert made == [(windows[first], kernel, "chunked")]


@pytest.mark.parametrize(
    "block,tensor,zero_stage,recompute",
    [
        ("pre_norm", 2, 1, "selective"),
        ("parallel", 1, 3, "none"),
        ("post_norm", 4, 3, "none"),
        ("parallel", 2, 1, "chunked"),
    ],
)
def test_of_a_layer_that_is_not_compiled_whole_the_pieces_are_timed_as_a_rank_has_them(
    monkeypatch: pytest.MonkeyPatch, block: str, tensor: int, zero_stage: int, recompute: str
) -> None:
    run = run_config(model("rms-shared", block), "fp32", zero_stage)
    run = run.model_copy(
        update={
            "parallel": run.parallel.model_copy(update={"tensor": tensor}),
            "stages": (run.stages[0].model_copy(update={"recompute": recompute}),),
        }
    )
    widths: list[dict[str, int]] = []

    def piece(function: Any, backend: str) -> Any:
        assert backend == "inductor"

        def called(*args: Any) -> Any:
            heads = function is prepare_queries_keys
            widths[-1][function.__name__] = args[0].shape[-2 if heads else -1]
            return function(*args)

        return called

    def once(run: Callable[[], object], device: torch.device) -> float:
        widths.append({})
        run()
        return float(3 - len(widths))

    for module in ("block", "chunked_mlp"):
        monkeypatch.setattr(f"megahybrid.model.{module}.traced_whole", piece)
    monkeypatch.setattr(kernel_selection, "least_seconds", once)
    mesh = ParallelMesh.single()
    cut = replace(mesh, tensor=replace(mesh.tensor, size=tensor))
    found = kernel_selection._measured(run, 0, 96, cut, ON_CPU)
    assert found["chosen"]["blocks"] == "compiled"
    assert found["seconds"]["blocks"] == "plain 2000.000 ms, compiled 1000.000 ms"
    # 4 heads and 48 values between the MLP's matrices.
    products = ("silu_gated", "silu_gated_gradients") if recompute == "chunked" else ("swiglu",)
    local = dict.fromkeys(products, 48 // tensor) | {"prepare_queries_keys": 4 // tensor}
    assert widths == [{}, local]


@pytest.mark.parametrize("name", flash.MODULES)
def test_a_package_that_is_not_there_is_no_candidate(name: str) -> None:
    assert flash.refusal(name, CPU, torch.bfloat16, 128) == "needs a CUDA device (device=cpu)"
    if flash._function(name) is None:
        device = torch.device("cuda:0")
        if torch.cuda.is_available():
            assert name not in candidates("full", device, torch.bfloat16, 128)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A Hopper device whose packages serve, as far as a refusal asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cudnn, "refusal", lambda *where: None)
    monkeypatch.setattr(cudnn_frontend, "refusal", lambda device, dtype, head_dim: _fused(dtype))
    monkeypatch.setattr(flash, "refusal", lambda *where: "needs a package")
    return torch.device("cuda:0")


def _fused(dtype: torch.dtype) -> str | None:
    return "computes in bf16 or fp16 only" if dtype == torch.float32 else None


def test_flex_is_measured_only_where_no_fused_kernel_serves(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = torch.bfloat16
    assert candidates("windowed", gpu, bf16, 128) == ["varlen", "cudnn_frontend"]
    assert choose(32, 128, None, gpu, bf16, 128) == "varlen"
    assert candidates("full", gpu, bf16, 128) == ["sdpa", "cudnn", "varlen", "cudnn_frontend"]
    monkeypatch.setattr(varlen, "refusal", lambda *where: "an older torch")
    assert candidates("windowed", gpu, bf16, 128) == ["cudnn_frontend"]
    monkeypatch.setattr(cudnn_frontend, "refusal", lambda *where: "no such package")
    assert candidates("windowed", gpu, bf16, 128) == ["flex"]


def test_windows_in_fp32_on_a_gpu_wait_for_no_compiler(gpu: torch.device) -> None:
    assert candidates("windowed", gpu, torch.float32, 64) == ["blocked"]
    assert candidates("full", gpu, torch.float32, 64) == ["sdpa", "cudnn"]
    assert choose(32, 128, None, gpu, torch.float32, 64) == "blocked"
    assert choose(None, 128, None, gpu, torch.float32, 64) == "sdpa"
