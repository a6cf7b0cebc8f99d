"""What docs/scaling.md says of memory and of failures is what the commands it names say."""

import re

import pytest

from benchmarks import failure_arithmetic
from megahybrid.config.loader import load
from megahybrid.config.memory_estimate import Memory, memory_per_rank
from tests.benchmarks.test_published import ROOT, read

PAGE = (ROOT / "docs/scaling.md").read_text()
EIGHT, COMMAND = "paper_rnope_swa_8b", "command_a"


def memory_of(name: str, stage: int, data: int, zero_stage: int, tensor: int = 0) -> Memory:
    run = load(ROOT / f"configs/runs/{name}.yaml")
    return memory_per_rank(
        run.model,
        run.stages[stage],
        tensor=tensor or run.parallel.tensor,
        data_degree=data,
        zero_stage=zero_stage,
        precision=run.precision,
    )


@pytest.mark.parametrize(
    "label,name,stage,data,zero_stage",
    [
        ("8B at 8k | 8 | 4 × 2", EIGHT, 0, 2, 1),
        ("8B at 8k | 64 | 4 × 16", EIGHT, 0, 16, 1),
        ("8B at 8k | 512 | 4 × 128", EIGHT, 0, 128, 1),
        ("8B at 64k | 64 | 4 × 16", EIGHT, 1, 16, 1),
        ("111B at 8k | 1,024 | 8 × 128", COMMAND, 0, 128, 1),
        ("111B at 8k | 1,024 | 8 × 128", COMMAND, 0, 128, 2),
        ("111B at 8k | 1,024 | 8 × 128", COMMAND, 0, 128, 3),
    ],
)
def test_memory_of_the_worked_examples(
    label: str, name: str, stage: int, data: int, zero_stage: int
) -> None:
    found = memory_of(name, stage, data, zero_stage)
    parts = (
        found.weights,
        found.gradients,
        found.optimizer,
        found.activations,
        found.working,
    )
    told = " | ".join(f"{part / 2**30:.2f}" for part in parts)
    row = f"| {label} | {zero_stage} | {told} | {found.total / 2**30:.1f} GiB |"
    assert row in PAGE, row


def test_memory_without_tensor_ranks() -> None:
    needed = memory_of(EIGHT, 0, 8, 1, tensor=1).total / 2**30
    assert f"tensor 1 would need {needed:.1f} GiB" in PAGE


def test_what_failures_cost(capsys: pytest.CaptureFixture[str]) -> None:
    failure_arithmetic.main([])
    for line in capsys.readouterr().out.splitlines():
        assert f"    {line}\n" in PAGE, line


def test_what_a_save_was_measured_to_take() -> None:
    found = read("checkpoint_io_cpu")
    seconds = found["seconds"]
    waits = seconds["asynchronous: training waits"]
    told = (
        f"{found['mebibytes']:.0f} MiB published in {seconds['asynchronous: published']:.2f} s "
        f"and checked in {seconds['asynchronous: checked']:.2f} s, for {waits:.3f} s of which "
        "training waits"
    )
    assert told in re.sub(r"\s+", " ", PAGE), told
