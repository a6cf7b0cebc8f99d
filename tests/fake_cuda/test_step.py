"""The whole model on a CUDA device that is not there: no tensor lies elsewhere, nothing waits for
the device, every gradient is there, and what torch.compile makes for an H200 does not spill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.no_device import why_not
from tests.fake_cuda.program import CASES, LAST_QUERIES, TENSOR_OF_THE_HOST, WAIT

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "program.py"
LACKING = why_not()
pytestmark = [
    pytest.mark.skipif(LACKING is not None, reason=f"{LACKING}; see .ci/cuda-torch"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What the program told of each case, in a process whose driver is a stub."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=os.environ | {"PYTHONPATH": path.strip(os.pathsep), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=850,
        cwd=ROOT,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_device_that_is_not_there(found: dict[str, Any], case: str) -> None:
    assert found[f"{case}, plain"]["error"] is None, found[f"{case}, plain"]["error"]


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_step_is_made_for_an_h200_without_spills(
    found: dict[str, Any], case: str
) -> None:
    told = found[f"{case}, compiled"]
    assert told["error"] is None, told["error"]
    assert told["spilling"] == []


def test_programs_were_made_for_every_block_the_loss_and_the_chunked_mlp(
    found: dict[str, Any],
) -> None:
    new = {case: found[f"{case}, compiled"] for case in CASES}
    # Entering, leaving and the loss, forward and backward; then what another policy or block adds.
    assert new["parallel, none"]["programs"] >= 6 and new["parallel, none"]["kernels"] >= 6
    for case in ("parallel, chunked", "pre_norm, mixed", "post_norm, selective"):
        assert new[case]["programs"] >= 2 and new[case]["kernels"] >= 1, case


def test_queries_that_are_the_last_of_their_keys(found: dict[str, Any]) -> None:
    assert found[LAST_QUERIES]["error"] is None, found[LAST_QUERIES]["error"]


def test_planted_mistakes_are_seen(found: dict[str, Any]) -> None:
    assert "device" in found[TENSOR_OF_THE_HOST]["error"]
    assert "DataDependentOutputException" in found[WAIT]["error"]
