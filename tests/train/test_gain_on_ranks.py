"""Context gain on any ranks is that of one process, and of one held-out set's own documents."""

from pathlib import Path
from typing import Any

import pytest

from megahybrid.config import RunConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.evaluate.context_gain import ContextGain
from megahybrid.ledger import GainBucket
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.validation import HeldOutSets, evaluation_loss
from tests import distributed
from tests.plain_model import random_tensors
from tests.train.test_validation import LENGTHS, folder, held_out_run

__all__ = ["folder"]  # a fixture

CONTEXTS, LONGEST = (10, 45), 109
# Windows have other degrees than the rows they are cut from, more ranks among them, and fewer.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data2": (2, {}),
    "tensor2-context2": (4, {"tensor": 2, "context": 2}),
    "by-length": (4, {"context": {16: 1, 64: 2, 128: 4}}),
    "fewer-for-longer": (4, {"context": {16: 4, 64: 2, 128: 1}}),
}


def gains(run: RunConfig, mesh: ParallelMesh) -> dict[tuple[str, int], ContextGain]:
    """The gains of a model with fixed random weights, by set and context."""
    context = ContextRanks(mesh, run.model, run.parallel)
    model = Transformer(run.model, mesh, context=context).double()
    model.load_canonical(random_tensors(run.model, 3))
    sets, found = HeldOutSets(run, mesh, longest=LONGEST, max_tokens=500, context=context), {}

    def tell(name: str, gain: ContextGain) -> None:
        found[name, gain.context] = gain

    sets.score_gain(evaluation_loss(model), CONTEXTS, tell)
    return found


def gains_on_ranks(ranks: distributed.Ranks, run: RunConfig) -> dict[tuple[str, int], ContextGain]:
    return gains(run, ranks.mesh(run.parallel.tensor, run.parallel.context_degrees))


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[tuple[str, int], ContextGain]:
    return gains(held_out_run(folder), ParallelMesh.single())


def test_every_token_with_more_context_counts_once(
    truth: dict[tuple[str, int], ContextGain],
) -> None:
    # All of "two" fits: the last token of a document has no target, the first `context` no gain.
    for context in CONTEXTS:
        sizes = [size - 1 - context for size in LENGTHS["two"] if size - 1 > context]
        gain = truth["two", context]
        assert (gain.tokens, gain.documents) == (sum(sizes), len(sizes))
        assert sum(one.tokens for one in gain.by_position) == sum(sizes)
    assert truth["two", 45].gain is None and truth["two", 45].loss is None
    assert truth["one", 45].documents > 1 and truth["one", 45].by_position[-1].stop == LONGEST


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_every_layout_has_the_gains_of_one(
    folder: Path, truth: dict[tuple[str, int], ContextGain], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    run = held_out_run(folder).model_copy(update={"parallel": ParallelConfig(**parallel)})
    for found in distributed.run(world_size, gains_on_ranks, run):
        assert found.keys() == truth.keys()
        for key, gain in found.items():
            assert_same(vars(gain), vars(truth[key]))


def assert_same(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    """Counts are equal; nats to 1e-9 (gains are differences)."""
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        if name == "by_position":
            for one, other in zip(ours[name], value, strict=True):
                assert isinstance(one, GainBucket)
                assert_same(vars(one), vars(other))
        elif isinstance(value, float):
            assert ours[name] == pytest.approx(value, abs=1e-9)
        else:
            assert ours[name] == value
