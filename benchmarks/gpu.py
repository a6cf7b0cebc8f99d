"""The plan for one GPU: ours hybrid and full at each length, then other libraries in turns with
ours, the engine, and the kernels alone. Made to finish within one call of nine minutes.

Parts come in the order of their worth. A part that fails is told and the plan goes on; a part for
which no time is left is told too. `--rehearse` runs all of it on the CPU with the tiny shape, and
`--parts` some of it.
"""

import argparse
import sys
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.against import against
from benchmarks.gate import gate
from benchmarks.machine import heading, machine, write
from benchmarks.ours import offloaded, ours, packed, pick, prefer_faster_blocks, through_engine
from benchmarks.peers import title
from benchmarks.plan import Plan
from benchmarks.shapes import full, hybrid
from benchmarks.summary import summary
from megahybrid.parallel.allocator import expandable_segments
from megahybrid.parallel.mesh import initialise_distributed, shutdown_distributed

REST_SECONDS = 150  # that the peers leave to what comes behind them


def run_plan(options: argparse.Namespace) -> int:
    """Everything, then the table and the JSON. Exit code 1 where the gate does not hold."""
    if options.rehearse:
        options.shape, options.lengths = "tiny", [64, 128]
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device. Use --rehearse to try the plan on CPU.")
    expandable_segments()
    plan = Plan(options)
    facts = machine(plan.device)
    print(heading(facts), flush=True)
    # megatron-core wants a world, be it of one.
    initialise_distributed(plan.device.type)
    try:
        return _run(plan, facts)
    finally:
        shutdown_distributed(ok=False)


def _run(plan: Plan, facts: dict[str, Any]) -> int:
    options = plan.options
    held = gate(plan)
    plan.free()
    chosen = [
        row
        for length in options.lengths
        for row in plan.part(f"kernels at {length}", 15, lambda n=length: pick(plan, n)) or []
    ]
    our_rows(plan)
    if "peers" in options.parts:
        peer_rows(plan)
    table = rest(plan) if "rest" in options.parts else []
    # A call for some of the parts does not write over another's figures.
    some = "" if len(options.parts) == 3 else "_" + "_".join(options.parts)
    path = write(
        f"train_step_{'rehearsal' if options.rehearse else 'cuda'}{some}",
        {
            "machine": facts,
            "shape": options.shape,
            "gate": held,
            "rows": plan.rows,
            "kernels": table,
            "kernels_chosen": plan.kernels,
            "kernels_measured": chosen,
            "blocks_compiled": plan.compiled,
            "notes": plan.notes,
        },
    )
    if table:
        print(kernels.table(table))
    print(f"kernels chosen: {plan.kernels}; blocks {'compiled' if plan.compiled else 'plain'}")
    print(summary(plan))
    print(f"all times: {path}")
    return 0


def our_rows(plan: Plan) -> None:
    """Hybrid and full at every length, with the faster of plain and compiled blocks."""
    options, config = plan.options, hybrid(plan.options.shape)
    first = options.lengths[0]
    ours(plan, "hybrid", config, first, options.steps)
    plan.compiled = True
    ours(plan, "hybrid, compiled", config, first, options.steps)
    prefer_faster_blocks(plan)
    if "ours" not in options.parts:
        return
    for length in options.lengths[1:]:
        ours(plan, "hybrid", config, length, options.steps)
    for length in options.lengths:
        ours(plan, "full", full(options.shape), length, max(options.steps // 2, 5))


def peer_rows(plan: Plan) -> None:
    """Every peer at every length: the first settings of each library before the second ones."""
    kept = REST_SECONDS if "rest" in plan.options.parts and not plan.options.rehearse else 0
    for name in plan.options.peers:
        seconds = kept + (75 if "compile" in name else 40)
        for length in plan.options.lengths:
            label = f"{title(name)} at {length}"
            plan.part(label, seconds, lambda name=name, length=length: against(plan, name, length))


def rest(plan: Plan) -> list[dict[str, Any]]:
    """The longest rows, the engine, packed documents, the other block; the kernels' table."""
    options, config = plan.options, hybrid(plan.options.shape)
    first = options.lengths[0]
    ours(plan, "hybrid", config, 2 * options.lengths[-1], 3)
    plan.part("engine", 25, lambda: through_engine(plan, first))
    plan.part("packed documents", 20, lambda: packed(plan, config, first, 10))
    sequential = config.model_copy(update={"block": "pre_norm"})
    ours(plan, "hybrid, sequential block", sequential, first, 10)
    table = plan.part("kernels", 30, lambda: kernel_rows(plan)) or []
    # Locking its 64 GB of host memory alone takes half a minute.
    plan.part("8B, moments off-loaded", 100, lambda: offloaded(plan, first))
    return table


def kernel_rows(plan: Plan) -> list[dict[str, Any]]:
    """The kernels alone at the two shorter lengths."""
    dtype = torch.float32 if plan.options.rehearse else torch.bfloat16
    return [
        row
        for length in plan.options.lengths[:2]
        for row in kernels.measure(plan.options.shape, length, plan.device, dtype)
    ]
