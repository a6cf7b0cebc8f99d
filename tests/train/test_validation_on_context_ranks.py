"""Held-out loss of rows that context ranks share is that of one process, each row counted once."""

from pathlib import Path
from typing import Any

import pytest

from megahybrid.config import RunConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.validation import HeldOutSets, evaluation_loss
from tests import distributed
from tests.plain_model import random_tensors
from tests.train.test_validation import STREAM, folder, held_out_run

__all__ = ["folder"]  # a fixture

# Lengths of one call that differ in their degree, a row of
# more ranks than the window that slides over it among them.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "context2": (2, {"context": 2}),
    "context4": (4, {"context": 4}),
    "context2-data2": (4, {"context": 2}),
    "tensor2-context2": (4, {"tensor": 2, "context": 2}),
    "by-length": (4, {"context": {16: 1, 64: 2, 128: 4}}),
    "fewer-for-longer": (4, {"context": {16: 4, 64: 2, 128: 1}}),
}


def scores(run: RunConfig, mesh: ParallelMesh) -> dict[str, HeldOutLoss]:
    """Every score of a model with fixed random weights, by "set rows"."""
    context = ContextRanks(mesh, run.model, run.parallel)
    model = Transformer(run.model, mesh, context=context).double()
    model.load_canonical(random_tensors(run.model, 3))
    token_loss, found = evaluation_loss(model), {}

    def tell(name: str, score: HeldOutLoss, rows: str) -> None:
        found[f"{name} {rows} {len(found)}"] = score

    sets = HeldOutSets(run, mesh, longest=109, max_tokens=250, context=context)
    sets.score(token_loss, STREAM, tell)
    sets.score(token_loss, 27, tell)  # filled up
    sets.score_far(token_loss, tell)
    sets.score_sliding(token_loss, 29, 90, tell)
    return found


def score_on_ranks(ranks: distributed.Ranks, run: RunConfig) -> dict[str, HeldOutLoss]:
    return scores(run, ranks.mesh(run.parallel.tensor, run.parallel.context_degrees))


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, HeldOutLoss]:
    return scores(held_out_run(folder), ParallelMesh.single())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_every_layout_has_the_score_of_one(
    folder: Path, truth: dict[str, HeldOutLoss], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    run = held_out_run(folder).model_copy(update={"parallel": ParallelConfig(**parallel)})
    for found in distributed.run(world_size, score_on_ranks, run):
        assert found.keys() == truth.keys()
        for name, score in found.items():
            assert score.tokens == truth[name].tokens
            assert score.loss == pytest.approx(truth[name].loss, rel=1e-10)
            for ours, plain in zip(score.by_position, truth[name].by_position, strict=True):
                assert ours.tokens == plain.tokens
                assert ours.loss == (plain.loss and pytest.approx(plain.loss, rel=1e-10))
