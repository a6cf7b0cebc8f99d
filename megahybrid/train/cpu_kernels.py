"""The choice of what a long stage computes with on a CPU: product routine and compiled blocks, by
measurement.

The answers are kept for the user, by processor, torch, threads and shapes, and the first one stays:
two runs of one command on one machine compute with the same, and so have the same bits. Where
nothing can be kept, or a run must repeat its bits on another machine of its kind
(`deterministic: true`), and for stages that end before a measurement pays, a fixed rule decides.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megahybrid.config import RunConfig
from megahybrid.config.counting import flops_per_token
from megahybrid.errors import MegahybridError
from megahybrid.model.kernels.choice import REPEATS, Workload, demand_agreement, why_it_failed
from megahybrid.parallel import matmul
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.plain_file import read_plain_file

Found = dict[str, float | str]
CHOICES = {"products": matmul.ROUTINES, "blocks": ("plain", "compiled")}
# FLOPs of a stage, of one rank, from which a measurement pays: at 100 GFLOP/s a quarter of an hour
# for the tenths of a second that products take, an hour for the minutes of a compiler.
PRODUCTS_PAY, BLOCKS_PAY = 1e14, 4e14
# Another choice than the usual one must be faster by this factor: neighbours on a machine make
# smaller differences of their own.
CLEARLY = 1.05
# Multiply-adds of one measured product; it has as many rows as that allows.
PRODUCT_SIZE = 2**29


def stage_flops(run: RunConfig, index: int, mesh: ParallelMesh) -> float:
    """Return one rank's training FLOPs of stage `index`, every row as long as its longest."""
    stage = run.stages[index]
    a_token = flops_per_token(run.model, max(stage.lengths), run.plan_at(index))
    return a_token * stage.tokens / mesh.world.size


def to_measure(run: RunConfig, index: int, mesh: ParallelMesh) -> list[str]:
    """Return which of "products" and "blocks" stage `index` has by measurement on this CPU."""
    if run.deterministic:
        return []
    flops = stage_flops(run, index, mesh)
    pays = {"products": flops >= PRODUCTS_PAY, "blocks": flops >= BLOCKS_PAY}
    if run.precision != "fp32" or not matmul.ONEDNN_SERVES:
        pays["products"] = False
    return [name for name, pay in pays.items() if pay and getattr(run.kernels, name) == "auto"]


def decided(question: str, facts: dict[str, Any], usual: str, ask: Callable[[], Found]) -> Found:
    """Return {"choice": …, "because": …}: the answer kept for these facts, else what `ask` finds,
    which is kept from now on."""
    try:
        path = _folder() / f"{question}-{_key(question, facts)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kept := _kept(path, question):
            return kept | {"because": f"{kept['because']}; measured before on this machine"}
        found = ask()
        answer: Found = {"choice": clearly_fastest(found, usual), "because": _said(found)}
        _keep(path, question, answer | {"facts": json.dumps(facts)})
        # Another run may have been the first: then its answer is ours.
        return _kept(path, question) or answer
    except OSError as error:
        return {"choice": usual, "because": f"no answer can be kept: {error}"}


def clearly_fastest(found: Found, usual: str) -> str:
    """Return the name with the fewest seconds, `usual` unless that is slower by `CLEARLY`."""
    ran = {name: seconds for name, seconds in found.items() if isinstance(seconds, float)}
    best = min(ran, key=lambda name: ran[name], default=usual)
    return best if usual not in ran or ran[usual] >= CLEARLY * ran[best] else usual


def machine_facts(work: Workload) -> dict[str, Any]:
    """Return what an answer holds for: this kind of processor, torch, threads, rows and heads."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": work.rows * work.length,
        "heads": [work.heads, work.kv_heads, work.head_dim],
        "dtype": str(work.dtype),
    }


def product_shapes(run: RunConfig) -> list[tuple[int, int]]:
    """Return (out_features, in_features) of one tensor rank's products of a layer and the head."""
    model, tensor = run.model, run.parallel.tensor
    hidden, inner = model.hidden_size, model.intermediate_size // tensor
    heads = (model.num_heads + 2 * max(model.num_kv_heads, tensor)) * model.head_dim // tensor
    return [
        (heads, hidden),
        (2 * inner, hidden),
        (hidden, inner),
        (hidden, model.num_heads * model.head_dim // tensor),
        (model.vocab_size // tensor, hidden),
    ]


def measure_products(shapes: list[tuple[int, int]], rows: int) -> Found:
    """Return the seconds of forward and backward of these products by each routine, in turns."""
    found: Found = dict.fromkeys(matmul.ROUTINES, 0.0)
    before = matmul.in_use()
    generator = torch.Generator().manual_seed(1)
    try:
        for out_features, in_features in shapes:
            some = max(128, min(rows, PRODUCT_SIZE // (out_features * in_features)))
            x = torch.randn(some, in_features, generator=generator).requires_grad_()
            weight = torch.randn(out_features, in_features, generator=generator).requires_grad_()
            grad = torch.randn(some, out_features, generator=generator)
            results, best = {}, dict.fromkeys(matmul.ROUTINES, float("inf"))
            for turn in range(REPEATS + 1):
                for name in matmul.ROUTINES:
                    matmul.use(name)
                    began = now()
                    results[name] = _three_products(x, weight, grad)
                    if turn:  # the first of each makes its plan
                        best[name] = min(best[name], now() - began)
            for name, result in results.items():
                try:
                    demand_agreement(result, results["torch"], "torch's own")
                    found[name] = found[name] + best[name]  # type: ignore[operator]
                except (ArithmeticError, TypeError) as error:
                    found[name] = why_it_failed(error)
    finally:
        matmul.use(before)
    return found


def _three_products(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    out = matmul.linear(x, weight)
    by_x, by_weight = torch.autograd.grad(out, (x, weight), grad)
    return {"product": out.detach(), "gradient of x": by_x, "gradient of the weight": by_weight}


def now() -> float:
    """Return seconds: of one thread's work, which neighbours disturb least, else of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _said(found: Found) -> str:
    return ", ".join(
        f"{name} {value * 1e3:.3f} ms" if isinstance(value, float) else f"{name}: {value}"
        for name, value in found.items()
    )


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser() / "megahybrid" / "cpu_kernels"
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from None


def _key(question: str, facts: dict[str, Any]) -> str:
    text = json.dumps([question, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _kept(path: Path, question: str) -> Found | None:
    try:
        kept = json.loads(read_plain_file(path, 65536))
        if kept["choice"] not in CHOICES[question]:
            return None
        return {"choice": kept["choice"], "because": str(kept["because"])}
    except (OSError, MegahybridError, ValueError, KeyError, TypeError):
        return None  # none yet, or not ours


def _keep(path: Path, question: str, answer: dict[str, Any]) -> None:
    """Write the answer unless there is one: the first stays."""
    if path.exists() and _kept(path, question) is None:
        path.unlink()  # torn, or another program's
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(json.dumps(answer, indent=1) + "\n")
    try:
        os.link(whole, path)
    except FileExistsError:
        pass
    finally:
        whole.unlink()


def _processor() -> str:
    facts = matmul.processor()
    wanted = ("model name", "cpu family", "model", "stepping")
    return "/".join(facts.get(name, "") for name in wanted) if facts else "unknown"
