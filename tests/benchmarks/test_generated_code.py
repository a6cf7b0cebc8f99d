"""What torch.compile makes of a layer for an H200, where it can be made without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.no_device import why_not

LACKING = why_not()


@pytest.mark.skipif(LACKING is not None, reason=LACKING or "")
def test_a_layer_moves_no_more_than_its_share_of_the_floor(tmp_path: Path) -> None:
    name = "parallel, 4 x 8k"
    command = [sys.executable, "-m", "benchmarks.generated_code", "--only", name]
    command += ["--out", str(tmp_path / "code.json")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=600)
    enter, leave, leave_backward, enter_backward = json.loads((tmp_path / "code.json").read_text())[
        "parts"
    ][name]
    assert [len(program["kernels"]) for program in (leave, leave_backward)] == [1, 0]
    layer = [*enter["kernels"], *leave["kernels"], *enter_backward["kernels"]]
    # What stands between products, by docs/performance.md, of one layer of the 1B shape.
    assert sum(kernel["bytes"] for kernel in layer) < 3 * (20 * 2048 + 4 * 20 * 128 + 6 * 8192)
    assert not any(kernel["spilled"] for kernel in layer)
    # The gradients of q, k, v, gate and up, each by the kernel that makes it.
    parts = [k for k in enter_backward["kernels"] if "cat" in k["name"] or "silu" in k["name"]]
    assert len(parts) == 4
    assert sum(kernel["instructions"] for kernel in parts) < 600_000
