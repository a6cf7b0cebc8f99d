"""Results that `evaluate SUITE` and `analyse` would have kept in a run."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from megahybrid.evaluate.attention import AttentionStatistics, to_json
from tests.report.synthetic_run import BATCH

LENGTHS, DEPTHS = (1024, 4096, 16_384), (0.0, 0.5, 1.0)


def needle_rows() -> list[dict[str, Any]]:
    return [
        {
            "length": length, "depth": depth, "exact": 1 / (1 + n * depth), "trials": 4,
            "exact_low": 0.1, "exact_high": 0.9, "token_accuracy": 0.8,
            "log_likelihood": -9.0, "log_likelihood_per_token": -1.5,
        }
        for n, length in enumerate(LENGTHS)
        for depth in DEPTHS
    ]  # fmt: skip


def figures() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    mass = torch.rand(8, 4, 4, generator=draw)
    heads = torch.rand(8, 4, generator=draw)
    near = torch.full((8, 4), torch.nan)  # the global layers have a second view of their keys
    near[3::4] = heads[3::4]
    attention = AttentionStatistics(
        mass / mass.sum(-1, keepdim=True), 4 * heads, heads, heads, heads, heads / 4,
        torch.rand(8, 4, 3), (10, 20, 30, 40), torch.rand(8, 4, 2), (0, 1, 2),
        near, near[..., None].expand(-1, -1, 2),
    )  # fmt: skip
    return to_json(attention, ["local", "local", "local", "global"] * 2, 0.1)


def gain(context: int, documents: int = 20) -> dict[str, Any]:
    """The gain of a set whose last bucket three documents reach."""
    edges = [edge for edge in (1024, 2048, 4096, 8192, 16_384) if edge >= context]
    buckets = [
        {"start": start, "stop": stop, "tokens": stop, "gain": 0.1 * start / 8192,
         "documents": documents if stop < 16_384 else min(documents, 3),
         "low": 0.05 * start / 8192, "high": 0.15 * start / 8192}
        for start, stop in itertools.pairwise(edges)
    ]  # fmt: skip
    return {"set": "longest", "context": context, "stride": context // 2, "length": 16_384,
            "tokens": sum(bucket["tokens"] for bucket in buckets), "documents": documents,
            "loss": 3.0, "gain": 0.08, "low": 0.06, "high": 0.1, "bytes": 90_000,
            "by_position": buckets}  # fmt: skip


def keep(run: Path, name: str, result: dict[str, Any]) -> None:
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / name).write_text(json.dumps(result))


def write_answers(run: Path) -> Path:
    """Puts a suite at two steps, and what each other command keeps, into `evaluations`."""
    ruler = [
        {"task": task, "length": length, "score": 0.5, "standard_error": 0.1, "trials": 5}
        for task in ("vt", "cwe")
        for length in LENGTHS
    ]
    recall = [{"length": length, "token_accuracy": 0.7} for length in LENGTHS]
    tasks = {
        "single": {
            "kind": "needle", "variant": "single", "haystack": "noise", "trials": 4,
            "rows": needle_rows(), "by_length": needle_rows()[::3],
        },
        "ruler": {"kind": "ruler", "trials": 5, "rows": ruler},
        "pairs": {"kind": "recall", "trials": 5, "rows": recall, "by_length": recall},
    }  # fmt: skip
    told = {"trained_length": 4096, "tokens": 150 * BATCH, "tasks": tasks}
    keep(run, "step-00000150.suite.long.json", told)
    keep(run, "step-00000196.suite.long.json", told | {"tokens": 196 * BATCH})
    brief = {"sample": {"loss": 3.0, "perplexity": 20.1, "tokens": 100}}
    reach = {"trained_length": 4096, "rows": {"4096": brief, "32768": brief}, "sliding": brief}
    keep(run, "step-00000196.loss.held_out.json", reach)
    told = {"stage": "long", "context_gain": [gain(1024), gain(4096)]}
    keep(run, "step-00000196.context_gain.held_out.json", told)
    figures_of_arc = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.125}
    keep(run, "step-00000196.lm_eval.arc.json", {"results": {"arc": figures_of_arc}})
    told = {"task": "needle", "length": 4096, "depth": 0.5, "trials": 8, "exact": 0.25}
    keep(run, "step-00000196.attention.needle.json", {"results": [told | {"attention": figures()}]})
    return run
