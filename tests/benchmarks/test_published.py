"""Every figure of docs/performance.md is in one of the files that it names."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import context_ranks, predict, recompute
from benchmarks.generated_code import BYTES_PER_SECOND, INSTRUCTIONS_PER_SECOND
from benchmarks.shapes import hybrid
from megahybrid.config.counting import flops_per_token, ideal_speedup

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text()
RESULTS = ROOT / "benchmarks/results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def seconds(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def test_the_page_names_every_file_of_its_own_and_none_that_is_not_there() -> None:
    named = set(re.findall(r"benchmarks/results/(\w+)\.json", PAGE))
    assert {"train_step_2k_cpu", "train_step_8k_cpu", "growth_cpu", "memory_cpu"} <= named
    assert {"two_ranks_cpu", "start_up_cpu"} <= named
    for name in named:
        assert read(name)["machine"]["processor"] in PAGE, name


def test_the_first_line_says_what_has_run_on_a_gpu() -> None:
    on_a_gpu = [
        path for path in RESULTS.glob("*.json") if "gpu" in read(path.stem).get("machine", {})
    ]
    assert PAGE.splitlines()[0].endswith("; nothing has run on a GPU yet") == (not on_a_gpu)


def test_steps_and_what_the_peers_take() -> None:
    for name in ("train_step_2k_cpu", "train_step_8k_cpu", "train_step_2k_cpu_avx2"):
        (result,) = read(name)["lengths"]
        ours = result["times"]["megahybrid"]["cpu_median"]
        for who, times in result["times"].items():
            ratio = f"{times['cpu_median'] / ours:.2f} ×" if who != "megahybrid" else ""
            row = f"{who} | {seconds(times['cpu_median'])} | {ratio}".strip()
            assert row in PAGE, row
        for gate in result["gate"].values():
            assert gate["loss_error"] < 1e-6 and gate["gradient_error"] < 3e-6


def test_products() -> None:
    for name, processor in (("products_cpu", "AVX-512"), ("products_cpu_avx2", "AVX2")):
        for row in read(name)["products"]:
            rates = [row.get(f"{way}_gflops") for way in ("onednn", "torch", "bf16")]
            told = " | ".join("–" if rate is None else f"{rate:.0f}" for rate in rates)
            size = " × ".join(map(str, row["size"]))
            assert f"| AMD EPYC, {processor} | {size} | {told} |" in PAGE


def test_growth_with_the_length() -> None:
    for row in read("growth_cpu")["growth"] + read("growth_cpu_avx2")["growth"]:
        told = [seconds(row[kind]["cpu_median"]) for kind in ("hybrid", "full")]
        told += [f"{row['ratio']:.2f} ×", f"{row['ideal']:.2f} ×"]
        start = f"| {row['length']:,} | {' | '.join(told)}"
        (line,) = (line for line in PAGE.splitlines() if line.startswith(start))
        share = f"{row['ratio'] / row['ideal']:.0%}".replace("%", " %")
        assert share in line
        assert line.endswith(f"| {row['hybrid_gflops']:.0f} | {row['full_gflops']:.0f} |")


def test_two_ranks_and_memory() -> None:
    ranks = read("two_ranks_cpu")["tensor"]
    together, alone = ranks["ranks_cpu_median"], ranks["alone"]["cpu_median"]
    assert f"{together:.2f} against {alone:.2f}, **{ranks['overhead']:.2f} ×**" in PAGE
    memory = read("memory_cpu")["memory"]
    for policy, expected in memory["by_formula"].items():
        grown = memory["grown"][policy]
        assert f"| {policy} | {mib(grown)} | {mib(expected)} | {grown / expected:.2f} |" in PAGE
    chunked, plain = (mib(memory["grown"][f"loss-{kind}"]) for kind in ("chunked", "plain"))
    assert f"by {chunked} in chunks and by {plain}" in PAGE


def test_context_ranks() -> None:
    for name in ("context_memory_25m", "context_memory_demo_long"):
        for line in context_ranks.memory_table(read(name)["degrees"]).splitlines():
            assert line in PAGE, line
    alone, *_, four = read("context_memory_25m")["degrees"]
    told = [f"{row['peak'] / 2**20:,.0f} MiB" for row in (four, alone)]
    assert f"4 × {told[0]} against {told[1].removesuffix(' MiB')}" in PAGE
    steps = read("context_cpu_25m")["degrees"]
    for line in context_ranks.cpu_table(steps).splitlines():
        assert line in PAGE, line


def test_start_up() -> None:
    rounds = read("start_up_cpu")["rounds"]
    middle = {
        name: statistics.median(one[name] for one in rounds)
        for name in ("torch_wall", "torch_cpu", "first_step_wall", "first_step_cpu")
    }
    for clock, told in (("wall", "by the clock"), ("cpu", "CPU-seconds")):
        first, torch = middle[f"first_step_{clock}"], middle[f"torch_{clock}"]
        assert f"{first:.2f} - {torch:.2f} = **{first - torch:.2f}** {told}" in PAGE
    other = statistics.median(value for one in rounds for value in one["other_seconds"])
    assert f"{other * 1e3:.1f} ms a step" in PAGE


def test_what_the_formulas_say_of_one_card() -> None:
    for shape, length, budget, offload in (
        ("1b", 131072, 120, "none"),
        ("1b", 262144, 120, "none"),
        ("8b", 8192, 120, "moments"),
    ):
        config = hybrid(shape)
        policies = recompute.solve(config, length, budget * 2**30, length, offload)
        needed = recompute.expected_bytes(config, policies, length, offload) / 2**30
        told = ", ".join(f"{policies.count(name)} {name}" for name in dict.fromkeys(policies))
        assert f"{told}; {needed:.1f} GiB" in PAGE, (shape, length, told, needed)
    without = recompute.expected_bytes(hybrid("8b"), ["none"] * 32, 8192) / 2**30
    assert f"{without:.1f} GiB without" in PAGE.replace("\n", " ")
    for length, gflop in ((8192, "8.76"), (32768, "10.19"), (131072, "15.08")):
        config = hybrid("1b")
        assert f"{flops_per_token(config, length) / 1e9:.2f}" == gflop
        assert gflop in PAGE and f"{ideal_speedup(config, length):.3f}" in PAGE


def test_what_the_compiler_makes_of_a_layer() -> None:
    result = read("generated_code_sm90")
    assert all(
        f"{name} {result['machine']['versions'][name]}" in PAGE for name in ("torch", "triton")
    )
    floor = 3 * (20 * 2048 + 4 * 20 * 128 + 6 * 8192)
    assert f"{floor / 1e3:.1f} kB" in PAGE
    for name, programs in result["parts"].items():
        kernels = [kernel for program in programs for kernel in program["kernels"]]
        most = {what: max(k[what] for k in kernels) for what in ("registers", "spilled", "shared")}
        if name.startswith("flex"):
            assert most["spilled"] <= 160 and most["registers"] == 255
            assert most["shared"] // 2**10 == 161
            continue
        size = sum(kernel["bytes"] for kernel in kernels)
        count = sum(kernel["instructions"] or 0 for kernel in kernels)
        times = (size / BYTES_PER_SECOND, count / INSTRUCTIONS_PER_SECOND)
        row = (
            f"| {name} | {len(kernels)} | {size / 1e3:.0f} kB | {size / floor * 100:.0f} % |"
            f" {times[0] * 1e9:.0f} ns | {times[1] * 1e9:.0f} ns | {most['registers']} |"
        )
        assert row in PAGE, row
        assert most["spilled"] == 0


def test_what_is_expected_of_one_card() -> None:
    assert predict.table(predict.expected([8192, 32768, 131072])) in PAGE
    step = predict.predict(hybrid("1b"), 8192, "cudnn_frontend", "cudnn_frontend")
    floor = flops_per_token(hybrid("1b"), 8192) / 790e12
    assert floor < sum(step["microseconds"].values()) / 1e6 < 2 * floor
    assert step["mfu"] == step["tokens_per_second"] * flops_per_token(hybrid("1b"), 8192) / 989e12
