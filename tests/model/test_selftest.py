"""The self-test passes what is right; `test_selftest_faults` has what must not pass."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    YarnScaling,
)
from megahybrid.config.score_scale import FixedScale, Llama4Scale, LogScale, SsmaxScale
from megahybrid.model import selftest
from megahybrid.model.kernels.blocked import block_and_reach
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.selftest import HeadShape, run_self_test
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.train.stage_model import StageModel, head_shape
from tests.model.test_compiled import TRACED, fresh_compiler
from tests.parity.cases import BLOCKS, FAMILIES, model
from tests.train.test_synchronisation import run_config

CPU = torch.device("cpu")
NOPE = Nope(kind="nope")


def rope(theta: float = 10000.0, **fields: Any) -> Rope:
    """A Rope value."""
    return Rope(kind="rope", theta=theta, **fields)


SCHEMES = {
    "rope-window": AttentionScheme(position=rope(), window=64),
    "rope-window-prime": AttentionScheme(position=rope(theta=500.0), window=211),
    "rope-window-1": AttentionScheme(position=rope(), window=1),
    "nope-window-2": AttentionScheme(position=NOPE, window=2),
    "rope-chunk": AttentionScheme(position=rope(), chunk=50),
    "nope-chunk-log": AttentionScheme(
        position=NOPE, chunk=33, score_scale=LogScale(kind="log", base=3)
    ),
    "nope": AttentionScheme(position=NOPE),
    "rope-partial": AttentionScheme(position=rope(rotary_fraction=0.5)),
    "rope-head-spectrum": AttentionScheme(position=rope(rotary_fraction=0.5, spectrum="head")),
    "rope-linear": AttentionScheme(position=rope(scaling=LinearScaling(kind="linear", factor=16))),
    "rope-ntk": AttentionScheme(position=rope(scaling=NtkScaling(kind="ntk", factor=4))),
    "rope-llama3": AttentionScheme(
        position=rope(scaling=Llama3Scaling(kind="llama3", factor=8, original_length=64))
    ),
    "rope-yarn": AttentionScheme(
        position=rope(scaling=YarnScaling(kind="yarn", factor=8, original_length=64)), window=100
    ),
    "nope-llama4": AttentionScheme(position=NOPE, score_scale=Llama4Scale(kind="llama4")),
    "nope-log": AttentionScheme(
        position=NOPE, window=33, score_scale=LogScale(kind="log", base=1024)
    ),
    "nope-ssmax": AttentionScheme(position=NOPE, score_scale=SsmaxScale(kind="ssmax")),
    "rope-fixed": AttentionScheme(position=rope(), score_scale=FixedScale(kind="fixed", scale=0.1)),
}
# At the ends of what a run file can say: honest rounding is no violation there either.
SCHEMES |= {
    "far-log-of-a-small-base": AttentionScheme(
        position=NOPE, score_scale=LogScale(kind="log", base=1.1)
    ),
    "far-log": AttentionScheme(position=NOPE, score_scale=LogScale(kind="log", base=3)),
    "far-llama4": AttentionScheme(
        position=rope(), score_scale=Llama4Scale(kind="llama4", floor=2, coefficient=5)
    ),
    "far-ssmax": AttentionScheme(
        position=rope(), score_scale=SsmaxScale(kind="ssmax", initial=3), window=300
    ),
    "far-fixed-large": AttentionScheme(
        position=rope(), score_scale=FixedScale(kind="fixed", scale=10)
    ),
    "far-fixed-small": AttentionScheme(
        position=rope(), score_scale=FixedScale(kind="fixed", scale=1e-3)
    ),
    "far-window": AttentionScheme(
        position=rope(),
        window=1,
        qk_norm=QKNorm(kind="rms"),
        score_scale=LogScale(kind="log", base=50),
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
for family, layers in FAMILIES.items():
    SCHEMES |= {
        f"{family}-{index}": AttentionScheme.model_validate(layer)
        for index, layer in enumerate(layers)
    }


def with_as_many_factors(scheme: AttentionScheme, head_dim: int) -> AttentionScheme:
    """The scheme with a number for each pair of such a head where its rotation has any."""
    scaling = getattr(scheme.position, "scaling", None)
    if not isinstance(scaling, LongRopeScaling):
        return scheme
    factors = tuple(1 + 0.7 * pair for pair in range(head_dim // 2))
    position = {"scaling": scaling.model_copy(update={"factors": factors})}
    return scheme.model_copy(update={"position": scheme.position.model_copy(update=position)})


def check(
    *names: str,
    dtype: str = "fp32",
    heads: tuple[int, int, int] = (4, 2, 32),
    kernel: str = "auto",
    **more: Any,
) -> list[tuple[str, str, float]]:
    """The self-test of some schemes as those of one plan; `heads`: of queries, of keys, their
    dimensions."""
    schemes = {name: with_as_many_factors(SCHEMES[name], heads[-1]) for name in names}
    shape = HeadShape(*heads, DTYPES[dtype], CPU)
    return run_self_test(schemes, shape, dict.fromkeys(schemes, kernel), rank=3, **more)


# Of all heads that a rank may have; each scheme meets three of them.
HEADS = [
    (1, 1, 64),
    (2, 1, 8),
    (3, 3, 16),
    (4, 2, 32),
    (5, 1, 24),
    (6, 3, 8),
    (7, 7, 8),
    (8, 2, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_passes(name: str, dtype: str) -> None:
    turn = list(SCHEMES).index(name) + list(DTYPES).index(dtype)
    check(name, dtype=dtype, heads=HEADS[turn % 8])


@pytest.mark.parametrize("window", [1, 2, 3, 63, 64, 65, 100, 127, 129, 200, 257, 513, 700])
@pytest.mark.parametrize("kernel", ["blocked", "reference"])
def test_windows_that_no_block_divides_pass(window: int, kernel: str) -> None:
    scheme = AttentionScheme(position=rope(), window=window)
    shape = HeadShape(*((2, 1, 16) if window % 2 else (3, 3, 8)), torch.float32, CPU)
    run_self_test({"local": scheme}, shape, {"local": kernel}, rank=0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_passes_compiled(whole: bool, dtype: str) -> None:
    """By a compiler that generates no code: what is traced and cut is the same."""
    plan = ("rope-window", "nope-ssmax", "rope-yarn", "rms-shared-0", "nope-log", "projection-1")
    with fresh_compiler():
        check(*plan, dtype=dtype, compiler=TRACED, whole=whole)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_run_passes_at_every_tensor_degree(tensor: int, precision: str, block: str) -> None:
    """With the heads that a rank of each degree has, also more ranks than KV heads."""
    config = model("rnope_swa", block)
    run = run_config(config, precision, 1)
    axis = Axis("tensor", tensor, 0, None, tuple(range(tensor)))
    mesh = replace(ParallelMesh.single(CPU), tensor=axis)
    stage_model = StageModel(
        run, mesh, ChosenKernels(device="cpu", full="sdpa", windowed="blocked"), lambda *_: None
    )
    stage_model._adopt(config.layer_plan)
    assert head_shape(run, mesh).heads == 4 // tensor
    assert len(stage_model._tested) == 2 and stage_model.self_test_seconds > 0


def test_the_report_says_which_kernel_each_scheme_had() -> None:
    schemes = {name: SCHEMES[name] for name in ("rope-window", "nope")}
    kernels = {"rope-window": "reference", "nope": "auto"}
    shape = HeadShape(2, 1, 16, torch.float32, CPU)
    report = run_self_test(schemes, shape, kernels, rank=0)
    assert [line[:2] for line in report] == [("rope-window", "reference"), ("nope", "sdpa")]
    again = run_self_test(schemes, shape, kernels, rank=0, passed=["nope"])
    assert [line[0] for line in again] == ["rope-window"]
    assert run_self_test(schemes, shape, kernels, rank=0, passed=list(schemes)) == []


def test_it_draws_nothing_from_the_run() -> None:
    before = torch.get_rng_state()
    check("rope-window")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probes_rows_have_borders_in_every_block() -> None:
    for window in (None, 1, 24, 64, 211, 1000, 4096):
        rows = selftest.own_rows(window, "auto")
        block = 128 if window is None else block_and_reach(window)[0]
        beyond = 512 if window is None else window
        assert rows.length >= (2 * 512 if window is None else window + 5 * block)
        assert len({sum(row) for row in rows.documents}) == 1
        assert any(length > beyond for row in rows.documents for length in row)
        assert all(1 in row and min(row) > 0 for row in rows.documents)
        assert rows.documents[0] != rows.documents[1]
        borders = rows.borders(0) + rows.borders(1)
        for begin in range(rows.length - 4 * block, rows.length, block):
            assert any(begin <= border < begin + block for border in borders)


def test_a_window_and_heads_of_a_real_run_take_seconds() -> None:
    schemes = {
        "local": AttentionScheme(position=rope(theta=50000.0), window=4096),
        "global": AttentionScheme(position=NOPE),
    }
    shape = HeadShape(32, 8, 128, torch.float32, CPU)
    began = time.process_time()
    run_self_test(schemes, shape, dict.fromkeys(schemes, "auto"), rank=0)
    assert time.process_time() - began < 20  # 5 s of one core


def test_the_demos_schemes_take_less_than_three_seconds_of_a_core() -> None:
    schemes = {"local": SCHEMES["rope-window"], "global": SCHEMES["nope"]}
    shape = HeadShape(2, 1, 32, torch.float32, CPU)  # of one of its two tensor ranks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()
    run_self_test(schemes, shape, dict.fromkeys(schemes, "auto"), rank=0)
    seconds = time.process_time() - began
    torch.set_num_threads(threads)
    assert seconds < 3  # 0.3 s
