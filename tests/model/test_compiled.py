"""Compiled blocks: traced whole, the same numbers, no more programs than kinds and shapes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.model.compiled import keep_programs
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import Axis, ParallelMesh
from tests import distributed
from tests.parity.cases import BLOCKS, FAMILIES, NORMS, model
from tests.parity.test_engine import BOUND, Case, engine_run, joined_weights, plain_run
from tests.plain_model import random_tensors, relative_error
from tests.plain_training import random_batch

ROOT = Path(__file__).parents[2]
# Front end and autograd as inductor has them, without its code: what breaks, breaks here.
TRACED = "aot_eager"
LENGTH = 48
POLICIES = ("none", "selective", "full")


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """No program of before, no count, and annotations unchecked: checks cannot be traced."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with fresh_compiler():
        yield


def found(name: str) -> dict[str, int]:
    """torch's own counters of one kind."""
    return dict(torch._dynamo.utils.counters[name])


def step(model: Transformer, batch: Any) -> dict[str, Tensor]:
    """The loss and every gradient of one forward and backward."""
    model.zero_grad()
    loss, _ = model(batch.tokens, batch.targets, batch.starts)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    return gradients | {"loss": loss.detach()}


def case_of(number: int, family: str) -> tuple[Any, str]:
    """Blocks, norms and policies in turns."""
    config = model(family, BLOCKS[number % 3], NORMS[number % 2])
    return config, POLICIES[(number // 3) % 3]


@pytest.mark.parametrize("number,family", list(enumerate(FAMILIES)), ids=list(FAMILIES))
def test_a_compiled_block_is_one_graph_and_the_same_function(number: int, family: str) -> None:
    config, policy = case_of(number, family)
    built = Transformer(config, ParallelMesh.single(), recompute=[policy] * 2).double()
    built.load_canonical(random_tensors(config, number, torch.float64))
    batch = random_batch(config.vocab_size, 2, LENGTH, seed=number)
    plain = step(built, batch)
    built.compile_blocks(TRACED)
    compiled = step(built, batch)
    assert found("graph_break") == {}
    assert found("stats")["unique_graphs"] <= 4  # two regions of two kinds of layers
    errors = {name: relative_error(compiled[name], plain[name]) for name in plain}
    assert max(errors.values()) < 1e-10, max(errors, key=lambda name: errors[name])


def test_layers_lengths_and_documents_share_programs() -> None:
    config = model("rnope_swa", "parallel")
    config = config.model_copy(
        update={"layer_plan": config.layer_plan.model_copy(update={"num_layers": 8})}
    )
    built = Transformer(config, ParallelMesh.single(), compiler=TRACED)
    built.load_canonical(random_tensors(config, 0, torch.float32))
    for seed in range(6):  # documents differ from batch to batch
        for length in (LENGTH, LENGTH // 2):
            step(built, random_batch(config.vocab_size, 2, length, seed=seed))
    # enter of rotated and of unrotated layers, and leave; at each of two lengths.
    assert found("stats")["unique_graphs"] == 6
    assert found("graph_break") == {}


def test_evaluation_compiles_nothing() -> None:
    config = model("rope")
    built = Transformer(config, ParallelMesh.single(), compiler=TRACED)
    built.load_canonical(random_tensors(config, 0, torch.float32))
    batch = random_batch(config.vocab_size, 1, LENGTH, seed=0)
    built.logits(batch.tokens, batch.starts)
    assert found("stats") == {}


@pytest.mark.parametrize("zero_stage,precision", [(1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_the_engine_trains_compiled_blocks_as_it_trains_plain_ones(
    zero_stage: int, precision: str
) -> None:
    case = Case(
        model("rms-shared", "parallel", "layernorm"),
        zero_stage=zero_stage,
        precision=precision,
        compiler=TRACED,
    )
    truth = plain_run(case)
    (run,) = distributed.run(1, counted_run, case)
    if precision == "fp32":
        for got, wanted in zip(run.losses, truth.losses, strict=True):
            assert got == pytest.approx(wanted, rel=BOUND)
        weights = joined_weights([run], truth.weights)
        for name, weight in weights.items():
            assert relative_error(weight, truth.weights[name]) < BOUND, name
        return
    (plain,) = distributed.run(1, engine_run, replace(case, compiler=None))
    for got, single, wanted in zip(run.losses, plain.losses, truth.losses, strict=True):
        assert abs(got - wanted) <= 2 * abs(single - wanted) + 2e-3 * abs(wanted)


def counted_run(ranks: distributed.Ranks, case: Case) -> Any:
    """`engine_run` on this rank, with no graph break and one set of programs for all its steps."""
    with fresh_compiler():
        result = engine_run(ranks, case)
        assert found("graph_break") == {}
        assert 2 <= found("stats")["unique_graphs"] <= 4
    return result


def test_blocks_cut_over_ranks_are_refused() -> None:
    single = ParallelMesh.single()
    built = Transformer(model("rope"), single)
    built.mesh = ParallelMesh(Axis("tensor", 2, 0, None, (0, 1)), single.data, single.device)
    with pytest.raises(ConfigError, match=r"kernels\.blocks=compiled needs parallel\.tensor=1"):
        built.compile_blocks(TRACED)


PROGRAM = """
import sys, torch
from pathlib import Path
from torch._dynamo.utils import counters
from megahybrid.model.compiled import keep_programs
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity.cases import model
keep_programs(Path(sys.argv[1]))
config = model("nope", "post_norm")  # little to compile
built = Transformer(config, ParallelMesh.single(), compiler="inductor")
tokens = torch.arange(32)[None] % config.vocab_size
built(tokens, tokens)[0].backward()  # kept with its backward, not before
print(*(counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss")))
"""


@pytest.mark.skipif(os.system("g++ --version > /dev/null 2>&1") != 0, reason="needs g++")
def test_a_second_process_takes_its_programs_from_the_first(tmp_path: Path) -> None:
    def counts() -> list[int]:
        environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "programs")],
            cwd=ROOT,
            env=environment | {"JAXTYPING_DISABLE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return [int(word) for word in done.stdout.split()]

    (hit, missed), (hit_later, missed_later) = counts(), counts()
    assert (hit, missed_later) == (0, 0)
    assert missed == hit_later == 2  # enter and leave


def test_the_users_own_place_for_programs_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_programs(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
