"""DeepSpeed, set up the same way everywhere. Import this before anything of deepspeed's."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megahybrid.config.run import RunConfig
from megahybrid.parallel.mesh import Axis

MUON = "deepspeed.runtime.zero.muon.original_muon"


def prepare_deepspeed(device: torch.device) -> None:
    """Choose the accelerator and switch off what hangs or shouts.

    DeepSpeed builds a shared-memory extension at start-up and takes a file lock on every launch; a
    process killed in that window leaves the lock and every later launch hangs silently. We never
    call the extension, so it is declared incompatible (a private table: deepspeed is pinned). The
    table is made here: DeepSpeed would run a compiler to fill it, and asks it for nothing else.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed.ops
    from deepspeed.utils import logger

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    patch_muon()
    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by the names torch 2.13 is leaving; nobody here can change that.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"deepspeed\.|torch\.distributed"
    )


def patch_muon() -> None:
    """Import DeepSpeed's Muon without compiling it, as DeepSpeed 0.19 does when it is imported.

    ZeRO imports it to ask whether its optimizer is one, which ours never is; torch.compile would
    load all of inductor for that, more than a second of a core at every start of every rank.
    """
    if MUON in sys.modules:
        return
    from deepspeed.runtime import compiler

    decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module(MUON)
    finally:
        compiler.compile = decorator


@contextmanager
def device_by_local_rank(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes its device from LOCAL_RANK while it is built and, under ZeRO 3, at every
    step. Under Slurm or alone nobody has set it, and where each rank sees one GPU it is not the
    launcher's number: it holds that of `device` meanwhile, what the launcher said afterwards."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def engine_settings(run: RunConfig, hidden_size: int, data: Axis) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run.

    Accumulation is 1 and the boundary is set by hand: one global normaliser needs the number of
    valid tokens of the whole step, which an average over micro-batches cannot give.
    """
    stage = run.parallel.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optimizer.clip_norm or 0.0,
        "steps_per_print": 2**31,
        # Else the host waits for the device before each forward, to time it.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": run_overlaps(run, data),
            "round_robin_gradients": False,
            # Gathering a norm weight costs a message and saves nothing worth one.
            "stage3_param_persistence_threshold": max(100_000, hidden_size),
        },
    }
    if run.precision == "bf16":
        settings["bf16"] = {
            "enabled": True,
            "check_grad_overflow": True,
            # Each bf16 gradient goes into its sum, and goes, before the next is made.
            "immediate_grad_update": True,
        }
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def run_overlaps(run: RunConfig, data: Axis) -> bool:
    """Return whether ZeRO's communication overlaps the backward pass: on CUDA, unless bits must
    repeat. Where there is nobody to talk to, its streams would only have the host wait for them."""
    on_cuda = torch.cuda.is_available() and run.device != "cpu"
    return on_cuda and data.size > 1 and not run.deterministic
