"""One part's process: it measures, and writes a line for every figure as soon as it is known.

python -m benchmarks.gpu_call.measure WHAT [ARGUMENTS …] [--rehearse] [--earlier RESULTS]
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu_call.results import read, rows

WHAT = ("machine", "ceilings", "agreement", "attention", "step", "peer")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where ours and the reference do not compute the same thing."""
    options = parse_options(arguments)
    descriptor = os.fdopen(options.rows_fd, "w", buffering=1) if options.rows_fd else sys.stdout
    wrong = False
    for row in figures(options):
        print(json.dumps(row), file=descriptor, flush=True)
        wrong |= row.get("agrees") is False
    return int(wrong)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("name", nargs="?", help="a kernel, a kind of step, or a peer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--blocks", choices=("plain", "compiled"))
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--offload", default="none")
    parser.add_argument("--loss-part", type=int)
    parser.add_argument("--without-patch", action="store_true", help="inductor as it is")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--earlier", type=Path, help="results of earlier parts")
    parser.add_argument("--rows-fd", type=int)
    return parser.parse_args(arguments)


def figures(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The part's rows."""
    import logging
    import warnings

    import torch

    from benchmarks.gpu_call.setting import Setting
    from megahybrid.parallel.allocator import expandable_segments

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. Use --rehearse to try the call on a CPU.")
    expandable_segments()
    setting = Setting.of(options.rehearse)
    if options.earlier is not None:
        setting.learn(rows(list(read(options.earlier))))
    if options.blocks is not None:
        setting.compiled = options.blocks == "compiled"
    match options.what:
        case "machine":
            from benchmarks.machine import machine

            yield machine(setting.device)
        case "ceilings":
            from benchmarks.gpu_call import ceilings

            yield ceilings.copy(setting)
            yield from ceilings.products(setting)
            yield from ceilings.loss_parts(setting)
        case "agreement":
            from benchmarks.gpu_call.agreement import agreement

            yield agreement(setting)
        case "attention":
            from benchmarks.gpu_call import attention

            yield from attention.rows(setting, options.name)
        case _:
            yield from steps(options, setting)


def steps(options: argparse.Namespace, setting: Any) -> Iterable[dict[str, Any]]:
    """Whole steps of ours or of a peer, in a world of one."""
    from benchmarks.gpu_call import peer_step, step
    from megahybrid.parallel.mesh import initialise_distributed, shutdown_distributed

    if options.without_patch:
        from megahybrid.model import compiled

        compiled.patch_inductor_cat = lambda: None  # type: ignore[assignment]
    # megatron-core and DeepSpeed want a world, be it of one.
    initialise_distributed(setting.device.type)
    try:
        for length in options.lengths:
            if options.what == "peer":
                yield peer_step.measured(setting, options.name, length, options.steps)
            else:
                yield step.measured(
                    setting,
                    options.name,
                    length,
                    options.steps,
                    packed=options.packed,
                    offload=options.offload,
                    loss_part=options.loss_part,
                    profile=options.profile,
                ) | ({"patch": False} if options.without_patch else {})
            setting.free()
    finally:
        shutdown_distributed(ok=False)


if __name__ == "__main__":
    sys.exit(main())
