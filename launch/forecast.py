"""The forecast of a run on an allocation, for `check`, `submit` and its dry run."""

import math

from megahybrid.config import RunConfig
from megahybrid.launch.job import Job
from megahybrid.launch.records import measured, newest_ledger_lines


def forecast(job: Job, run: RunConfig) -> list[str]:
    """Degrees, memory per GPU, time and checkpoints, one fact a line."""
    return [*_degrees(job, run), *_memory(job, run), *_time(job, run)]


def _degrees(job: Job, run: RunConfig) -> list[str]:
    site, tensor, axis = job.site, run.parallel.tensor, run.parallel.context_axis
    context = f"context {axis}, " if axis > 1 else ""
    units = f"{site.gpus_per_node} GPUs" if site.gpus_per_node else f"{site.ranks} ranks"
    lines = [
        f"{job.nodes} nodes × {units} = {job.world_size} ranks: tensor {tensor}, {context}data "
        f"{run.parallel.data_degree(job.world_size)}, ZeRO stage {run.parallel.zero_stage}"
        + (f"; {job.spares} more nodes stand by" if job.spares else "")
    ]
    if site.gpus_per_node and site.ranks < site.gpus_per_node:
        lines[0] = lines[0].replace(units, f"{site.ranks} of {units}")
        lines.append(
            f"warning: ranks_per_node={site.ranks} leaves {site.gpus_per_node - site.ranks} of "
            f"{site.gpus_per_node} GPUs of each node idle."
        )
    if site.ranks % tensor:
        lines.append(
            f"warning: parallel.tensor={tensor} does not divide the {site.ranks} ranks of a node: "
            "tensor groups will span nodes, over the slower network."
        )
    elif axis > 1:
        lines.append(_context(site.ranks, run))
    return lines


def _context(ranks: int, run: RunConfig) -> str:
    """Say whether context groups, which are neighbouring ranks, stay inside nodes of `ranks`."""
    tensor, axis = run.parallel.tensor, run.parallel.context_axis
    group = tensor * axis
    if ranks % group == 0:
        return f"context groups of {axis} ranks stay inside nodes"
    if group % ranks == 0:
        return (
            f"warning: parallel.tensor={tensor} times {axis} context ranks are more than the "
            f"{ranks} ranks of a node: each context group spans {group // ranks} neighbouring "
            "nodes, over the slower network."
        )
    return (
        f"warning: parallel.tensor={tensor} times {axis} context ranks neither divides nor is a "
        f"multiple of the {ranks} ranks of a node: some context groups will span more nodes than "
        "they need."
    )


def _memory(job: Job, run: RunConfig) -> list[str]:
    there = job.site.gpu_memory_gib
    from megahybrid.config.describe import describe

    lines = []
    for stage in describe(run, job.world_size)["stages"]:
        needed = stage["memory_per_rank"][run.parallel.zero_stage]["total"] / 2**30
        warning = "warning: " if there is not None and needed > there else ""
        what = "GPU" if job.site.gpus_per_node else "rank"
        has = "" if there is None else f", {there:g} GiB there"
        lines.append(f"{warning}stage {stage['name']}: {needed:.3g} GiB per {what} by plan{has}")
    return lines


def _time(job: Job, run: RunConfig) -> list[str]:
    jobs = job.array or job.chain
    lines = [
        f"time limit {job.site.time_limit}: stops {job.lead_seconds} s before it"
        + (f", up to {jobs} jobs in a row" if jobs > 1 else "")
    ]
    known = measured(job.directory)
    rate, plan = known.tokens_per_hour, run.stage_plan
    ends = zip(run.stages, plan.stage_ends, strict=True)
    if rate is None:
        return [
            *lines,
            *(f"  stage {stage.name} ends at {end:,} tokens" for stage, end in ends),
            f"no rate measured yet in {job.directory}: hours are not known",
        ]
    done = next((x.tokens for x in newest_ledger_lines(job.directory) if x.tokens), 0)
    left = max(0, plan.total_tokens - done)
    useful = job.site.job_seconds - job.lead_seconds
    lines.append(
        f"{rate / 1e6:.2f} M tokens per hour as last measured: {left / rate:.1f} h for "
        f"{left:,} of {plan.total_tokens:,} tokens"
        + f", {_count(math.ceil(left / rate * 3600 / useful), 'job')} of this length"
    )
    for stage, end in ends:
        ahead = f"in {(end - done) / rate:.1f} h" if end > done else "done"
        lines.append(f"  stage {stage.name} ends at {end:,} tokens, {ahead}")
    if known.step_seconds:
        steps = useful / known.step_seconds
        lines.append(
            f"about {steps:.0f} steps and {steps / run.checkpoint.every_steps:.0f} checkpoints "
            "within the time limit"
        )
    return lines


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
