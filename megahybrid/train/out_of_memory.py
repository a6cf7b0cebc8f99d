"""Out of memory, in one line: what was measured against what was planned, and what to change."""

import torch

from megahybrid.config import RunConfig
from megahybrid.config.context_memory import context_memory
from megahybrid.config.memory_estimate import memory_per_rank
from megahybrid.train.metrics import memory_gib

# What torch's allocator for the CPU says, as a plain RuntimeError.
_CPU_WORDS = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or the machine had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _CPU_WORDS)


def explain_out_of_memory(run: RunConfig, rank: int, world_size: int) -> str:
    """The line for the user. The plan is that of the stage that needs most."""
    tensor = run.parallel.tensor
    plans = [
        memory_per_rank(
            run.model,
            stage,
            tensor=tensor,
            data_degree=max(1, run.parallel.data_degree(world_size)),
            zero_stage=run.parallel.zero_stage,
            precision=run.precision,
            offload=run.parallel.offload,
            context=context_memory(run, index),
        )
        for index, stage in enumerate(run.stages)
    ]
    index = max(range(len(plans)), key=lambda number: plans[number].total)
    plan, stage = plans[index], run.stages[index]
    parts = ", ".join(
        f"{name} {getattr(plan, name) / 2**30:.1f}"
        for name in ("weights", "gradients", "optimizer", "activations", "working")
    )
    host = ", or set parallel.offload: moments" if run.parallel.offload == "none" else ""
    return (
        f"rank {rank}: out of memory at a peak of {memory_gib(_device()):.1f} GiB{_there()}; stage "
        f"{stage.name} needs {plan.total / 2**30:.1f} GiB by plan ({parts}). Lower "
        f"stages.{index}.micro_batch_tokens={stage.micro_batch_tokens}, set stages.{index}."
        f"recompute: full, or raise parallel.tensor={tensor}{_or_context(run)} or "
        f"parallel.zero_stage={run.parallel.zero_stage}{host}."
    )


def _or_context(run: RunConfig) -> str:
    """The context degree, where the run has one: rows can be cut further without more tokens."""
    axis = run.parallel.context_axis
    return f", parallel.context={axis}" if axis > 1 else ""


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_initialized() else "cpu")


def _there() -> str:
    if not torch.cuda.is_initialized():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f" (the device has {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free)"
