"""What a figure was measured on and with: printed above every table and kept in its JSON."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megahybrid.parallel import matmul

RESULTS = Path("build/bench")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, and the versions that matter."""
    names = (
        "torch",
        "transformers",
        "megatron-core",
        "torchtitan",
        "deepspeed",
        "triton",
        "liger-kernel",
        "numpy",
    )
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: installed for name in names if (installed := _installed(name))},
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def processor() -> str:
    """The processor's name as Linux tells it."""
    named = matmul.processor().get("model name")
    return named or platform.processor() or platform.machine() or "unknown"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def heading(facts: dict[str, Any]) -> str:
    """One line for people."""
    cores = f"{facts['threads']} of {facts['cores']} cores"
    where = facts.get("gpu") or f"{facts['processor']}, {cores}"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"{where} (load {facts['load_average'][0]:.1f}); python {facts['python']}, {versions}"


def write(name: str, result: dict[str, Any]) -> Path:
    """build/bench/`name`.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
