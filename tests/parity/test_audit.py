"""What must not pass: broken marks, missing wraps and wrong means, on purpose."""

from contextlib import ExitStack
from unittest import mock

import pytest
from torch import Tensor

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import BOUND, Case, build
from tests.plain_model import IGNORED, PlainModel
from tests.plain_training import global_norm

CASE = Case(model("rms-shared", "pre_norm", "rms"), tensor=2)

BREAKS = {
    # what is broken: (patches, module parameters with a wrong mark)
    "nothing": ([], ""),
    "mark of the fused projection": ([], "query_key_value"),
    "mark of a row projection": ([], "mlp.down"),
    "mark of the embedding": ([], "embedding"),
    "mark on a norm": ([], "final_norm"),
    "wrap of norm weights": (["megahybrid.model.norm.copy_to_tensor"], ""),
}


CANONICAL = {"query_key_value": "attention.query.weight"}  # the first of those in one matrix


def unwrapped(x: Tensor, axis: object) -> Tensor:
    """A wrap that is none."""
    return x


def verdict(ranks: distributed.Ranks, case: Case, broken: str, blind: bool) -> str:
    """What the engine says in its first audited step; "" where it finds nothing.

    `blind`: marks are not compared with ShardSpecs beforehand, so that only arithmetic can tell.
    """
    from megahybrid.errors import AuditError
    from megahybrid.model.transformer import Transformer
    from megahybrid.train.engine import Engine, engine
    from megahybrid.train.engine import MicroBatch as EngineMicroBatch

    patches, marked = BREAKS[broken]
    load = Transformer.load_canonical

    def load_and_break(ours: Transformer, tensors: dict[str, Tensor]) -> None:
        load(ours, tensors)
        for name, parameter in ours.named_parameters():
            if marked and marked in name:
                right = parameter.tensor_model_parallel  # type: ignore[attr-defined]
                parameter.tensor_model_parallel = not right  # type: ignore[attr-defined]

    with ExitStack() as stack:
        for target in patches:
            stack.enter_context(mock.patch(target, unwrapped))
        if blind:
            stack.enter_context(mock.patch.object(engine, "check_marks", lambda *args: None))
        stack.enter_context(mock.patch.object(Transformer, "load_canonical", load_and_break))
        try:
            built = build(ranks, case, Engine, engine)
        except AuditError as error:
            return str(error)
        batch = case.micro_batches(0)[0]
        try:
            built.train_step(
                [EngineMicroBatch(batch.tokens, batch.targets, batch.starts)], 1e-3, audit=True
            )
        except AuditError as error:
            return str(error)
        finally:
            built.close()
    return ""


def verdicts(ranks: distributed.Ranks, asked: list[tuple[Case, str, bool]]) -> list[str]:
    """Several verdicts in one call."""
    return [verdict(ranks, *one) for one in asked]


@pytest.fixture(scope="module")
def said() -> dict[tuple[int, str, bool], set[str]]:
    """What the ranks said, by ZeRO stage, breakage and blindness."""
    asked = [
        (Case(CASE.config, tensor=2, zero_stage=zero_stage), broken, blind)
        for zero_stage in (1, 2, 3)
        for broken, (_, marked) in BREAKS.items()
        for blind in ((False, True) if marked else (False,))
    ]
    answers = distributed.run(2, verdicts, asked)
    return {
        (case.zero_stage, broken, blind): {of_rank[index] for of_rank in answers}
        for index, (case, broken, blind) in enumerate(asked)
    }


Said = dict[tuple[int, str, bool], set[str]]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_audit_is_silent_where_nothing_is_broken(said: Said, zero_stage: int) -> None:
    assert said[zero_stage, "nothing", False] == {""}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("broken", [name for name, (_, marked) in BREAKS.items() if marked])
def test_a_wrong_mark_stops_the_run_before_its_first_step(
    said: Said, zero_stage: int, broken: str
) -> None:
    (line,) = said[zero_stage, broken, False]  # every rank says the same
    assert CANONICAL.get(BREAKS[broken][1], BREAKS[broken][1]) in line
    assert "mark" in line


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("broken", [name for name, (_, marked) in BREAKS.items() if marked])
def test_a_wrong_mark_is_found_by_the_norm_alone(said: Said, zero_stage: int, broken: str) -> None:
    lines = said[zero_stage, broken, True]
    assert all("gradient norm" in line and "mark" in line for line in lines)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_missing_wrap_is_found_and_its_class_named(said: Said, zero_stage: int) -> None:
    (line,) = said[zero_stage, "wrap of norm weights", False]
    assert "copy_to_tensor" in line
    assert "norm" in line


def test_a_mean_per_micro_batch_is_another_gradient() -> None:
    """The batches of the engine's tests are uneven enough to tell one global mean from others."""
    case = Case(CASE.config, data=2, accumulation=2, seed=3)
    gradients: dict[bool, dict[str, Tensor]] = {}
    batches = case.micro_batches(0)
    counts = [int((batch.targets != IGNORED).sum()) for batch in batches]
    for mean_of_means in (False, True):
        tensors = {
            name: value.detach().double().requires_grad_()
            for name, value in case.first_tensors().items()
        }
        for batch, count in zip(batches, counts, strict=True):
            loss, _ = PlainModel(case.config, tensors).loss(
                batch.tokens, batch.targets, batch.starts
            )
            (loss / (count * len(counts) if mean_of_means else sum(counts))).backward()
        gradients[mean_of_means] = {
            name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None
        }
    right, wrong = (global_norm(gradients[each]) for each in (False, True))
    assert abs(wrong / right - 1) > 1000 * BOUND
