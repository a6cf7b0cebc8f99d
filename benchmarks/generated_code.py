"""What torch.compile makes of a layer for an H200, read without one: each program's kernels, their
bytes of memory and instructions a token, registers, spills and shared memory.

    python -m benchmarks.generated_code [--only NAME …] [--out FILE]

Needs torch's CUDA build, triton and a C compiler; no device, and a device that is there is not
used. Times are floors: bytes at 4.3 TB/s, instructions of kernels without loops at one a warp
scheduler and clock. Nothing is run, so nothing is measured.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.no_device import H200, pretend, programs_kept, restart_without_device, why_not

BYTES_PER_SECOND = 4.3e12  # copies on an H200, as measured by others
INSTRUCTIONS_PER_SECOND = H200.multi_processor_count * 4 * 32 * 1.755e9  # of threads
# name: block, norm, policy, scheme, rows, length
LAYERS = {
    "parallel, 4 x 8k": ("parallel", "layernorm", "none", "local", 4, 8192),
    "parallel without position, 4 x 8k": ("parallel", "layernorm", "none", "global", 4, 8192),
    "parallel, 1 x 128k": ("parallel", "layernorm", "none", "local", 1, 131072),
    "parallel selective, 1 x 128k": ("parallel", "layernorm", "selective", "local", 1, 131072),
    "pre_norm, 4 x 8k": ("pre_norm", "rms", "none", "local", 4, 8192),
    "post_norm, 4 x 8k": ("post_norm", "rms", "none", "local", 4, 8192),
}
# name: window, rows, length
FLEX = {
    "flex, window 4096, 4 x 8k": (4096, 4, 8192),
    "flex, window 4096, 1 x 128k": (4096, 1, 131072),
    "flex, full, 1 x 128k": (None, 1, 131072),
}

Choice = tuple[dict[str, Any], int]  # one configuration of a kernel, and its threads


def main() -> None:
    """Prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names, or how they begin")
    parser.add_argument("--out", type=Path, default=Path("build/bench/generated_code_sm90.json"))
    asked = parser.parse_args()
    lacking = why_not()
    if lacking:
        parser.error(lacking)
    folder = restart_without_device()
    try:
        pretend()
        result = read_code(lambda name: not asked.only or name.startswith(tuple(asked.only)))
    finally:
        shutil.rmtree(folder)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def read_code(wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The parts that are wanted, each printed when it is there."""
    import torch

    from benchmarks.machine import machine

    parts: dict[str, Any] = {}
    for cases, make in ((LAYERS, layer), (FLEX, flex_attention)):
        for name, case in cases.items():
            if wanted(name):
                parts[name] = make(*case)  # type: ignore[operator]
                print(table(name, parts[name]), flush=True)
    return {"machine": machine(torch.device("cpu")), "target": H200.name, "parts": parts}


def layer(
    block: str, norm: str, policy: str, scheme: str, rows: int, length: int
) -> list[dict[str, Any]]:
    """Both regions of one layer of the 1B shape, forward and backward."""
    import torch

    from benchmarks.shapes import hybrid
    from megahybrid.model import compiled
    from megahybrid.model.block import BLOCKS
    from megahybrid.model.context import SequenceContext
    from megahybrid.model.kernels import varlen
    from megahybrid.parallel.mesh import ParallelMesh

    torch._dynamo.reset()
    compiled.prepare_compiler()
    compiled.patch_inductor_cat()
    changed: Any = varlen
    changed._shares_heads = lambda device, dtype: True
    config = hybrid("1b").model_copy(update={"block": block, "norm": norm})
    device = torch.device("cuda", 0)
    torch.set_default_dtype(torch.bfloat16)
    with programs_kept() as (backend, made):
        one = BLOCKS[block](
            0,
            config,
            config.layer_plan.schemes[scheme],
            ParallelMesh.single(device),
            "varlen",
            policy,
        )
        one.compile_regions(backend)
        shape = (length, rows, config.hidden_size)
        hidden = torch.empty(shape, device=device, requires_grad=True)
        one(hidden, SequenceContext(length, None, device, torch.bfloat16)).sum().backward()
    names = ("enter", "leave", "leave backward", "enter backward")
    return described(names, made, rows * length)


def flex_attention(window: int | None, rows: int, length: int) -> list[dict[str, Any]]:
    """FlexAttention of the 1B shape's heads through `attend_flex`, forward and backward."""
    import torch

    from benchmarks.shapes import SHAPES
    from megahybrid.model.kernels import AttentionSpec, flex

    torch._dynamo.reset()
    heads, kv_heads = SHAPES["1b"]["num_heads"], SHAPES["1b"]["num_kv_heads"]
    compile = torch.compile
    changed: Any = torch
    with programs_kept() as (backend, made):
        changed.compile = lambda function, **options: compile(function, backend=backend, **options)
        flex._compiled.cache_clear()
        flex._plain_mask.cache_clear()
        q, k, v = (
            torch.empty(
                (rows, length, count, 128), device="cuda", dtype=torch.bfloat16, requires_grad=True
            ).transpose(0, 1)
            for count in (heads, kv_heads, kv_heads)
        )
        out = flex.attend_flex(q, k, v, AttentionSpec(window=window, scale=128**-0.5))
        out.sum().backward()
    changed.compile = compile
    return described(("forward", "backward"), made, rows * length)


def described(
    names: tuple[str, ...], made: list[dict[str, Any]], tokens: int
) -> list[dict[str, Any]]:
    """Each program's kernels and products, for JSON."""
    assert len(names) == len(made), [program["kind"] for program in made]
    programs = []
    for name, program in zip(names, made, strict=True):
        ran = re.findall(r"^ +(\w+)\.run\(", program["code"].split("def call(")[1], re.MULTILINE)
        compiled = kernels(program["code"])
        programs.append(
            {
                "name": name,
                "products": len(re.findall(r"extern_kernels\.\w*mm\(", program["code"])),
                "kernels": [
                    {"name": called, "bytes": size / tokens}
                    | described_kernel(compiled[called], tokens)
                    for called, size in zip(ran, program["bytes"], strict=True)
                ],
            }
        )
    return programs


def described_kernel(choices: list[Choice], tokens: int) -> dict[str, Any]:
    """Of the configurations that torch will choose from by time, that of fewest instructions,
    with those a token; None where there are loops."""
    of_token = [
        one | {"instructions": one["instructions"] and one["instructions"] * threads / tokens}
        for one, threads in choices
    ]
    return min(of_token, key=lambda one: one["instructions"] or 0)


def kernels(code: str) -> dict[str, list[Choice]]:
    """What ptxas says of each Triton kernel in a program, by configuration."""
    from torch._inductor.codecache import PyCodeCache

    found = {}
    sources = r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
    for name, source in re.findall(sources, code, re.MULTILINE | re.DOTALL):
        tuner = getattr(PyCodeCache.load(source), name)
        sizes = dict(re.findall(r"^    ([xyz])numel = (\d+)$", source, re.MULTILINE))
        found[name] = [of_kernel(tuner, each, sizes) for each in tuner.configs]
    return found


def of_kernel(tuner: Any, choice: Any, sizes: dict[str, str]) -> Choice:
    """Registers, spilled bytes a thread, shared memory, and instructions where there is no loop;
    and how many threads there are."""
    kernel = tuner._precompile_config(choice).kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    blocks = [
        -(-int(size) // choice.kwargs[f"{axis.upper()}BLOCK"]) for axis, size in sizes.items()
    ]
    facts = {
        "choice": choice.kwargs | {"warps": choice.num_warps, "stages": choice.num_stages},
        "registers": int(counts["REG"]),
        "spilled": int(counts["STACK"]) + int(counts["LOCAL"]),
        "shared": kernel.metadata.shared,
        "instructions": instructions(code),
    }
    return facts, math.prod(blocks) * 32 * choice.num_warps


def tool(name: str, *arguments: str) -> str:
    """What one of triton's own binary tools prints."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> int | None:
    """Instructions of one thread; None where it comes back to some of them."""
    count, labels = 0, {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        if not re.search(r"/\*[0-9a-f]{4,}\*/", line) or re.search(r"\*/\s+NOP", line):
            continue
        count += 1
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], count) < count - 1:
            return None
    return count


def table(name: str, programs: list[dict[str, Any]]) -> str:
    """One line per program."""
    lines = [f"{name}: kB and ns a token; instructions, registers, spilled bytes, shared KiB"]
    for program in programs:
        each = program["kernels"]
        size = sum(kernel["bytes"] for kernel in each)
        lines.append(
            f"  {program['name']:15s} {len(each)} kernels, {program['products']} products"
            f" {size / 1e3:7.1f} kB {size / BYTES_PER_SECOND * 1e9:6.1f} ns;"
            f" {sum(k['instructions'] or 0 for k in each) / INSTRUCTIONS_PER_SECOND * 1e9:6.1f} ns,"
            f" {max((k['registers'] for k in each), default=0)},"
            f" {max((k['spilled'] for k in each), default=0)},"
            f" {max((k['shared'] for k in each), default=0) / 2**10:.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
