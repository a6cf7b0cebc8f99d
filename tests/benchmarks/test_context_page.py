"""What docs/context_parallel.md says of bytes is what the formulas say."""

import pytest

from benchmarks.context_group import model_of
from megahybrid.config.base import Frozen
from megahybrid.config.context_plan import plan_context
from megahybrid.config.context_volume import period_volume
from megahybrid.config.loader import load
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from tests.benchmarks.test_published import ROOT, read

PAGE = (ROOT / "docs/context_parallel.md").read_text()


class ModelFile(Frozen):
    """A file of configs/models."""

    model: ModelConfig


SHAPES = [
    ("1B", "rnope_swa_1b", 131_072, 1, 8),
    ("8B", "rnope_swa_8b", 131_072, 1, 8),
    ("8B", "rnope_swa_8b", 2**20, 1, 32),
    ("8B", "rnope_swa_8b", 262_144, 4, 16),
    ("111B", "command_a", 262_144, 8, 8),
]


def table_row(label: str, name: str, length: int, tensor: int, context: int) -> str:
    model = load(ROOT / f"configs/models/{name}.yaml", type=ModelFile).model
    parallel = ParallelConfig(tensor=tensor, context=context)
    found = period_volume(model, parallel, model.layer_plan, length)
    crossing = plan_context(model, parallel, model.layer_plan, length)
    used = " + ".join(dict.fromkeys(e for _, e in crossing.exchanges if e is not None))
    layout = ", zigzag" if crossing.layout == "zigzag" else ""
    others = (found.heads, found.keys, found.ring, found.tensor, found.tensor_alone)
    cells = ["not legal" if size is None else f"{size / 1e6:,.0f}" for size in others]
    ours = f"{found.ours / 1e6:,.0f} ({used}{layout})"
    return f"| {' | '.join([label, f'{length:,}', f'{tensor} × {context}', ours, *cells])} |"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[1]}-{shape[2]}")
def test_the_table_of_bytes(shape: tuple[str, str, int, int, int]) -> None:
    row = table_row(*shape)
    assert row in PAGE, row


def test_the_bytes_of_the_smallest_shape_by_hand() -> None:
    """16 heads, 4 KV heads of 128, windows of 4,096, rows of 131,072 over 8 ranks."""
    others = 131_072 * 7 // 8
    ours = 3 * (4 * 4095 * 4 * 256) + 2 * others * 256 * (2 * 2 + 2)
    keys = 4 * 6 * others * 4 * 256
    assert f"| {ours / 1e6:,.0f} (halo + heads) |" in PAGE
    assert f"| {keys / 1e6:,.0f} |" in PAGE


@pytest.mark.parametrize(
    "name", ["context_cpu_25m", "context_memory_25m", "context_memory_demo_long"]
)
def test_the_bytes_that_were_counted(name: str) -> None:
    found = read(name)
    for row in found["degrees"]:
        if row["degree"] == 1:
            continue
        ranks = row["steps"][-1] if "steps" in row else row["ranks"]
        shape = found["shape"]
        model = model_of(str(ROOT / shape) if shape.endswith(".yaml") else shape)
        parallel = ParallelConfig(context=row["degree"])
        crossing = plan_context(model, parallel, model.layer_plan, found["length"])
        used = " + ".join(dict.fromkeys(e for _, e in crossing.exchanges if e is not None))
        counted, foretold = (
            [rank[key] for rank in ranks] for key in ("received", "received_by_formula")
        )
        beyond = max(c / f - 1 for c, f in zip(counted, foretold, strict=True))
        assert 0 <= beyond < 0.01
        cells = [f"{found['length']:,}", str(row["degree"]), f"{used}, {crossing.layout}"]
        cells += [
            " · ".join(f"{size / 1e6:.2f}" for size in sizes) for sizes in (counted, foretold)
        ]
        line = f"| {' | '.join([*cells, f'{beyond:.2%}'.replace('%', ' %')])} |"
        assert line in PAGE, line
