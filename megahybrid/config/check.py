"""The checks that span the parts of a run. Each function returns its problems, one line each."""

from collections.abc import Iterator
from typing import assert_never

from megahybrid.config import limits
from megahybrid.config.anneal import PlanStretch, stretches
from megahybrid.config.base import did_you_mean, few
from megahybrid.config.context_check import context_problems
from megahybrid.config.context_features import feature_problems
from megahybrid.config.counting import kv_heads_of_views
from megahybrid.config.explain import MOST_LINES
from megahybrid.config.gates import LossGate, SuiteGate
from megahybrid.config.memory_estimate import policies_of
from megahybrid.config.model import nearest_multiples, rotation_problems
from megahybrid.config.run import RunConfig
from megahybrid.config.stages import BatchRamp, RecomputeBudget, Stage
from megahybrid.errors import ConfigError
from megahybrid.printable import shortened


def check_run(run: RunConfig, world_size: int | None = None) -> None:
    """Raise ConfigError with every disagreement between the parts of a run, one line each.

    `world_size` is the number of ranks; None leaves out what only it can tell.
    """
    lines = problems(run, world_size)
    if lines:
        raise ConfigError(*lines)


def problems(run: RunConfig, world_size: int | None) -> list[str]:
    """Return the mistakes that config alone can tell, the first MOST_LINES of them."""
    lines: dict[str, None] = {}
    for line in _problems(run, world_size):
        lines.setdefault(line)
        if len(lines) == MOST_LINES:
            break
    return list(lines)


def _problems(run: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from run.parallel.problems(run.model, world_size)
    yield from _precision(run)
    yield from feature_problems(run)
    data_degree = None
    if world_size is not None and world_size % run.parallel.model_ranks == 0:
        data_degree = run.parallel.data_degree(world_size)
    for index, stage in enumerate(run.stages):
        yield from _lengths(run, stage, f"stages.{index}")
        yield from _batches(stage, f"stages.{index}", data_degree)
        yield from context_problems(run, index)
        yield from _sources(run, stage, f"stages.{index}")
        yield from _budget(run, index, data_degree)
        yield from _gates(run, stage, f"stages.{index}.gates")
        if isinstance(stage.recompute, list) and len(stage.recompute) != (
            layers := run.model.layer_plan.num_layers
        ):
            yield (
                f"stages.{index}.recompute has {len(stage.recompute)} entries "
                f"(model.layer_plan.num_layers={layers}). Give one per layer, or one word for all."
            )
    yield from _scheme_overrides(run)
    yield from _splits(run)
    yield from _sinks(run)
    if (best := run.checkpoint.keep_best) is not None and best not in run.data.held_out:
        yield (
            f"checkpoint.keep_best names '{shortened(best)}', which data.held_out does not define."
            f"{did_you_mean(best, run.data.held_out)}"
        )


def _splits(run: RunConfig) -> Iterator[str]:
    """A split of which one view has no head is a scheme of one view."""
    for name, scheme in run.model.layer_plan.schemes.items():
        if scheme.split is None:
            continue
        counts = [count for _, count in kv_heads_of_views(scheme, run.model.num_kv_heads)]
        if 0 in counts:
            yield (
                f"model.layer_plan.schemes.{name}.split.near={scheme.split.near} of "
                f"{scheme.split.of} leaves the far view no key head "
                f"(model.num_kv_heads={run.model.num_kv_heads}). Use fewer than "
                f"{run.model.num_kv_heads} near ones."
            )


def _precision(run: RunConfig) -> Iterator[str]:
    if run.parallel.zero_stage == 0 and (run.precision != "fp32" or run.parallel.tensor > 1):
        yield (
            f"parallel.zero_stage=0 is right only in fp32 without tensor parallelism "
            f"(precision={run.precision}, parallel.tensor={run.parallel.tensor}): DeepSpeed's "
            "stage 0 reports a wrong gradient norm otherwise. Use zero_stage: 1."
        )
    if run.device == "cpu" and (run.kernels.full in _CUDA or run.kernels.windowed in _CUDA):
        name = "full" if run.kernels.full in _CUDA else "windowed"
        yield (f"kernels.{name}={getattr(run.kernels, name)} needs CUDA (device=cpu). Use auto.")


def _sinks(run: RunConfig) -> Iterator[str]:
    """A kernel that gives no sums of its scores has nothing to put learned sinks around."""
    for name, scheme in run.model.layer_plan.schemes.items():
        field = "full" if scheme.reach is None else "windowed"
        if scheme.sink and getattr(run.kernels, field) in WITHOUT_SINKS:
            yield (
                f"kernels.{field}={getattr(run.kernels, field)} has no learned sinks "
                f"(model.layer_plan.schemes.{name}.sink). Use auto, or leave sink out."
            )


# The registry's kernels that have none: a test holds them together.
WITHOUT_SINKS = ("cudnn", "cudnn_frontend", "flex", "fa3", "fa4")
_CUDA = ("cudnn", "cudnn_frontend", "varlen", "flex", "fa3", "fa4")


def _lengths(run: RunConfig, stage: Stage, where: str) -> Iterator[str]:
    tensor = run.parallel.tensor
    for length in stage.lengths:
        # A degree that the heads refuse needs no second reason; with context ranks, it is theirs.
        alone = run.parallel.context_degree(length) == 1
        if length % tensor and run.model.num_heads % tensor == 0 and alone:
            yield (
                f"{where}.lengths names {length}, which parallel.tensor={tensor} does not divide "
                "(each tensor rank holds a part of the sequence). "
                f"Use a multiple of {tensor}."
            )
        if stage.micro_batch_tokens % length:
            yield (
                f"{where}.micro_batch_tokens={stage.micro_batch_tokens} is not a multiple of "
                f"{length} ({where}.lengths). {nearest_multiples(stage.micro_batch_tokens, length)}"
            )
    longest = max(stage.lengths)
    if run.data.block_tokens < longest:
        yield (
            f"data.block_tokens={run.data.block_tokens} is shorter than the longest length "
            f"({where}.lengths names {longest}). Use at least {longest}."
        )


def _batches(stage: Stage, where: str, data_degree: int | None) -> Iterator[str]:
    batch = stage.batch_tokens
    values = {f"{where}.batch_tokens": batch}
    if isinstance(batch, BatchRamp):
        values = {
            f"{where}.batch_tokens.{n}": getattr(batch, n) for n in ("start", "end", "increment")
        }
    for name, value in values.items():
        assert isinstance(value, int)
        for length in stage.lengths:
            if value % length:
                yield (
                    f"{name}={value} is not a multiple of {length} ({where}.lengths). "
                    f"{nearest_multiples(value, length)}"
                )
        per_pass = (data_degree or 1) * stage.micro_batch_tokens
        if value % per_pass:
            factors = f"{where}.micro_batch_tokens={stage.micro_batch_tokens}"
            if data_degree is not None:
                factors = f"{data_degree} data ranks times {factors}"
            yield (
                f"{name}={value} is not a multiple of {per_pass} ({factors}). "
                f"{nearest_multiples(value, per_pass)}"
            )
    first = batch.start if isinstance(batch, BatchRamp) else batch
    if stage.tokens < first:
        yield (
            f"{where}.tokens={stage.tokens} is less than one batch "
            f"({where}.batch_tokens={first}). Use at least {first}."
        )


def _gates(run: RunConfig, stage: Stage, where: str) -> Iterator[str]:
    for index, gate in enumerate(stage.gates):
        match gate:
            case LossGate():
                name, known, field = gate.set, list(run.data.held_out), "set"
                place = "data.held_out"
            case SuiteGate():
                name, known, field = gate.suite, list(run.evaluate.suites), "suite"
                place = "evaluate.suites"
            case never:
                assert_never(never)
        if name not in known:
            yield (
                f"{where}.{index}.{field} names '{name}', which {place} does not define."
                f"{did_you_mean(name, known)}"
            )


def _budget(run: RunConfig, index: int, data_degree: int | None) -> Iterator[str]:
    """A budget that no recomputation meets; only the number of ranks can tell."""
    if not isinstance(run.stages[index].recompute, RecomputeBudget):
        return
    if (layers := run.model.layer_plan.num_layers) > limits.BUDGET_LAYERS:
        yield (
            f"stages.{index}.recompute.budget_gib is solved for {limits.BUDGET_LAYERS:,} layers at "
            f"most (model.layer_plan.num_layers={layers:,}). Name a policy."
        )
        return
    if data_degree is None:
        return
    try:
        policies_of(run, index, data_degree)
    except ConfigError as error:
        yield from str(error).splitlines()


def _sources(run: RunConfig, stage: Stage, where: str) -> Iterator[str]:
    known = run.data.sources
    for name in stage.weights:
        if name not in known:
            yield (
                f"{where}.weights names '{name}', which data.sources does not define "
                f"({few(known)}).{did_you_mean(name, known) or ' Define it, or remove it.'}"
            )


def _scheme_overrides(run: RunConfig) -> list[str]:
    lines: list[str] = []
    plan = run.model.layer_plan
    for index, stage in enumerate(run.stages):
        where = f"stages.{index}.schemes"
        for name, fields in stage.schemes.items():
            try:
                plan = plan.with_overrides({name: fields}, where=where)
            except ConfigError as error:
                lines += str(error).splitlines()
        changed = {name: plan.schemes[name] for name in stage.schemes if name in plan.schemes}
        lines += rotation_problems(changed, run.model.head_dim, where)
        try:
            parts = stretches(stage.anneal, plan, stage.tokens, f"stages.{index}.anneal")
        except ConfigError as error:
            lines += str(error).splitlines()
        else:
            lines += _anneal_steps(run, index, parts)
            plan = parts[-1].plan
    return lines


def _anneal_steps(run: RunConfig, index: int, parts: tuple[PlanStretch, ...]) -> Iterator[str]:
    """Every value on the way is trained with, the last one too."""
    total, anneal = run.stage_plan.stage_steps[index], run.stages[index].anneal
    begins = [run.stage_plan.first_step(index, part.tokens) for part in parts] + [total]
    for part, begin, end in zip(parts, begins[:-1], begins[1:], strict=True):
        if begin == end and anneal is not None:
            yield (
                f"stages.{index}.anneal.steps={anneal.steps} leaves what holds from token "
                f"{part.tokens} of the stage without a step of training (the stage has {total} "
                "steps). Use fewer steps, or smaller batches."
            )
            return
