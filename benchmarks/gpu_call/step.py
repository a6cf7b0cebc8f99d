"""Our own step, the one that `megahybrid train` takes: DeepSpeed, ZeRO 1, fp32 sums of gradients,
clipping, AdamW on fp32 masters."""

import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import recompute
from benchmarks.documents import document_lengths
from benchmarks.gpu_call.setting import Setting, fits
from benchmarks.shapes import full, hybrid
from benchmarks.steps import engine_step, our_model
from benchmarks.timing import synchronise, timed
from megahybrid.config.counting import flops_per_token, training_flops
from megahybrid.config.model import ModelConfig
from megahybrid.model.kernels import Documents
from megahybrid.model.transformer import Transformer
from megahybrid.parallel import vocab

PEAK, REACHABLE = 989e12, 790e12  # the data sheet's dense bf16, and what large products reach
# Of the card, for the policy: the rest is fragments and work space. Less where it did not fit.
MEMORY_SHARES = (0.86, 0.74, 0.6, 0.4)
WARM_UP = 3


def model_of(setting: Setting, kind: str) -> ModelConfig:
    """The model of a kind of step."""
    if kind == "full":
        return full(setting.shape)
    config = setting.hybrid()
    if kind == "sequential":
        return config.model_copy(update={"block": "pre_norm"})
    if kind == "sequential-rms":
        return config.model_copy(update={"block": "pre_norm", "norm": "rms"})
    if kind == "8b":
        return hybrid("tiny" if setting.rehearsal else "8b")
    return config


def measured(
    setting: Setting,
    kind: str,
    length: int,
    steps: int,
    *,
    packed: bool = False,
    offload: str = "none",
    loss_part: int | None = None,
    profile: Path | None = None,
) -> dict[str, Any]:
    """One row: warm-up, then `steps` timed steps, after them two profiled ones where asked for.

    Takes the cheapest recompute policy that the formulas say fits, and a cheaper one in memory
    where it did not.
    """
    config = model_of(setting, kind)
    tokens, targets = setting.batch(config, length)
    starts, lengths = None, [[length]] * len(tokens)
    if packed:
        lengths = [document_lengths(length, seed) for seed in range(len(tokens))]
        starts = Documents.from_lengths(lengths).starts
    if loss_part is not None:
        vocab.LOSS_PARTS = max(1, 2048 // loss_part)
    rows = 1 if offload != "none" else setting.micro_rows_of(length)
    for share in MEMORY_SHARES:
        budget = share * setting.memory
        policies = recompute.solve(config, rows * length, budget, length, offload)
        step = engine_step(
            built(setting, config, length, policies), tokens, targets, "bf16", rows, offload, starts
        )
        if fits(lambda step=step: [step() for _ in range(WARM_UP)]):
            break
        del step
        setting.free()
    else:
        return {"step": kind, "length": length, "left_out": "does not fit under any policy"}
    synchronise(setting.device)
    walls = [timed(step, setting.device)[0] for _ in range(steps)]
    if profile is not None:
        with profiled(profile):
            for _ in range(2):
                step()
            synchronise(setting.device)
    speed = tokens.numel() / statistics.median(walls)
    flops = (
        training_flops(config, [n for row in lengths for n in row]) / tokens.numel()
        if packed
        else flops_per_token(config, length)
    )
    return {
        "step": kind,
        "length": length,
        "packed": packed,
        "offload": offload,
        "loss_part": loss_part,
        "blocks": "compiled" if setting.compiled else "plain",
        "kernels": setting.kernels.get(length, {}),
        "recompute": tally(policies),
        "micro_batches": len(tokens) // rows,
        "tokens_per_step": tokens.numel(),
        "steps": len(walls),
        "tokens_per_second": speed,
        "mfu_989": speed * flops / PEAK,
        "mfu_790": speed * flops / REACHABLE,
        "peak_gib": setting.peak_gib(),
        "walls": walls,
    }


def built(setting: Setting, config: ModelConfig, length: int, policies: list[str]) -> Transformer:
    """Our model on the kernels of this length, with plain or compiled blocks."""
    kernels = setting.kernels_of_layers(config, length)
    model = our_model(config, setting.device, setting.dtype, policies, kernels)
    if setting.compiled:
        model.compile_blocks("aot_eager" if setting.rehearsal else "inductor")
    return model


@contextlib.contextmanager
def profiled(path: Path) -> Iterator[None]:
    """A table of where the time goes, by kernel, in `path`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        yield
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90))


def tally(policies: list[str]) -> str:
    """'selective 13, full 3'."""
    return ", ".join(f"{name} {policies.count(name)}" for name in dict.fromkeys(policies))
