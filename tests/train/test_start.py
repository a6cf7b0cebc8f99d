"""What DeepSpeed does at its start and we keep from it: each rank would pay for it, every time."""

import importlib
import sys
from typing import Any

import pytest
import torch

from megahybrid.train.engine import settings


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.compile is given from here on; DeepSpeed's Muon is imported anew and put back."""
    monkeypatch.setitem(sys.modules, settings.MUON, None)  # restored whatever happens
    del sys.modules[settings.MUON]
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: given.append(function) or function)
    return given


def test_muon_is_imported_without_compiling(compiled: list[Any]) -> None:
    settings.patch_muon()
    assert settings.MUON in sys.modules and not compiled
    # What DeepSpeed compiles elsewhere is its own affair.
    from deepspeed.runtime import compiler

    assert compiler.compile() is torch.compile


def test_deepspeed_itself_compiles_muon_as_it_imports_it(compiled: list[Any]) -> None:
    """When this fails, the patch has become needless: take it out."""
    importlib.import_module(settings.MUON)
    assert compiled


def test_no_compiler_is_run_to_see_which_operators_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = importlib.import_module("deepspeed.comm.torch")
    operators = importlib.import_module("deepspeed.ops")
    monkeypatch.setitem(vars(operators), "__compatible_ops__", {})  # restored whatever happens
    probed: list[bool] = []
    monkeypatch.setattr(operators, "_probe_compatible_ops", lambda: probed.append(True) or {})
    del operators.__compatible_ops__
    assert collectives.build_shm_op() is None
    assert probed == [True], "this DeepSpeed asks another way"
    del operators.__compatible_ops__
    settings.prepare_deepspeed(torch.device("cpu"))
    assert collectives.build_shm_op() is None
    assert probed == [True]
