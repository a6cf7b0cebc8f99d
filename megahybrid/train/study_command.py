"""`megahybrid study DIR`: train and score a grid of variants and seeds, and tabulate it."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megahybrid.config import load
from megahybrid.config.study import Puzzles, Study
from megahybrid.data.manifest import MANIFEST_NAME, TokenizerInfo
from megahybrid.data.token_writer import TokenWriter
from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.evaluate.suite import drawn
from megahybrid.evaluate.synthetic import PUZZLES, Alphabet

EOD = 1  # of puzzles; their ids begin behind it
NOTHING = "–"


def study(
    folder: Path,
    *,
    out: Path | None = None,
    variants: list[str] | None = None,
    seeds: list[int] | None = None,
) -> int:
    """Run what is missing of the grid in `folder`/study.yaml and print its table.

    Every run is `megahybrid train` and `megahybrid evaluate`, in processes of their own, under
    `out` (default: runs/<folder's name>); results are kept as JSON in `out`/results, and a run that
    has one is not repeated. An interrupted run goes on from its checkpoint. Returns the exit code:
    that of the first run that failed, after the others were tried.
    """
    plan = load(folder / "study.yaml", type=Study)
    out = (out or Path("runs") / folder.resolve().name).resolve()
    for name in variants or []:
        if name not in plan.variants:
            raise ConfigError(
                f"--variants={name} is not one of {', '.join(plan.variants)}. Name one of them."
            )
    for name, puzzles in plan.data.items():
        _draw_data(out / "data" / name, puzzles, plan.ids)
    code = EXIT_DONE
    for seed in seeds or plan.seeds:
        for variant in variants or list(plan.variants):
            code = _run(folder, plan, out, variant, seed) or code
    results = read_results(out)
    (out / "table.json").write_text(json.dumps(tabulate(plan, results), indent=1), encoding="utf-8")
    Console(highlight=False).print(_table(plan, results))
    return code


def _draw_data(folder: Path, puzzles: Puzzles, ids: list[int]) -> None:
    if (folder / MANIFEST_NAME).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # left by a draw that was interrupted
    alphabet = Alphabet(*ids)
    info = TokenizerInfo("puzzles", "0" * 64, ids[1], eod_id=EOD)
    with TokenWriter(folder, info, command="megahybrid study") as writer:
        draw = drawn(puzzles.seed, "study", puzzles.kind, puzzles.length)
        for _ in range(puzzles.rows):
            one = PUZZLES[puzzles.kind](puzzles.length, puzzles.pairs, alphabet, draw)
            writer.add(one.tokens)


def _run(folder: Path, plan: Study, out: Path, variant: str, seed: int) -> int:
    name = f"{variant}-seed{seed}"
    kept = out / "results" / f"{name}.json"
    if kept.exists():
        return EXIT_DONE
    run = out / "runs" / name
    overrides = [f"data.sources.{source}.path={out / 'data' / source}" for source in plan.data]
    overrides += [*plan.variants[variant], f"seed={seed}", f"directory={run}"]
    me = [sys.executable, "-m", "megahybrid"]
    print(f"{name}: training", file=sys.stderr)
    trained = subprocess.run(
        [*me, "train", str(folder / plan.run), *overrides, "--processes", "1"],
        stdout=subprocess.DEVNULL,
    )
    if trained.returncode:
        print(f"{name}: training ended with code {trained.returncode}", file=sys.stderr)
        return trained.returncode
    scored = subprocess.run(
        [*me, "evaluate", str(run), str(folder / plan.suite), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if scored.returncode:
        return scored.returncode
    result = {"variant": variant, "seed": seed, **json.loads(scored.stdout)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    part.replace(kept)
    return EXIT_DONE


def read_results(out: Path) -> list[dict[str, Any]]:
    """The results kept so far, by name."""
    return [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]


def tabulate(plan: Study, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each variant: runs, those past the gate, and median, least and most token accuracy of
    those by task and length."""
    rows = []
    for variant in plan.variants:
        mine = [result for result in results if result["variant"] == variant]
        counted = [result for result in mine if _passes(plan, result)]
        scores: dict[tuple[str, int], list[float]] = {}
        for result in counted:
            for task, told in result["tasks"].items():
                for row in told.get("by_length", []):
                    scores.setdefault((task, row["length"]), []).append(row["token_accuracy"])
        rows.append(
            {
                "variant": variant,
                "runs": len(mine),
                "counted": len(counted),
                "scores": [
                    {
                        "task": task,
                        "length": length,
                        "median": statistics.median(found),
                        "least": min(found),
                        "most": max(found),
                    }
                    for (task, length), found in sorted(scores.items())
                ],
            }
        )
    return rows


def _passes(plan: Study, result: dict[str, Any]) -> bool:
    if plan.gate is None:
        return True
    for row in result["tasks"][plan.gate.task]["by_length"]:
        if row["length"] == plan.gate.length:
            return bool(row["token_accuracy"] >= plan.gate.least)
    raise ConfigError(
        f"gate.length={plan.gate.length} is not scored by task {plan.gate.task}. "
        "Name one of its lengths."
    )


def _table(plan: Study, results: list[dict[str, Any]]) -> Table:
    rows = tabulate(plan, results)
    columns = sorted({(score["task"], score["length"]) for row in rows for score in row["scores"]})
    table = Table(box=box.HORIZONTALS, title="tokens right: median (least – most) of runs counted")
    table.add_column("variant")
    table.add_column("counted", justify="right")
    for task, length in columns:
        table.add_column(f"{task} {length:,}", justify="right")
    for row in rows:
        cells = {(score["task"], score["length"]): score for score in row["scores"]}
        table.add_row(
            row["variant"],
            f"{row['counted']} of {row['runs']}",
            *(_cell(cells.get(column)) for column in columns),
        )
    return table


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return NOTHING
    return f"{score['median']:.2f} ({score['least']:.2f} – {score['most']:.2f})"
