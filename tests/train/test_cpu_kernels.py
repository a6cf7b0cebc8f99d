"""Measured choices on a CPU: when one is made, that the first stays, and what runs do with it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.config.training import KernelConfig
from megahybrid.model.kernels.choice import resolve_kernels
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.parallel import matmul
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train import cpu_kernels, kernel_selection
from tests.parity.cases import model
from tests.train.test_synchronisation import run_config

CPU = torch.device("cpu")
CHOSEN = ChosenKernels(device="cpu", full="sdpa", windowed="blocked")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Answers of this machine's user are neither read nor written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "megahybrid" / "cpu_kernels"
    matmul.use(matmul.usual_routine())


def long_run(**changes: Any) -> Any:
    run = run_config(model("rnope_swa"), "fp32", 1)
    stage = run.stages[0].model_copy(update={"tokens": 10**16})
    return run.model_copy(update={"stages": [stage], **changes})


def answers(*, torch_seconds: float, onednn_seconds: float) -> Callable[..., dict[str, Any]]:
    return lambda *_: {"torch": torch_seconds, "onednn": onednn_seconds}


def choose(run: Any, chosen: ChosenKernels | None = None) -> tuple[ChosenKernels, dict[str, Any]]:
    told: dict[str, Any] = {}
    chosen = chosen or replace(CHOSEN, products=matmul.usual_routine())
    mesh = ParallelMesh.single()
    found = kernel_selection.choose_kernels(
        run, 0, mesh, chosen, lambda event: told.update(event.detail())
    )
    return found, told


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"plain": 1.0, "compiled": "InvalidCxxCompiler: No working C++ compiler found"}
    monkeypatch.setattr(kernel_selection, "measure_blocks", lambda *_: found)


def test_a_short_stage_and_a_deterministic_run_measure_nothing() -> None:
    mesh = ParallelMesh.single()
    assert cpu_kernels.to_measure(run_config(model("rnope_swa"), "fp32", 1), 0, mesh) == []
    assert cpu_kernels.to_measure(long_run(), 0, mesh) == ["products", "blocks"]
    assert cpu_kernels.to_measure(long_run(deterministic=True), 0, mesh) == []
    named = KernelConfig(products="torch", blocks="plain")
    assert cpu_kernels.to_measure(long_run(kernels=named), 0, mesh) == []
    assert cpu_kernels.to_measure(long_run(precision="bf16"), 0, mesh) == ["blocks"]


def test_a_stage_is_weighed_by_one_rank_s_flops() -> None:
    run, mesh = long_run(), ParallelMesh.single()
    tokens = run.stages[0].tokens
    one = cpu_kernels.stage_flops(run, 0, mesh) / tokens
    just = run.stages[0].model_copy(update={"tokens": int(cpu_kernels.PRODUCTS_PAY / one) + 1})
    assert cpu_kernels.to_measure(run.model_copy(update={"stages": [just]}), 0, mesh) == [
        "products"
    ]


def test_the_first_answer_stays(
    monkeypatch: pytest.MonkeyPatch, no_compiler: None, own_cache: Path
) -> None:
    other = "onednn" if matmul.usual_routine() == "torch" else "torch"
    times = {f"{other}_seconds": 0.1, f"{matmul.usual_routine()}_seconds": 0.2}
    monkeypatch.setattr(cpu_kernels, "measure_products", answers(**times))
    first, told = choose(long_run())
    assert first.products == other and first.blocks == "plain" and first.length
    assert "onednn 1" in told["products"] or "onednn 2" in told["products"]
    assert "No working C++ compiler" in told["blocks"]
    # Measured again it would be the other way round.
    swapped = dict(zip(times, reversed(times.values()), strict=True))
    monkeypatch.setattr(cpu_kernels, "measure_products", answers(**swapped))
    again, told = choose(long_run())
    assert again == first and "measured before on this machine" in told["products"]
    assert len(list(own_cache.iterdir())) == 2
    # Another torch is another machine.
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert choose(long_run())[0].products == matmul.usual_routine()


def test_of_two_that_measure_at_once_the_first_to_write_is_right(own_cache: Path) -> None:
    def ask() -> cpu_kernels.Found:
        # Meanwhile a run beside this one has had its answer.
        cpu_kernels.decided("products", {}, "torch", lambda: {"torch": 2.0, "onednn": 1.0})
        return {"torch": 1.0, "onednn": 2.0}

    assert cpu_kernels.decided("products", {}, "torch", ask)["choice"] == "onednn"
    assert len(list(own_cache.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choice": "rm", "because": ""}', "null"])
def test_a_file_that_is_no_answer_is_written_anew(text: str, own_cache: Path) -> None:
    ask = lambda: {"torch": 2.0, "onednn": 1.0}  # noqa: E731
    cpu_kernels.decided("products", {}, "torch", ask)
    (path,) = own_cache.iterdir()
    path.write_text(text)
    assert cpu_kernels.decided("products", {}, "torch", ask)["choice"] == "onednn"
    assert json.loads(path.read_text())["choice"] == "onednn"


def test_without_a_place_to_keep_answers_the_rule_decides(own_cache: Path) -> None:
    own_cache.parent.parent.mkdir()
    own_cache.parent.write_text("a file in the folder's place")
    ask = lambda: pytest.fail("it was measured")  # noqa: E731
    answer = cpu_kernels.decided("products", {}, "torch", ask)
    assert answer["choice"] == "torch" and "no answer can be kept" in str(answer["because"])


def test_a_choice_other_than_the_usual_must_be_clearly_faster() -> None:
    fastest = cpu_kernels.clearly_fastest
    assert fastest({"torch": 1.04, "onednn": 1.0}, "torch") == "torch"
    assert fastest({"torch": 1.06, "onednn": 1.0}, "torch") == "onednn"
    assert fastest({"torch": "failed", "onednn": 1.0}, "torch") == "onednn"
    assert fastest({"plain": "failed", "compiled": "failed"}, "plain") == "plain"


def test_a_checkpoint_s_routine_is_taken_again_and_the_run_file_goes_before() -> None:
    saved = replace(CHOSEN, products="onednn", length=700)
    kept = resolve_kernels(KernelConfig(), CPU, torch.float32, 64, saved)
    assert kept == saved
    named = resolve_kernels(KernelConfig(products="torch"), CPU, torch.float32, 64, saved)
    assert named.products == "torch"
    older = resolve_kernels(KernelConfig(), CPU, torch.float32, 64, CHOSEN)
    assert older.products == matmul.usual_routine()
    pinned = replace(saved, length=max(long_run().stages[0].lengths))
    assert choose(long_run(), pinned) == (pinned, {})


@pytest.mark.skipif(not matmul.ONEDNN_SERVES, reason="a torch without oneDNN")
def test_products_are_measured_in_a_second_and_the_routine_left_as_it_was() -> None:
    matmul.use("torch")
    shapes = cpu_kernels.product_shapes(long_run())
    began = cpu_kernels.now()
    found = cpu_kernels.measure_products(shapes, rows=512)
    assert cpu_kernels.now() - began < 5
    assert set(found) == {"torch", "onednn"}
    assert all(isinstance(seconds, float) and seconds > 0 for seconds in found.values())
    assert matmul.in_use() == "torch"


@pytest.mark.skipif(not matmul.ONEDNN_SERVES, reason="a torch without oneDNN")
def test_a_routine_with_other_products_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = matmul._onednn
    monkeypatch.setattr(matmul, "_onednn", lambda x, weight: right(x, weight) * 1.1)
    found = cpu_kernels.measure_products([(256, 256)], rows=256)
    assert "another product than torch's own" in str(found["onednn"])
    assert cpu_kernels.clearly_fastest(found, "onednn") == "torch"


def test_the_rule_asks_for_avx512_on_a_processor_that_is_not_intel_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capability, intel, routine in (
        ("AVX512", False, "onednn"),
        ("AVX512", True, "torch"),
        ("AVX2", False, "torch"),
    ):
        monkeypatch.setattr(matmul, "ONEDNN_SERVES", True)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(matmul, "_is_intel", lambda i=intel: i)
        matmul.usual_routine.cache_clear()
        assert matmul.usual_routine() == routine
    monkeypatch.undo()
    matmul.usual_routine.cache_clear()


def test_a_user_without_a_home_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    answer = cpu_kernels.decided("blocks", {}, "plain", lambda: {"plain": 2.0, "compiled": 1.0})
    assert answer["choice"] == "plain"
    assert os.environ.get("XDG_CACHE_HOME") is None
