"""The comparison of two trees sees a bit that differs, in a step's line or in a tensor."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import same_bits
from benchmarks.same_bits import CASES, alike, differences, relative, run_file, tensors
from megahybrid.config import RunConfig, check_run
from megahybrid.config.parsing import parse
from megahybrid.config.yaml_file import apply_overrides

KEPT = Path(__file__).parents[1] / "version_0_1/files/run"


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_run_of_three_stages(name: str) -> None:
    plain = apply_overrides(run_file(CASES[name]), CASES[name].overrides)
    run = parse(RunConfig, plain)
    check_run(run, CASES[name].processes)
    assert len(run.stages) == 3 and sum(stage.tokens for stage in run.stages) == 14 * 1024


def test_a_run_is_the_same_as_itself_and_a_bit_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(KEPT, tmp_path / "run")
    assert list(differences(KEPT, tmp_path / "run", True, "")) == []
    whole = tensors(KEPT)
    assert {state for _, state in whole} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(np.isfinite(value).all() for value in whole.values())
    key = ("embedding.weight", "exp_avg")
    changed = {k: v.copy() for k, v in whole.items()}
    changed[key].view(np.int32)[3, 5] ^= 1
    monkeypatch.setattr(same_bits, "tensors", lambda run: whole if run == KEPT else changed)
    assert [fault[:32] for fault in differences(KEPT, tmp_path / "run", True, "")] == [
        "embedding.weight exp_avg off by "
    ]
    assert list(differences(KEPT, tmp_path / "run", False, "")) == []


def test_a_step_s_line_that_differs_is_named(tmp_path: Path) -> None:
    shutil.copytree(KEPT, tmp_path / "run")
    ledger = tmp_path / "run/ledger.jsonl"
    lines = [json.loads(text) for text in ledger.read_text().splitlines()]
    step = next(line for line in lines if line["kind"] == "step" and line["step"] == 3)
    step["gradient_norm"] = np.nextafter(step["gradient_norm"], 9.0)
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (fault,) = differences(KEPT, tmp_path / "run", True, "resumed: ")
    assert fault.startswith("resumed: step 3: gradient_norm ")
    assert list(differences(KEPT, tmp_path / "run", False, "")) == []


def test_values_are_alike_to_the_bit_or_within_the_bound() -> None:
    assert alike(1.0, 1.0 + 1e-7, exact=False) and not alike(1.0, 1.0 + 1e-7, exact=True)
    assert not alike({"a": 1.0}, {"b": 1.0}, exact=False)
    assert not alike(1.0, 1.0 + 1e-5, exact=False)
    zero, negative = np.zeros(3, np.float32), -np.zeros(3, np.float32)
    assert relative(zero, zero) == 0.0 and relative(negative, zero) > 0
    assert relative(np.zeros(2, np.float32), zero) == float("inf")
