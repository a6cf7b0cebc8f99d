import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.config import RunConfig, parse
from megahybrid.data.dataset import TokenDataset
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.validation import HeldOutSets, evaluation_loss
from tests import distributed
from tests.data.corpus import write_corpus
from tests.parity import cases
from tests.plain_model import PlainModel, random_tensors

LENGTHS = {"one": [30, 7, 90, 300, 41, 3, 64, 130, 200, 16], "two": [20, 33, 45]}
VOCAB = 50
STREAM, LONGEST, SHORTEST = 32, 128, 16  # longest: four times the longest trained length


def held_out_run(folder: Path, **data: Any) -> RunConfig:
    """A run over two small sets, in stages of 16 and 32 tokens."""
    stages = [
        {
            "name": f"stage{length}",
            "tokens": 1024,
            "lengths": {length: 1},
            "batch_tokens": 256,
            "micro_batch_tokens": 64,
            "weights": {"one": 1},
            "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-4},
        }
        for length in (SHORTEST, STREAM)
    ]
    sources = {name: {"path": str(folder / name)} for name in LENGTHS}
    return parse(
        RunConfig,
        {
            "model": cases.model("rnope_swa", vocab_size=VOCAB).model_dump(),
            "precision": "fp32",
            "data": {"sources": sources, "held_out": sources, "block_tokens": 256, **data},
            "stages": stages,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets by the names of LENGTHS."""
    path = tmp_path_factory.mktemp("held_out")
    for seed, (name, lengths) in enumerate(LENGTHS.items()):
        write_corpus(path / name, lengths, vocab_size=VOCAB, seed=seed)
    return path


def scores(run: RunConfig, mesh: ParallelMesh, **options: Any) -> dict[str, HeldOutLoss]:
    """Every score of a model with fixed random weights, by "set rows"."""
    model = Transformer(run.model, mesh).double()
    model.load_canonical(random_tensors(run.model, 3))
    sets = HeldOutSets(run, mesh, **options)
    found: dict[str, HeldOutLoss] = {}

    def tell(name: str, score: HeldOutLoss, rows: str) -> None:
        found[f"{name} {rows}"] = score

    token_loss = evaluation_loss(model)
    sets.score(token_loss, STREAM, tell)
    sets.score_far(token_loss, tell)
    return found


def plain_losses(run: RunConfig, name: str, length: int, rows: str) -> list[tuple[int, float]]:
    """(position, loss) of each target, one piece of one document at a time."""
    plain = PlainModel(run.model, random_tensors(run.model, 3))
    dataset = TokenDataset(run.data.held_out[name].path)
    found = []
    for start, size in dataset.document_spans():
        if rows == "documents":
            pieces = [(start, min(size, length))] if size >= SHORTEST else []
        else:  # the document as the rows of the stream cut it
            cuts = range(-(-(start + 1) // length) * length, start + size, length)
            edges = [start, *cuts, start + size]
            pieces = [(a, b - a) for a, b in itertools.pairwise(edges)]
        for begin, count in pieces:
            wanted = min(count, start + size - begin - 1)  # the last token predicts nothing
            ids = torch.from_numpy(dataset.read(begin, count).astype("int64"))
            targets = torch.full((1, count), -100)
            targets[0, :wanted] = torch.from_numpy(dataset.read(begin + 1, wanted).astype("int64"))
            losses = plain.loss(ids[None], targets)[1][0]
            found += [(position, float(losses[position])) for position in range(wanted)]
    return found


@pytest.mark.parametrize("rows", ["stream", "documents"])
@pytest.mark.parametrize("name", LENGTHS)
def test_score_equals_the_plain_models_on_each_token(folder: Path, name: str, rows: str) -> None:
    run = held_out_run(folder)
    length = STREAM if rows == "stream" else LONGEST
    truth = plain_losses(run, name, length, rows)
    score = scores(run, ParallelMesh.single())[f"{name} {rows}"]
    assert score.length == length
    assert score.tokens == len(truth)
    assert score.loss == pytest.approx(sum(loss for _, loss in truth) / len(truth), rel=1e-10)
    assert score.by_position[-1].stop == LONGEST
    for bucket in score.by_position:
        inside = [loss for position, loss in truth if bucket.start <= position < bucket.stop]
        assert bucket.tokens == len(inside)
        if inside:
            assert bucket.loss == pytest.approx(sum(inside) / len(inside), rel=1e-10)
        else:
            assert bucket.loss is None


def test_joined_documents_are_positions_of_one_row(folder: Path) -> None:
    score = scores(held_out_run(folder, documents="joined"), ParallelMesh.single())["two stream"]
    by_start = {bucket.start: bucket.tokens for bucket in score.by_position}
    assert by_start[0] == 4  # one for each row of 98 tokens: none begins with eod
    assert score.tokens == sum(length - 1 for length in LENGTHS["two"])


def test_far_positions_come_from_long_documents_however_small_the_budget(folder: Path) -> None:
    score = scores(held_out_run(folder), ParallelMesh.single(), max_tokens=1)["one documents"]
    assert score.tokens == LONGEST
    assert all(bucket.tokens for bucket in score.by_position)


def test_other_reach_and_sets_replace_the_runs_own(folder: Path) -> None:
    sets = {"alone": TokenDataset(folder / "two")}
    found = scores(held_out_run(folder), ParallelMesh.single(), sets=sets, longest=10)
    assert list(found) == ["alone stream", "alone documents"]
    assert found["alone documents"].by_position[-1].stop == 10
    assert found["alone documents"].tokens == 30


def score_on_ranks(ranks: distributed.Ranks, run: RunConfig, tensor: int) -> dict[str, HeldOutLoss]:
    return scores(run, ranks.mesh(tensor))


@pytest.mark.parametrize(("world_size", "tensor"), [(2, 1), (2, 2), (4, 2)])
def test_every_rank_of_every_degree_has_the_score_of_one(
    folder: Path, world_size: int, tensor: int
) -> None:
    run = held_out_run(folder)
    truth = scores(run, ParallelMesh.single())
    for found in distributed.run(world_size, score_on_ranks, run, tensor):
        for name, score in found.items():
            assert score.tokens == truth[name].tokens
            assert score.loss == pytest.approx(truth[name].loss, rel=1e-10)
            for ours, plain in zip(score.by_position, truth[name].by_position, strict=True):
                assert ours.tokens == plain.tokens and ours.documents == plain.documents
                assert ours.loss == (plain.loss and pytest.approx(plain.loss, rel=1e-10))
            same = truth[name].same_documents
            assert (same is None) == ("stream" in name)
            for ours, plain in zip(score.same_documents or (), same or (), strict=True):
                assert (ours.tokens, ours.documents) == (plain.tokens, plain.documents)
                figures = (ours.loss, ours.low, ours.high)
                assert figures == pytest.approx((plain.loss, plain.low, plain.high), rel=1e-10)
