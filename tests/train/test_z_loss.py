"""The z-loss of a run: told beside the loss, which is without it."""

from dataclasses import replace

import pytest

from megahybrid.ledger import StepLine, encode
from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import RATES, Case, build
from tests.plain_model import PlainModel


def first_step(ranks: distributed.Ranks, case: Case) -> tuple[float, float | None, float]:
    """Loss, z-loss and gradient norm of one step through the engine."""
    from megahybrid.train.engine import Engine, MicroBatch, engine

    built = build(ranks, case, Engine, engine)
    mesh = case.mesh(ranks)
    mine = mesh.data.rank * case.accumulation
    share = case.micro_batches(0)[mine : mine + case.accumulation]
    batches = [MicroBatch(each.tokens, each.targets, each.starts) for each in share]
    update = built.train_step(batches, RATES[0], audit=True)
    built.close()
    return update.loss, update.z_loss, update.gradient_norm


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [(1, {}), (2, {"tensor": 2, "accumulation": 2}), (2, {"context": 2, "accumulation": 2})],
    ids=["ranks1", "tensor2", "context2"],
)
def test_it_is_told_beside_the_loss_of_a_step(processes: int, degrees: dict[str, int]) -> None:
    case = Case(model("rnope_swa", "parallel", "layernorm"), seed=91, z_loss=0.02, **degrees)
    without = replace(case, z_loss=None)
    loss, z_loss, norm = distributed.run(processes, first_step, case)[0]
    plain_loss, none, plain_norm = distributed.run(processes, first_step, without)[0]
    assert none is None and loss == pytest.approx(plain_loss, rel=1e-6)
    assert abs(norm / plain_norm - 1) > 1e-3
    tensors = {name: value.detach().double() for name, value in case.first_tensors().items()}
    plain = PlainModel(case.config, tensors)
    squares, count = 0.0, 0
    for batch in case.micro_batches(0):
        counts = batch.targets != -100
        log_z = plain.logits(batch.tokens, batch.starts).logsumexp(-1)
        squares, count = squares + log_z[counts].square().sum().item(), count + int(counts.sum())
    assert z_loss == pytest.approx(0.02 * squares / count, rel=1e-5)


def test_a_line_without_one_has_no_word_of_it() -> None:
    numbers = {"step": 1, "stage": "a", "tokens": 8, "length": 4, "cursor_crc": 0}
    line = StepLine(**numbers, source_tokens={}, learning_rate=1.0, loss=1.0, gradient_norm=1.0)
    assert b"z_loss" not in encode(line)
    with_it = StepLine(
        **numbers, source_tokens={}, learning_rate=1.0, loss=1.0, gradient_norm=1.0, z_loss=0.5
    )
    assert b'"z_loss":0.5' in encode(with_it)
