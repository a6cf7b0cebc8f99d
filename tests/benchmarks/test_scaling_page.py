"""What docs/scaling.md says of memory and of failures is what the commands it names say."""

import re

import pytest

from benchmarks import failure_arithmetic
from megahybrid.config import check_run
from megahybrid.config.context_volume import tensor_bytes
from megahybrid.config.describe import describe
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


# (what, run, stage, tensor, context, length, ranks, batch in tokens)
LONG = [
    ("8B at 64k", EIGHT, 1, 4, 1, 2**16, 512, 2**23),
    ("8B at 64k", EIGHT, 1, 8, 1, 2**16, 512, 2**22),
    ("8B at 64k", EIGHT, 1, 4, 2, 2**16, 512, 2**22),
    ("8B at 64k", EIGHT, 1, 1, 8, 2**16, 512, 2**22),
    ("8B at 128k", EIGHT, 1, 8, 1, 2**17, 512, 2**23),
    ("8B at 128k", EIGHT, 1, 16, 1, 2**17, 512, 2**22),
    ("8B at 128k", EIGHT, 1, 2, 8, 2**17, 512, 2**22),
    ("8B at 1M", EIGHT, 1, 32, 1, 2**20, 512, 2**24),
    ("8B at 1M", EIGHT, 1, 4, 32, 2**20, 512, 2**22),
    ("111B at 256k", COMMAND, 3, 8, 1, 2**18, 1024, 2**25),
    ("111B at 256k", COMMAND, 3, 8, 8, 2**18, 1024, 2**22),
]


def long_row(
    label: str,
    name: str,
    stage: int,
    tensor: int,
    context: int,
    length: int,
    ranks: int,
    batch: int,
) -> str:
    """A row of the page's table of long rows, from `describe` alone: one row of tokens for each
    data rank and step."""
    file = ROOT / f"configs/runs/{name}.yaml"
    packed = (name for name, source in load(file).data.sources.items() if source.plans)
    run = load(
        file,
        [
            f"parallel.tensor={tensor}",
            f"parallel.context={context}",
            *(f"data.sources.{name}.plans={{{length}: rows}}" for name in packed),
            f"stages.{stage}.lengths={{{length}: 1}}",
            f"stages.{stage}.micro_batch_tokens={length}",
            f"stages.{stage}.batch_tokens={batch}",
            "data.block_tokens=1048576",
        ],
    )
    check_run(run.model_copy(update={"stages": [run.stages[stage]]}), ranks)
    told = describe(run, ranks)
    memory = told["stages"][stage]["memory_per_rank"][run.parallel.zero_stage]
    parts = (f"{memory[n] / 2**30:.2f}" for n in ("activations", "working", "total"))
    if context == 1:
        layers = run.model.layer_plan.num_layers
        again = run.stages[stage].recompute == "full"
        crossing, tensor_moved = (
            0,
            layers * tensor_bytes(run.model, tensor, length, forward_again=again),
        )
    else:
        row = next(
            r
            for r in told["context"]
            if r["stage"] == run.stages[stage].name and r["length"] == length
        )
        assert row["rows_per_step"] == 1
        crossing = sum(s["bytes_per_step"] for s in row["schemes"])
        tensor_moved = row["tensor_bytes_per_step"]
    cells = (
        label,
        f"{ranks:,}",
        f"{tensor} × {context} × {told['data_degree']}",
        str(run.parallel.zero_stage),
        f"{batch:,}",
        *parts,
        f"{tensor_moved / 1e9:,.1f}",
        f"{crossing / 1e9:,.1f}",
    )
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("case", LONG, ids=lambda c: f"{c[0]}-{c[3]}x{c[4]}")
def test_rows_that_one_rank_cannot_hold(
    case: tuple[str, str, int, int, int, int, int, int],
) -> None:
    row = long_row(*case)
    assert row in PAGE, row


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
