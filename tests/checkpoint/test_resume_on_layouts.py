"""An engine goes on where any other layout's engine stopped: the same run, to contracts' bounds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.fragments import STATES, whole
from megahybrid.checkpoint.reader import Reader
from megahybrid.checkpoint.writer import Snapshot, save
from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import LEARNING_RATE, Case, build

BOUND, LOSS_BOUND_AT_40 = 1e-5, 1e-4
FIRST, SHORT, LONG = 2, 5, 40
MICRO_BATCHES = 4  # of a step, whoever computes them


def layout(name: str) -> Case:
    """For example "tensor2-data2-zero1", on a model with cut, replicated and padded parameters; or
    "tensor1-context2-data1-zero1"."""
    degrees = {
        part.rstrip("0123456789"): int(part.lstrip("abcdefghijklmnopqrstuvwxyz"))
        for part in name.removesuffix("-bf16").split("-")
    }
    return Case(
        model("layernorm-per_head", kv_heads=2, tied=False),
        degrees["tensor"],
        degrees["data"],
        degrees["zero"],
        accumulation=MICRO_BATCHES // degrees["data"],
        context=degrees.get("context", 1),
        precision="bf16" if name.endswith("-bf16") else "fp32",
        seed=7,
    )


@dataclass(frozen=True)
class Leg:
    """What one layout does: begin at `source` (or from nothing), train, and tell."""

    name: str
    source: Path | None
    steps: int
    # Saved right after loading, after SHORT steps (or after FIRST without a source), at the end.
    copy: Path | None = None
    ends: dict[int, Path] | None = None

    @property
    def world_size(self) -> int:
        return layout(self.name).world_size


@dataclass(frozen=True)
class Told:
    losses: list[float]
    norms: list[float]


def go(ranks: distributed.Ranks, legs: list[Leg]) -> list[Told]:
    """Every leg, one after the other, on this rank."""
    from megahybrid.parallel.collectives import gather_objects
    from megahybrid.train.engine import Engine, MicroBatch, engine

    def store(built: Engine, run: Path, step: int) -> None:
        world = built.mesh.world
        result = save(
            run,
            Snapshot(step, step, built.optimizer_step, "model", built.tensors,
                     list(built.fragments()), {"step": step}, {}),
            keep_last=9,
            ranks=Ranks(world.rank, world.size, lambda value: gather_objects(value, world)),
        )  # fmt: skip
        assert result.ok, result.error

    told = []
    for leg in legs:
        case = layout(leg.name)
        built = build(ranks, case, Engine, engine)
        step = 0
        if leg.source is not None:
            with Reader(leg.source) as reader:
                step = reader.manifest.step
                built.load(reader.read_flat, reader.manifest.optimizer_step)
        if leg.copy is not None:
            store(built, leg.copy, step)
        mine = built.mesh.data.rank * case.accumulation
        losses, norms = [], []
        for _ in range(leg.steps):
            share = case.micro_batches(step)[mine : mine + case.accumulation]
            batches = [MicroBatch(each.tokens, each.targets, each.starts) for each in share]
            result = built.train_step(batches, LEARNING_RATE)
            step += 1
            losses.append(result.loss)
            norms.append(result.gradient_norm)
            if leg.ends and step in leg.ends:
                built.align_replicas()
                store(built, leg.ends[step], step)
        built.close()
        told.append(Told(losses, norms))
    return told


def run_legs(legs: list[Leg]) -> list[Told]:
    """All legs, those of one world size in one launch; what rank 0 told."""
    told: dict[int, Told] = {}
    for world_size in sorted({leg.world_size for leg in legs}):
        chosen = [index for index, leg in enumerate(legs) if leg.world_size == world_size]
        answers = distributed.run(
            world_size, go, [legs[index] for index in chosen], timeout_seconds=240
        )
        told |= dict(zip(chosen, answers[0], strict=True))
    return [told[index] for index in range(len(legs))]


def contents(run: Path, step: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of every state, whole."""
    with Reader(run / "checkpoints" / f"step-{step:08d}") as reader:
        for name, tensor in reader.manifest.tensors.items():
            for state in STATES:
                yield f"{state} of {name}", reader.read(name, state, whole(tensor.shape))


def differs(a: Path, b: Path, step: int) -> dict[str, float]:
    """The relative error of every tensor of `a` against `b`."""
    return {
        what: float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
        for (what, found), (_, expected) in zip(contents(a, step), contents(b, step), strict=True)
    }


def same_bits(a: Path, b: Path, step: int) -> bool:
    return all(
        found.tobytes() == expected.tobytes()
        for (_, found), (_, expected) in zip(contents(a, step), contents(b, step), strict=True)
    )


# Who reads what whom wrote. Forty steps are run where ranks are few.
LONG_WRITER = "tensor2-data1-zero1"
READERS = {
    "tensor2-data2-zero1": [
        "tensor2-data2-zero1", "tensor4-data1-zero1", "tensor1-data4-zero3", "tensor1-data2-zero2",
        "tensor1-data1-zero1",
    ],
    "tensor1-data4-zero3": ["tensor2-data2-zero1"],
    "tensor4-data1-zero1": ["tensor2-data2-zero1", "tensor1-data2-zero2"],
    "tensor1-data2-zero2": ["tensor1-data2-zero2", "tensor2-data2-zero1"],
    "tensor2-data1-zero1": ["tensor1-data2-zero3"],
}  # fmt: skip


# Rows cut over context ranks, and whole again.
CONTEXT_READERS = {
    "tensor1-context4-data1-zero1": [
        "tensor1-context4-data1-zero1", "tensor1-data1-zero1", "tensor2-context2-data1-zero2",
        "tensor1-context2-data2-zero3",
    ],
    "tensor1-data1-zero1": ["tensor2-context2-data1-zero1"],
    "tensor2-data2-zero1": ["tensor1-context4-data1-zero3"],
}  # fmt: skip


def test_every_layout_goes_on_where_another_stopped(tmp_path: Path) -> None:
    goes_on_everywhere(READERS, tmp_path)


def test_context_ranks_go_on_where_others_stopped(tmp_path: Path) -> None:
    goes_on_everywhere(CONTEXT_READERS, tmp_path)


def goes_on_everywhere(table: dict[str, list[str]], tmp_path: Path) -> None:
    """Train on the layouts that write, then on those that read, and compare these with what the
    writers came to unbroken."""
    written = {name: tmp_path / name for name in table}
    at = FIRST + SHORT
    writers = [
        Leg(
            name,
            None,
            FIRST + (LONG if name == LONG_WRITER else SHORT),
            ends={FIRST: run, at: run},
        )
        for name, run in written.items()
    ]
    unbroken = dict(zip(written, run_legs(writers), strict=True))
    legs = [
        Leg(
            name,
            written[writer] / "checkpoints" / f"step-{FIRST:08d}",
            LONG if writer == LONG_WRITER else SHORT,
            copy=tmp_path / f"{writer}--{name}",
            ends={at: tmp_path / f"{writer}--{name}"},
        )
        for writer, readers in table.items()
        for name in readers
    ]
    for leg, told in zip(legs, run_legs(legs), strict=True):
        assert leg.source is not None and leg.copy is not None
        run = leg.source.parents[1]
        expected = unbroken[run.name]
        assert same_bits(leg.copy, run, FIRST), f"{leg.copy.name}: not what was loaded"
        losses, norms = expected.losses[FIRST:], expected.norms[FIRST:]
        if leg.name == run.name:
            assert (told.losses, told.norms) == (losses, norms), leg.name
            assert same_bits(leg.copy, run, at), leg.name
            continue
        for ours, theirs in ((told.losses, losses), (told.norms, norms)):
            assert ours[:SHORT] == pytest.approx(theirs[:SHORT], rel=BOUND), leg.copy.name
        wrong = {
            what: error
            for what, error in differs(leg.copy, run, at).items()
            if what.startswith("weight") and error > BOUND
        }
        assert not wrong, (leg.copy.name, wrong)
        assert told.losses[-1] == pytest.approx(losses[len(told.losses) - 1], rel=LOSS_BOUND_AT_40)


def test_bf16_keeps_its_fp32_masters_on_any_layout(tmp_path: Path) -> None:
    name = "tensor2-data1-zero1-bf16"
    writer = Leg(name, None, FIRST + SHORT, ends={FIRST: tmp_path / "run"})
    (unbroken,) = run_legs([writer])
    source = tmp_path / "run" / "checkpoints" / f"step-{FIRST:08d}"
    readers = [name, "tensor1-data1-zero2-bf16", "tensor1-data2-zero3-bf16"]
    legs = [Leg(reader, source, SHORT, copy=tmp_path / reader) for reader in readers]
    for leg, told in zip(legs, run_legs(legs), strict=True):
        assert leg.copy is not None
        assert same_bits(leg.copy, tmp_path / "run", FIRST), leg.name
        if leg.name == name:
            assert told.losses == unbroken.losses[FIRST:]
        # One bf16 rounding is 2^-8 of a number; a loss averages many.
        assert told.losses == pytest.approx(unbroken.losses[FIRST:], rel=2**-8)
    masters = dict(contents(tmp_path / "run", FIRST))
    rounded = [
        array
        for what, array in masters.items()
        if what.startswith("weight") and not (array.view(np.uint32) & 0xFFFF).any()
    ]
    assert not rounded, "these masters have no more bits than bf16 has"


def test_a_checkpoint_of_one_model_is_refused_by_another(tmp_path: Path) -> None:
    (_,) = run_legs([Leg("tensor1-data1-zero1", None, 1, ends={1: tmp_path})])
    other = replace(layout("tensor1-data1-zero1"), config=model("rope", vocab_size=51))
    step = tmp_path / "checkpoints" / "step-00000001"
    with pytest.raises(distributed.RankFailed, match="It is of another model"):
        distributed.run(1, load_other, other, step)


def load_other(ranks: distributed.Ranks, case: Case, step: Path) -> None:
    """Load a checkpoint into an engine of another model."""
    from megahybrid.train.engine import Engine, engine

    built = build(ranks, case, Engine, engine)
    with Reader(step) as reader:
        built.load(reader.read_flat, reader.manifest.optimizer_step)
