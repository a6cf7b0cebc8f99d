"""Kernels of a stage, chosen by measurement: attention, blocks, and on a CPU products."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megahybrid.config import RunConfig
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.context_plan import fewer_queries, plan_context
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.memory_estimate import policies_of
from megahybrid.config.model import ModelConfig
from megahybrid.config.stages import Recompute
from megahybrid.errors import AuditError
from megahybrid.ledger import EventSink, KernelsEvent
from megahybrid.model.block import BLOCKS
from megahybrid.model.compiled import prepare_compiler
from megahybrid.model.context import SequenceContext
from megahybrid.model.kernels.choice import (
    KINDS,
    Results,
    Workload,
    candidates,
    demand_agreement,
    fastest,
    kinds_with_sinks,
    least_seconds,
    measure,
    why_it_failed,
)
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.recompute import run_block
from megahybrid.model.selftest import HeadShape, run_self_test
from megahybrid.parallel import matmul
from megahybrid.parallel.collectives import on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train import cpu_kernels
from megahybrid.train.stage_model import compiled_whole, head_shape


def choose_kernels(
    run: RunConfig, index: int, mesh: ParallelMesh, chosen: ChosenKernels, tell: EventSink
) -> ChosenKernels:
    """`chosen` (see `resolve_kernels`) with what stage `index` has by measurement; collective.

    Nothing is measured where the run file names a kernel, where a checkpoint's choice was measured
    at this length, or where a device has one kernel and the stage is short. Rank 0 measures for
    all: ranks with different kernels would not be replicas of each other.
    """
    length = max(run.stages[index].lengths)
    if (words := exchanges_in_words(run, index)) != chosen.exchange:
        chosen = replace(chosen, exchange=words)
    if chosen.length == length:
        return chosen
    if mesh.device.type == "cuda":
        found = on_first(mesh.world, lambda: _measured(run, index, length, mesh, chosen))
    elif asked := cpu_kernels.to_measure(run, index, mesh):
        work = workload(run, index, length, mesh)
        found = on_first(
            mesh.world, lambda: _measured_on_cpu(run, index, work, mesh, chosen, asked)
        )
    else:
        return chosen
    result = replace(chosen, **found["chosen"], length=length)
    if found["seconds"]:
        tell(KernelsEvent(length=length, **found["seconds"]))
    return result


def _measured(
    run: RunConfig, index: int, length: int, mesh: ParallelMesh, before: ChosenKernels
) -> dict[str, Any]:
    work = workload(run, index, length, mesh)
    schemes = {
        f"{name} ({'near' if number == 0 else 'far'})" if scheme.near is not None else name: view
        for name, scheme in run.plan_at(index).schemes.items()
        for number, view in enumerate(scheme.views())
    }
    chosen: dict[str, str] = {}
    seconds: dict[str, Any] = {}
    for kind in KINDS:
        these = {n: s for n, s in schemes.items() if (s.reach is None) == (kind == "full")}
        if not these or getattr(run.kernels, kind) != "auto":
            continue
        fewer = kind in fewer_queries_in(run, index)
        where = (work.device, work.dtype, work.head_dim, 1 if fewer else None)
        names = candidates(kind, *where, bool(kinds_with_sinks(these.values())))
        if len(names) > 1:
            times = measure_tested(names, these, work, run.parallel.context_degree(length), fewer)
            seconds[kind] = _told(times)
            chosen[kind] = fastest(times) or names[0]
    if run.kernels.blocks == "auto":
        kinds = {kind: chosen.get(kind, getattr(run.kernels, kind)) for kind in KINDS}
        kernels = replace(before, **kinds)
        policies = policies_of(run, index, mesh.data.size)
        times = measure_blocks(run, run.plan_at(index), work, kernels, policies)
        seconds["blocks"] = _told(times)
        chosen["blocks"] = fastest(times) or "plain"
    return {"chosen": chosen, "seconds": seconds}


def _measured_on_cpu(
    run: RunConfig,
    index: int,
    work: Workload,
    mesh: ParallelMesh,
    before: ChosenKernels,
    asked: Sequence[str],
) -> dict[str, Any]:
    facts = cpu_kernels.machine_facts(work)
    chosen: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if "products" in asked:
        shapes = cpu_kernels.product_shapes(run)
        answer = cpu_kernels.decided(
            "products",
            facts | {"shapes": shapes},
            matmul.usual_routine(),
            lambda: cpu_kernels.measure_products(shapes, work.rows * work.length),
        )
        chosen["products"], told["products"] = str(answer["choice"]), answer["because"]
    if "blocks" in asked:
        plan, policies = run.plan_at(index), policies_of(run, index, mesh.data.size)
        layer = {"model": run.model.model_dump(mode="json"), "length": work.length}
        kernels = replace(before, **chosen)
        assert kernels.products is not None
        matmul.use(kernels.products)  # a compiled layer has its own products or torch's
        answer = cpu_kernels.decided(
            "blocks",
            facts | layer | {"products": kernels.products, "policies": sorted(set(policies))},
            "plain",
            lambda: measure_blocks(run, plan, work, kernels, policies),
        )
        chosen["blocks"], told["blocks"] = str(answer["choice"]), answer["because"]
    return {"chosen": chosen, "seconds": told}


def workload(run: RunConfig, index: int, length: int, mesh: ParallelMesh) -> Workload:
    """One rank's micro batch of the stage at this length: with context ranks its part of each
    row."""
    heads, parallel = head_shape(run, mesh), run.parallel
    tokens = run.stages[index].micro_batch_tokens // parallel.context_axis
    here = length // parallel.context_degree(length)
    return Workload(
        rows=max(1, tokens // here),
        length=here,
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        dtype=heads.dtype,
        device=heads.device,
        documents=run.data.documents == "masked",
    )


def fewer_queries_in(run: RunConfig, index: int) -> set[str]:
    """Return the kinds of layers that meet fewer queries than keys somewhere in stage `index`."""
    plans = [part.plan for part in run.plans[index]]
    found = (
        fewer_queries(run.model, run.parallel, plan, length)
        for plan in plans
        for length in run.stages[index].lengths
    )
    return set().union(*found)


def exchanges_in_words(run: RunConfig, index: int) -> str | None:
    """Return what context ranks send one another in stage `index`; None where none share a row."""
    if run.parallel.context_axis == 1:
        return None
    plan, lengths = run.plan_at(index), sorted(run.stages[index].lengths)
    crossing = (plan_context(run.model, run.parallel, plan, length) for length in lengths)
    return "; ".join(each.in_words() for each in crossing)


def crossing_shards(work: Workload, window: int | None, degree: int, fewer: bool) -> Workload:
    """Return what a kernel computes of `work`, a rank's part of rows, once the exchange is made:
    its queries with the keys before them, the last rank's, or the whole rows for some heads."""
    if degree == 1:
        return work
    if not fewer:
        kv_heads = max(1, work.kv_heads // degree)
        length = work.length * degree
        return replace(work, length=length, heads=work.heads // degree, kv_heads=kv_heads)
    before = work.length * (degree - 1)
    before = before if window is None else min(window - 1, before)
    return replace(work, before=before)


def measure_tested(
    names: list[str],
    schemes: dict[str, AttentionScheme],
    work: Workload,
    degree: int = 1,
    fewer: bool = False,
    **clock: Any,
) -> dict[str, float | str]:
    """`measure` of the kernels that every scheme of the kind passes its self-test on, at the widest
    window; of the others, what they violate. `degree` context ranks share a row, and `fewer` says
    whether the kernel then meets fewer queries than keys."""
    widest = max((scheme.reach or 0 for scheme in schemes.values()), default=0)
    heads = HeadShape(work.heads, work.kv_heads, work.head_dim, work.dtype, work.device)
    passed, found = [], {}
    for name in names:
        try:
            run_self_test(schemes, heads, dict.fromkeys(schemes, name), rank=0)
        except AuditError as error:
            found[name] = str(error)
        except Exception as error:  # it does not run there
            found[name] = why_it_failed(error)
        else:
            passed.append(name)
    crossing = crossing_shards(work, widest or None, degree, fewer)
    return found | measure(passed, widest or None, crossing, **clock)


def measure_blocks(
    run: RunConfig,
    plan: LayerPlan,
    work: Workload,
    kernels: ChosenKernels,
    policies: Sequence[Recompute],
) -> dict[str, float | str]:
    """Seconds of forward and backward of one layer as written and compiled: whole where that can
    be (see `Transformer.compile_blocks`), else its pieces, on one tensor rank's heads and part of
    the MLP and without collectives. It is the first layer of the commonest recompute policy. Why it
    is not chosen, where a layer does not run, or compiled gives other gradients than as written."""
    ((policy, _),) = Counter(policies).most_common(1)
    scheme = plan.expand()[policies.index(policy)]
    mesh = ParallelMesh.single(work.device)
    found: dict[str, float | str] = {}
    block = BLOCKS[run.model.block](
        0, _of_one_rank(run, work), scheme, mesh, kernels.of(scheme), policy, norm=run.kernels.norm
    ).to(work.dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=run.model.initial_std)
    shape = (work.length, work.rows, run.model.hidden_size)
    hidden = torch.randn(shape, device=work.device, dtype=work.dtype).requires_grad_()
    slope = torch.ones_like(hidden)
    inputs = {"input": hidden, **dict(block.named_parameters())}

    def step() -> Results:
        context = SequenceContext(work.length, None, work.device, work.dtype)
        out = run_block(block, hidden, context, policy)
        grads = torch.autograd.grad(out, tuple(inputs.values()), slope)
        return {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}

    first: Results = {}
    for name in ("plain", "compiled"):
        try:
            if name == "compiled":
                prepare_compiler()
                block.compile_pieces("inductor")
                if compiled_whole(run):
                    block.compile_regions("inductor")
            seconds = least_seconds(step, work.device)
            gradients = step()
            first = first or gradients
            demand_agreement(gradients, first, "the plain layer's")
            found[name] = seconds
        except Exception as error:  # no compiler there, or one that cannot: then it is not chosen
            found[name] = why_it_failed(error)
    return found


def _of_one_rank(run: RunConfig, work: Workload) -> ModelConfig:
    """A model of one process whose layers have the heads and the MLP that a tensor rank has."""
    local = {
        "num_heads": work.heads,
        "num_kv_heads": work.kv_heads,
        "intermediate_size": run.model.intermediate_size // run.parallel.tensor,
    }
    return run.model.model_copy(update=local)


def _told(found: dict[str, float | str]) -> str:
    """ "varlen 1.234 ms, flex 2.345 ms, fa3: why it did not run"."""
    return ", ".join(
        f"{name} {value * 1e3:.3f} ms" if isinstance(value, float) else f"{name}: {value}"
        for name, value in found.items()
    )
