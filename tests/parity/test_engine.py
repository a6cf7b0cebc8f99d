"""Training through DeepSpeed is the plain training loop: fp32, every degree and ZeRO stage."""

from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megahybrid.config.model import ModelConfig
from megahybrid.config.run import RunConfig
from tests import distributed
from tests.parity.cases import BLOCKS, FAMILIES, NORMS, model
from tests.plain_model import random_tensors, relative_error
from tests.plain_training import (
    MicroBatch,
    PlainRun,
    global_norm,
    plain_adamw_run,
    plain_decay,
    plain_kind,
    plain_multiplier,
    random_batch,
)

BOUND = 1e-5
SEQ, ROWS, STEPS = 16, 2, 5
LEARNING_RATE, EPS, CLIP_NORM = 1e-3, 1e-5, 0.5
RATES = (4e-4, LEARNING_RATE, 7e-4, LEARNING_RATE, 2e-4)  # of the five steps
# Far below every matrix here and above every norm weight: ZeRO-3 really cuts what it would cut.
PERSISTENT_ELEMENTS = 64


@dataclass(frozen=True)
class Case:
    """One engine: a model and the way it is spread over ranks."""

    config: ModelConfig
    tensor: int = 1
    data: int = 1
    zero_stage: int = 1
    accumulation: int = 1
    recompute: str = "none"
    precision: str = "fp32"
    seed: int = 0
    compiler: str | None = None
    seq: int = SEQ
    whole_rows: bool = False  # of every second micro-batch: each is one document
    device: str = "cpu"
    context: int = 1
    exchange: tuple[tuple[str, str], ...] = ()
    z_loss: float | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data

    def mesh(self, ranks: distributed.Ranks) -> Any:
        return ranks.mesh(self.tensor, self.context)

    def run_config(self) -> RunConfig:
        tokens = ROWS * self.seq
        return RunConfig.model_validate(
            {
                "model": self.config,
                "parallel": {
                    "tensor": self.tensor,
                    "context": self.context,
                    "exchange": dict(self.exchange),
                    "zero_stage": self.zero_stage,
                },
                "data": {"sources": {"text": {"path": "unused"}}, "block_tokens": 1024},
                "optimizer": {"eps": EPS, "clip_norm": CLIP_NORM},
                "z_loss": self.z_loss,
                "stages": [
                    {
                        "name": "only",
                        "tokens": tokens,
                        "lengths": {self.seq: 1},
                        "batch_tokens": tokens,
                        "micro_batch_tokens": tokens,
                        "weights": {"text": 1},
                        "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-3},
                    }
                ],
                "precision": self.precision,
                "device": self.device,
            }
        )

    def first_tensors(self) -> dict[str, Tensor]:
        """First weights, in fp32; for a bf16 run numbers that bf16 has, so that rounding them once
        is no part of the error."""
        tensors = random_tensors(self.config, self.seed, torch.float32)
        if self.precision == "fp32":
            return tensors
        return {name: tensor.detach().bfloat16().float() for name, tensor in tensors.items()}

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """All of a step, those of data rank 0 first; how many targets count varies widely."""
        return [
            random_batch(
                self.config.vocab_size,
                ROWS,
                self.seq,
                seed=1000 * self.seed + 10 * step + index,
                ignored=(0.1, 0.95, 0.5, 0.8)[(step + index) % 4],
                documents=not (self.whole_rows and index % 2),
            )
            for index in range(self.data * self.accumulation)
        ]


@dataclass
class RankRun:
    """What one rank reports."""

    losses: list[float]
    norms: list[float]
    norms_by_kind: list[dict[str, float]]
    # (canonical name, box, the first step's gradient there)
    first_gradients: list[tuple[str, tuple[tuple[int, int], ...], Tensor]]
    # (canonical name, box, range of the flattened box, master weights there)
    weights: list[tuple[str, tuple[tuple[int, int], ...], tuple[int, int], Tensor]]


def engine_run(ranks: distributed.Ranks, case: Case, steps: int = STEPS) -> RankRun:
    """Train `case` on this rank, with the audit on."""
    from deepspeed.utils import safe_get_full_grad

    from megahybrid.train.engine import Engine, engine
    from megahybrid.train.engine import MicroBatch as EngineMicroBatch

    built = build(ranks, case, Engine, engine)
    result = RankRun([], [], [], [], [])
    audit = engine.audit_gradients

    def audit_and_keep(parameters: Any, mesh: Any) -> Any:
        for parameter, spec in parameters.values():
            gradient = safe_get_full_grad(parameter).cpu().reshape(-1)
            for segment, start, stop in spec.flat_ranges():
                kept = gradient[start:stop].clone()
                result.first_gradients.append((segment.name, spec.box(segment), kept))
        return audit(parameters, mesh)

    mine = case.mesh(ranks).data.rank * case.accumulation
    for step in range(steps):
        share = case.micro_batches(step)[mine : mine + case.accumulation]
        device = case.mesh(ranks).device
        batches = [
            EngineMicroBatch(each.tokens.to(device), each.targets.to(device), each.starts)
            for each in share
        ]
        observer = audit_and_keep if step == 0 else audit
        with mock.patch.object(engine, "audit_gradients", observer):
            update = built.train_step(batches, RATES[step], audit=True)
        assert not update.skipped
        result.losses.append(update.loss)
        result.norms.append(update.gradient_norm)
        result.norms_by_kind.append(update.gradient_norm_by_kind)
    for fragment in built.fragments():
        if fragment.state == "weight":
            values = torch.from_numpy(fragment.data.copy())
            result.weights.append((fragment.tensor, fragment.box, fragment.flat, values))
    built.close()
    return result


def build(ranks: distributed.Ranks, case: Case, engine_type: Any, module: Any) -> Any:
    """The engine of `case`, with ZeRO-3 cutting even these small matrices."""
    from megahybrid.model.row_shards import ContextRanks
    from megahybrid.model.transformer import Transformer

    layers, run, mesh = case.config.layer_plan.num_layers, case.run_config(), case.mesh(ranks)
    ours = Transformer(
        case.config,
        mesh,
        recompute=(case.recompute,) * layers,
        compiler=case.compiler,
        keeps_weights=case.zero_stage < 3,
        context=ContextRanks(mesh, case.config, run.parallel),
    )
    ours.load_canonical(case.first_tensors())
    settings = module.engine_settings

    def cutting(*args: Any) -> dict[str, Any]:
        made = settings(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        return made

    with mock.patch.object(module, "engine_settings", cutting):
        return engine_type(ours, run, mesh)


def engine_runs(ranks: distributed.Ranks, cases: list[Case]) -> list[RankRun]:
    """Several engines, one after the other, in the same processes."""
    return [engine_run(ranks, case) for case in cases]


def plain_run(case: Case) -> PlainRun:
    """The truth, in float64."""
    tensors = {name: value.detach().double() for name, value in case.first_tensors().items()}
    optimizer = case.run_config().optimizer
    return plain_adamw_run(
        case.config,
        tensors,
        [case.micro_batches(step) for step in range(STEPS)],
        RATES,
        betas=optimizer.betas,
        eps=EPS,
        weight_decay=optimizer.weight_decay,
        clip_norm=CLIP_NORM,
        decay=plain_decay,
        multiplier=plain_multiplier,
        z_loss=case.z_loss or 0.0,
    )


def joined_weights(runs: list[RankRun], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' fragments; each element must come exactly once."""
    whole = {name: torch.zeros_like(value) for name, value in like.items()}
    times = {name: torch.zeros_like(value) for name, value in like.items()}
    for run in runs:
        for name, box, (start, stop), values in run.weights:
            place = tuple(slice(*bounds) for bounds in box)
            for target, source in ((whole, values), (times, torch.ones_like(values))):
                part = target[name][place].contiguous()
                part.view(-1)[start:stop] += source.to(part.dtype)
                target[name][place] = part
    for name, count in times.items():
        assert (count == 1).all(), f"{name} is not covered exactly once"
    return whole


def errors(case: Case, runs: list[RankRun], truth: PlainRun) -> dict[str, float]:
    """Relative errors of all that is compared, of the worst rank."""
    found: dict[str, float] = {}

    def note(what: str, error: float) -> None:
        found[what] = max(found.get(what, 0.0), error)

    for run in runs:
        for step in range(STEPS):
            note(f"loss {step}", abs(run.losses[step] / truth.losses[step] - 1))
            note(f"norm {step}", abs(run.norms[step] / truth.norms[step] - 1))
        for kind, norm in norms_by_kind(case, truth).items():
            size = norm or 1.0
            note(f"norm of {kind}", abs(run.norms_by_kind[0][kind] - norm) / size)
        seen = set()
        for name, box, gradient in run.first_gradients:
            whole = truth.first_gradients[name]
            part = whole[tuple(slice(*bounds) for bounds in box)].reshape(-1)
            size = whole.norm().item()
            if size < 1e-9 * truth.norms[0]:  # a query that sees one key has no gradient at all
                size = truth.norms[0]
            if name.endswith("key.bias"):
                # What a softmax gives all keys together is zero: this is a small rest of large
                # terms, which those of the weight are a measure of.
                of_weight = truth.first_gradients[name.removesuffix("bias") + "weight"]
                size = max(size, of_weight.norm().item())
            note(f"gradient of {name}", (gradient - part).norm().item() / size)
            seen.add(name)
        assert seen == truth.first_gradients.keys()
    for name, weight in joined_weights(runs, truth.weights).items():
        note(f"weight {name}", relative_error(weight, truth.weights[name]))
    return found


def norms_by_kind(case: Case, truth: PlainRun) -> dict[str, float]:
    """The first gradient's norm by the table's kinds."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, gradient in truth.first_gradients.items():
        kinds.setdefault(plain_kind(name), {})[name] = gradient
    return {kind: global_norm(gradients) for kind, gradients in kinds.items()}


def covering_cases() -> dict[str, Case]:
    """tensor × data × ZeRO in full; families, blocks, norms, accumulation, recompute, KV heads and
    tying take shuffled turns so that each value is met at several degrees."""
    degrees = [*product((1, 2, 4), (1, 2), (1, 2, 3)), (1, 1, 0), (1, 2, 0)]
    # No family goes unmet: the cheapest degrees come again.
    degrees += degrees[: max(0, len(FAMILIES) - len(degrees))]
    draw = Random(4)

    def turns(values: Any) -> list[Any]:
        repeated = (list(values) * len(degrees))[: len(degrees)]
        return draw.sample(repeated, len(repeated))

    columns = zip(
        degrees,
        turns(FAMILIES),
        turns(BLOCKS),
        turns(NORMS),
        turns((1, 2)),
        turns(("none", "selective", "full")),
        turns((1, 2, 4)),
        turns((True, False)),
        strict=True,
    )
    cases = {}
    for seed, (degree, family, block, norm, accumulation, recompute, kv_heads, tied) in enumerate(
        columns
    ):
        tensor, data, zero_stage = degree
        name = f"tensor{tensor}-data{data}-zero{zero_stage}-accumulation{accumulation}"
        cases[f"{name}-{recompute}-{family}-{block}"] = Case(
            model(family, block, norm, kv_heads=kv_heads, tied=tied),
            *degree,
            accumulation,
            recompute,
            seed=seed,
        )
    return cases


CASES = covering_cases() | {
    # Far larger than anyone's, so that its part of the gradient is no rounding error.
    "z_loss-tensor2-data2-zero2": Case(
        model("rnope_swa", "pre_norm", "rms", tied=False), 2, 2, 2, 2, seed=90, z_loss=0.05
    ),
}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_five_steps_equal_the_plain_training_loop(world_size: int) -> None:
    cases = {name: case for name, case in CASES.items() if case.world_size == world_size}
    assert cases
    runs = distributed.run(world_size, engine_runs, list(cases.values()), timeout_seconds=240)
    wrong = []
    for index, (name, case) in enumerate(cases.items()):
        truth = plain_run(case)
        assert min(truth.norms) > CLIP_NORM  # clipping is active
        found = errors(case, [of_rank[index] for of_rank in runs], truth)
        wrong += [f"{e:.1e} {name}: {what}" for what, e in found.items() if not e <= BOUND]
    assert not wrong, "\n".join(sorted(wrong, reverse=True))


def bf16_cases() -> dict[str, tuple[Case, Case]]:
    """Parallel runs in bf16, each with a single process that sees the same micro batches."""
    parallel = {
        "tensor2-zero1": Case(model("rnope_swa", "parallel", "layernorm"), 2, 1, 1, 2),
        "data2-zero2": Case(model("rms-shared", "pre_norm", "rms", tied=False), 1, 2, 2),
        "tensor2-zero3": Case(model("projection", "post_norm", "rms"), 2, 1, 3, 2, "selective"),
        "tensor4-zero2": Case(model("rnope_swa", "pre_norm", "rms", kv_heads=2), 4, 1, 2),
        "tensor2-data2-zero3": Case(model("ssmax", "pre_norm", "rms"), 2, 2, 3, 1, "full"),
    }
    pairs = {}
    for name, case in parallel.items():
        case = replace(case, precision="bf16", seed=50)
        pairs[name] = (case, of_one_process(case))
    return pairs


def of_one_process(case: Case) -> Case:
    """The same micro batches on one rank."""
    alone = {"tensor": 1, "context": 1, "data": 1, "zero_stage": 1, "recompute": "none"}
    return replace(case, **alone, accumulation=case.data * case.accumulation)


def gradient_errors(runs: list[RankRun], truth: PlainRun) -> dict[str, float]:
    """The relative error of each matrix of the first gradient, and of all vectors together."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, box, part in run.first_gradients:
            whole = truth.first_gradients[name]
            expected = whole[tuple(slice(*bounds) for bounds in box)].reshape(-1)
            sums = found.setdefault(name if whole.dim() > 1 else "vectors", [0.0, 0.0])
            sums[0] += (part - expected).square().sum().item()
            sums[1] += expected.square().sum().item()
    return {name: (difference / size) ** 0.5 for name, (difference, size) in found.items()}


def whole_errors(case: Case, runs: list[RankRun], truth: PlainRun) -> dict[str, float]:
    """Relative errors of losses and norms over the steps, of the gradient and of the weights."""
    difference, size = 0.0, 0.0
    for run in runs:
        for name, box, part in run.first_gradients:
            place = tuple(slice(*bounds) for bounds in box)
            expected = truth.first_gradients[name][place].reshape(-1)
            difference += (part - expected).square().sum().item()
            size += expected.square().sum().item()
    weights = joined_weights(runs, truth.weights)
    names = sorted(weights)
    return {
        "losses": relative_error(torch.tensor(runs[0].losses), torch.tensor(truth.losses)),
        "norms": relative_error(torch.tensor(runs[0].norms), torch.tensor(truth.norms)),
        "gradient": (difference / size) ** 0.5,
        "weights": relative_error(
            torch.cat([weights[name].reshape(-1) for name in names]),
            torch.cat([truth.weights[name].reshape(-1) for name in names]),
        ),
    }


def test_bf16_is_no_further_from_the_truth_than_twice_a_single_process() -> None:
    bf16_is_close(bf16_cases())


def bf16_is_close(pairs: dict[str, tuple[Case, Case]]) -> None:
    """Train each parallel run, and the single process beside it, and compare their errors."""
    together: list[dict[str, float]] = []
    alone: list[dict[str, float]] = []
    singles = distributed.run(1, engine_runs, [single for _, single in pairs.values()])[0]
    for world_size in sorted({case.world_size for case, _ in pairs.values()}):
        chosen = [name for name, (case, _) in pairs.items() if case.world_size == world_size]
        runs = distributed.run(world_size, engine_runs, [pairs[name][0] for name in chosen])
        for index, name in enumerate(chosen):
            case, single = pairs[name]
            truth = plain_run(case)
            of_single = [singles[list(pairs).index(name)]]
            of_ranks = [of_rank[index] for of_rank in runs]
            alone.append(whole_errors(single, of_single, truth))
            together.append(whole_errors(case, of_ranks, truth))
            # A vector of eight numbers has an error of luck, in either run; a matrix has not.
            bounds = gradient_errors(of_single, truth)
            for what, error in gradient_errors(of_ranks, truth).items():
                assert error <= 2 * bounds[what], f"{name}: gradient of {what}"
            for what in ("gradient", "weights"):
                assert together[-1][what] <= 2 * alone[-1][what], f"{name}: {what}"
    # One number's rounding error is a matter of luck, so these are judged over all runs.
    for what in ("losses", "norms"):
        squares = [sum(found[what] ** 2 for found in side) for side in (together, alone)]
        assert squares[0] <= 4 * squares[1], what
