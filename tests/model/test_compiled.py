"""Compiled blocks: traced whole, the same numbers, no more programs than kinds and shapes."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from megahybrid.config import chunk_sizes
from megahybrid.model import core_attention
from megahybrid.model.attention import BranchInputs
from megahybrid.model.block import Block
from megahybrid.model.compiled import keep_programs
from megahybrid.model.kernels import attend
from megahybrid.model.mlp import swiglu
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests import distributed
from tests.parity.cases import BLOCKS, FAMILIES, NORMS, model
from tests.parity.test_engine import BOUND, Case, engine_run, joined_weights, plain_run
from tests.plain_model import random_tensors, relative_error
from tests.plain_training import random_batch

# Front end and autograd as inductor has them, without its code: what breaks, breaks here.
TRACED = "aot_eager"
LENGTH = 48
LOSS = 3  # programs of a part of the logits: sums, losses, and slope
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
    # Two regions of two kinds of layers, and two of the loss; of two views each rotation by itself.
    fused = [scheme for scheme in config.layer_plan.expand() if scheme.near is not None]
    rotations = sum(view.position.kind == "rope" for scheme in fused for view in scheme.views())
    assert found("stats")["unique_graphs"] <= 4 + LOSS + rotations
    errors = {name: relative_error(compiled[name], plain[name]) for name in plain}
    assert max(errors.values()) < 1e-10, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("rows", [1, 2])
def test_heads_reach_the_kernel_row_by_row_from_one_program_each(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model("rope", "parallel")
    built = Transformer(config, ParallelMesh.single())
    built.load_canonical(random_tensors(config, 0, torch.float32))
    for block in built.blocks:
        assert isinstance(block, Block)
        block.compile_regions(TRACED)
    seen: list[bool] = []

    def watched(*given: Any) -> Tensor:
        seen.extend(x.transpose(0, 1).is_contiguous() for x in given[:2])  # v is a slice
        return attend(*given)

    monkeypatch.setattr(core_attention, "attend", watched)
    step(built, random_batch(config.vocab_size, rows, LENGTH, seed=0))
    assert len(seen) == 4 and all(seen)
    # The first layer's stream lies otherwise than the second's.
    assert found("stats")["unique_graphs"] == 2


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_gate_and_up_are_kept_apart_where_their_product_is_computed_again(policy: str) -> None:
    built = Transformer(model("rope", "parallel"), ParallelMesh.single(), recompute=[policy] * 2)
    block = built.blocks[0]
    assert isinstance(block, Block)
    gate, up = torch.randn(2, 3, 5).unbind()
    folded = block.folded(BranchInputs(gate=gate, up=up))
    if policy == "selective":
        assert folded.gate is gate and folded.up is up and folded.gated is None
    else:
        assert folded.gated is not None and torch.equal(folded.gated, swiglu(gate, up))
        assert folded.gate is None and folded.up is None


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
    assert found("stats")["unique_graphs"] == 2 * (3 + LOSS)
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
        assert 2 + LOSS <= found("stats")["unique_graphs"] <= 4 + LOSS
    return result


CUT = {
    "tensor2": Case(model("rms-shared", "parallel", "layernorm"), 2, compiler=TRACED),
    "tensor2-zero3-selective": Case(
        model("ssmax", "pre_norm", "rms"), 2, 1, 3, recompute="selective", compiler=TRACED
    ),
    "tensor2-chunked": Case(
        model("rms-shared", "pre_norm", "rms"), 2, recompute="chunked", compiler=TRACED
    ),
    "data2-zero3-full": Case(
        model("rnope_swa", "post_norm", "rms"), 1, 2, 3, recompute="full", compiler=TRACED
    ),
    # Vectors that ZeRO 3 cuts by themselves, beside the fused input product.
    "data2-zero3-bias": Case(model("bias", "pre_norm", "rms"), 1, 2, 3, compiler=TRACED),
}


@pytest.mark.parametrize("name", CUT)
def test_of_blocks_cut_over_ranks_the_pieces_are_compiled(name: str) -> None:
    case = CUT[name]
    runs = distributed.run(2, counted_run, case)
    truth = plain_run(case)
    for run in runs:
        for got, wanted in zip(run.losses, truth.losses, strict=True):
            assert got == pytest.approx(wanted, rel=BOUND)
    weights = joined_weights(runs, truth.weights)
    for of, weight in weights.items():
        assert relative_error(weight, truth.weights[of]) < BOUND, of


@pytest.mark.parametrize(
    "block,policy",
    [
        ("pre_norm", "chunked"),
        ("post_norm", "full"),
        ("parallel", "chunked"),
        ("parallel", "offload"),
    ],
)
def test_the_pieces_are_compiled_where_an_mlp_runs_in_chunks(
    block: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_sizes, "CHUNK_TOKENS", 40)
    config = model("rope", block)
    built = Transformer(config, ParallelMesh.single(), recompute=[policy] * 2).double()
    built.load_canonical(random_tensors(config, 0, torch.float64))
    batch = random_batch(config.vocab_size, 2, LENGTH, seed=0)
    plain = step(built, batch)
    built.compile_blocks(TRACED)
    compiled = step(built, batch)
    assert found("graph_break") == {}
    # The rotation; the gated product and its slopes, for whole chunks and for the last.
    assert found("stats")["unique_graphs"] == 1 + 2 * 2 + LOSS
    assert max(relative_error(compiled[name], plain[name]) for name in plain) < 1e-10


def test_evaluation_in_chunks_compiles_nothing() -> None:
    config = model("rope", "parallel")
    built = Transformer(config, ParallelMesh.single(), recompute=["chunked"] * 2, compiler=TRACED)
    built.load_canonical(random_tensors(config, 0, torch.float32))
    batch = random_batch(config.vocab_size, 1, LENGTH, seed=0)
    built.logits(batch.tokens, batch.starts)
    assert found("stats") == {}


def test_programs_are_kept_where_the_run_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_programs(tmp_path / "programs")
    assert Path(cache_dir()) == tmp_path / "programs"


def test_the_users_own_place_for_programs_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_programs(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_a_program_that_a_killed_compiler_left_half_written_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._C

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    library = Path(torch._C.__file__).read_bytes()
    (tmp_path / "ab").mkdir()
    kept = {"whole.so": library}
    torn = {"none.so": b"", "head.so": library[:40], "half.so": library[: len(library) // 2]}
    (sections,) = struct.unpack_from("=Q", library, 40)  # the last that a linker writes
    torn |= {"sections.so": library[: sections + 64], "zeros.so": bytes(4096)}
    for name, content in (kept | torn).items():
        (tmp_path / "ab" / name).write_bytes(content)
    keep_programs(tmp_path, first=False)
    assert len(list(tmp_path.rglob("*.so"))) == len(kept | torn)
    keep_programs(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.so")] == list(kept)
