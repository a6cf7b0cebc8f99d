"""What must not pass: broken marks, missing wraps and wrong means, on purpose."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
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
            stack.enter_context(
                mock.patch.object(engine, "check_tensor_parallel_flags", lambda *args: None)
            )
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


def _norm_times(factor: float) -> Callable[[Any], None]:
    """DeepSpeed's own global norm wrong by `factor`: reported so, and clipped by."""

    def plant(built: Any) -> None:
        zero = built.deepspeed.optimizer
        if hasattr(zero, "scaled_global_norm"):  # stages 1 and 2
            whole = zero.scaled_global_norm
            zero.scaled_global_norm = lambda *args: whole(*args) * factor
        else:
            groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: [norm * factor for norm in groups()]

    return plant


def _clips_at(clip_norm: float) -> Callable[[Any], None]:
    def plant(built: Any) -> None:
        built.deepspeed.optimizer.clip_grad = clip_norm

    return plant


def _reported_times(factor: float) -> Callable[[Any], None]:
    """The engine tells another norm than it clipped by."""

    def plant(built: Any) -> None:
        right = built.deepspeed.get_global_grad_norm
        built.deepspeed.get_global_grad_norm = lambda: right() * factor

    return plant


def _loses_a_kind(built: Any) -> None:
    """The optimizer is given no gradient of its largest partition's first half."""
    observe = built.optimizer.observe

    def halved(flat: Tensor, gradient: Tensor) -> None:
        gradient.view(-1)[: gradient.numel() // 2] = 0
        observe(flat, gradient)

    built.optimizer.observe = halved


PLANTS: dict[str, Callable[[Any], None]] = {
    "nothing": lambda built: None,
    "a norm of half the size": _norm_times(0.5),
    "a norm of twice the size": _norm_times(2.0),
    "clipping at another norm": _clips_at(0.1),
    "no clipping": _clips_at(0.0),
    "another norm reported": _reported_times(1.01),
    "a lost half": _loses_a_kind,
}


def planted_step(
    ranks: distributed.Ranks, case: Case, plants: list[str]
) -> list[tuple[str, float, float]]:
    """Of each plant: what the audit says, the engine's norm and that of all kinds together."""
    from megahybrid.errors import AuditError
    from megahybrid.train.engine import Engine, engine
    from megahybrid.train.engine import MicroBatch as EngineMicroBatch

    found = []
    for name in plants:
        built = build(ranks, case, Engine, engine)
        PLANTS[name](built)
        batch = case.micro_batches(0)[0]
        batches = [EngineMicroBatch(batch.tokens, batch.targets, batch.starts)]
        said = ""
        with mock.patch.object(engine, "check_audit", wraps=engine.check_audit) as checked:
            try:
                built.train_step(batches, 1e-3, audit=True)
            except AuditError as error:
                said = str(error)
        _, norm, by_kind = checked.call_args.args
        found.append((said, norm, math.hypot(*by_kind.values())))
        built.close()
    return found


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_wrong_norm_or_clipping_of_the_engine_is_found(zero_stage: int) -> None:
    case = Case(CASE.config, zero_stage=zero_stage)
    (found,) = distributed.run(1, planted_step, case, list(PLANTS))
    told = dict(zip(PLANTS, found, strict=True))
    said, norm, of_kinds = told.pop("nothing")
    assert said == "" and abs(of_kinds / norm - 1) < 1e-5
    for name, (said, norm, of_kinds) in told.items():
        assert said.startswith("audit: the "), name
        # Of kinds alone, without the audit, all show in the ledger but what scales with the norm.
        assert (abs(of_kinds / norm - 1) > 5e-3) == (name != "another norm reported"), name


def test_norms_by_kind_do_not_follow_a_wrong_engine_norm() -> None:
    case = Case(CASE.config)
    plants = ["nothing", "a norm of half the size", "a norm of twice the size"]
    (found,) = distributed.run(1, planted_step, case, plants)
    (_, norm, truth), *wrong = found
    for (_, wrong_norm, of_kinds), factor in zip(wrong, (0.5, 2.0), strict=True):
        assert abs(wrong_norm / (factor * norm) - 1) < 1e-5
        assert abs(of_kinds / truth - 1) < 1e-5
