"""`megahybrid evaluate CHECKPOINT SUITE.yaml`: needles, puzzles and RULER on a checkpoint."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from megahybrid.commands.named_data import with_held_out
from megahybrid.commands.trained_model import header, keep, load_trained_model
from megahybrid.config import dump
from megahybrid.config.suite import load_suite
from megahybrid.errors import EXIT_DONE
from megahybrid.evaluate.progress import EvaluationProgress
from megahybrid.evaluate.suite import run_suite, suite_tokens
from megahybrid.evaluate.suite_table import suite_tables
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.suites import material_of


def evaluate_suite(
    path: Path,
    suite_file: Path,
    mesh: ParallelMesh,
    *,
    data: Mapping[str, Path] | None = None,
    tokenizer: Path | None = None,
    changes: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Print what a checkpoint scores on a suite, and keep it in the run's `evaluations`.

    `data` are held-out sets for its hay, instead of the run's. Raises MegahybridError, one line,
    for whatever the user can mend. Returns the exit code.
    """
    suite = load_suite(suite_file)
    trained = load_trained_model(path, mesh, changes)
    material = material_of(with_held_out(trained.run, data), suite, tokenizer)
    started = time.monotonic()
    with EvaluationProgress(f"asking {suite_file.stem}", suite_tokens(suite)) as progress:

        def tell(name: str, done: int, of: int) -> None:
            progress.say(f"{name}: {done:,} of {of:,} examples")

        scores = run_suite(trained.model, suite, material, tell, progress.advance)
    result = {
        **header(trained),
        "suite": suite_file.stem,
        **({} if data is None else {"data": {name: str(path) for name, path in data.items()}}),
        "config": dump(suite),
        "seconds": time.monotonic() - started,
        **scores,
    }
    kept = keep(trained, "suite", suite_file.stem, result)
    if as_json:
        print(json.dumps(result, indent=2))
        return EXIT_DONE
    console = Console(highlight=False)
    console.print(
        f"{trained.checkpoint}\nstep {trained.step:,} · stage {trained.stage.name} · trained at "
        f"{trained.length:,} tokens · seed {suite.seed}"
        + (f"\nchanged: {', '.join(trained.changes)}" if trained.changes else ""),
        markup=False,
        soft_wrap=True,
    )
    for title, table in suite_tables(result):
        console.print(f"\n{title}", markup=False, soft_wrap=True)
        console.print(table)
    if kept is not None:
        console.print(f"\nkept in {kept}", markup=False, soft_wrap=True)
    return EXIT_DONE
