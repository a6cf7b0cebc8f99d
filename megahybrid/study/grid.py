"""`megahybrid study DIR`: run what is missing of a grid, several at a time, and tabulate it."""

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from megahybrid.config import check_run, load
from megahybrid.config.context_features import check_study
from megahybrid.config.packaged import located
from megahybrid.config.study import Study
from megahybrid.config.suite import RulerTask, load_suite
from megahybrid.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_MISTAKE, ConfigError, DataError
from megahybrid.run_folder import refuse_foreign_study_folder
from megahybrid.study.figures import check_rules, tabulate, void
from megahybrid.study.material import prepare
from megahybrid.study.one_run import StudyRun
from megahybrid.study.tables import rules_table, runs_table

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def study(
    folder: Path,
    *,
    out: Path | None = None,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    tabulate_only: bool = False,
) -> int:
    """Run what is missing of the grid in `folder`/study.yaml and print its table.

    Everything is kept under `out` (default: runs/<folder's name>): results as JSON in `out`/results
    (a run that has one is not repeated), checkpoints, from which an interrupted run goes on, and
    what each run said in `out`/logs. `jobs` runs go on at a time (default: one per core on a CPU,
    one on a GPU). Returns the exit code: that of the first run that failed, after the others were
    tried; a user's mistake ends the study with the runs under way. Raises MegahybridError, one
    line, for whatever can be told before any run.
    """
    plan = _load(folder)
    out = (out or Path("runs") / folder.resolve().name).resolve()
    asked = _selected_runs(plan, variants, seeds)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs={jobs} runs nothing. Use 1 or more.")
    code = EXIT_DONE
    grid = [StudyRun(plan, folder, out, *one) for one in asked]
    if not tabulate_only:
        _check(plan, grid)
        refuse_foreign_study_folder(out)
        with _only_study(out):
            missing = [run for run in grid if not run.result.exists()]
            _check_trunks(missing)
            if missing:
                prepare(plan, out)
                fork = not _on_gpu(missing[0])
                cores = len(os.sched_getaffinity(0)) if fork else 1
                code = _run_all(missing, jobs or cores, fork)
    results = read_results(out, plan, grid)
    if not results:
        if tabulate_only:
            raise DataError(f"{out / 'results'} holds no result of this study. Run it first.")
        return code
    print_results(plan, results, out)
    return code


def print_results(plan: Study, results: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the table and how the rules fare.

    Both are kept as `out`/table.json, and pictures there.
    """
    rows = tabulate(plan, results)
    rules = check_rules(plan, rows)
    table: dict[str, Any] = {"rows": rows, "rules": rules}
    if (why := void(plan, rows)) is not None:
        table["void"] = why
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    # A name in brackets is a name.
    console = Console(highlight=False, markup=False, width=max(110, Console().width))
    console.print(runs_table(plan, rows))
    if rules:
        console.print(rules_table(rules))
    if why is not None:
        console.print(why)
    from megahybrid.report.study_pictures import draw_study

    pictures = draw_study(rows, plan.columns, out)
    runs, spent = sum(len(row["seeds"]) for row in rows), sum(row["cpu_seconds"] for row in rows)
    console.print(f"{runs} runs, {spent:,.0f} seconds of processor time")
    for path in (out / "table.json", *pictures):
        console.print(str(path), markup=False, soft_wrap=True)


def read_results(out: Path, plan: Study, grid: Sequence[StudyRun]) -> list[dict[str, Any]]:
    """The results kept so far of the grid's runs. Raises DataError for one that is damaged."""
    found = []
    for run in grid:
        if run.result.exists():
            try:
                found.append(json.loads(run.result.read_text(encoding="utf-8")))
            except ValueError:
                raise DataError(
                    f"{run.result} is not JSON (damaged). Remove it, and the run is scored again."
                ) from None
    return found


def _load(folder: Path) -> Study:
    file = folder / "study.yaml"
    if not located(file).exists():
        known = sorted(path.parent.name for path in folder.parent.glob("*/study.yaml"))
        hint = f" There are: {', '.join(known)}." if known else ""
        raise ConfigError(
            f"{folder} is not a study: it has no study.yaml. Name a folder with one.{hint}"
        )
    return load(file, type=Study)


def _selected_runs(
    plan: Study, variants: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[tuple[str, int]]:
    """Return variants and seeds, seed by seed: the first seed of all is there soonest."""
    for name in variants or []:
        if name not in plan.variants:
            raise ConfigError(
                f"--variants={name} is not one of {', '.join(plan.variants)}. Name one of them."
            )
    for seed in seeds or []:
        if not 0 <= seed < 2**63:
            raise ConfigError(f"--seeds={seed} is not a seed. Use 0 or more.")
    chosen = list(dict.fromkeys(seeds or plan.seeds))
    return [(name, seed) for seed in chosen for name in dict.fromkeys(variants or plan.variants)]


def _check(plan: Study, grid: Sequence[StudyRun]) -> None:
    """Check every run file, suite and figure that is named, before the first run."""
    known = {"loss"} if plan.held_out is not None else set()
    for file in (plan.suite, plan.analyse):
        if file is not None:
            for name, task in load_suite(grid[0].file(file)).tasks.items():
                heads = task.tasks if isinstance(task, RulerTask) else [name]
                known |= {f"{head}.{length}" for head in heads for length in task.lengths}
    for figure in plan.figures():
        head = ".".join(figure.split(".")[:2])
        if head not in known and not ("loss" in known and figure.startswith("loss.")):
            raise ConfigError(
                f"rules or columns name {figure}, but no task is {head} (there are "
                f"{', '.join(sorted(known))}). Correct it."
            )
    for variant in dict.fromkeys(run.variant for run in grid):
        run = next(run for run in grid if run.variant == variant)
        config = load(run.file(plan.run), run.overrides())
        check_study(config)
        check_run(config, 1)


def _check_trunks(missing: Sequence[StudyRun]) -> None:
    """Refuse a branch whose trunk has no result and is not asked for."""
    for run in missing:
        trunk = run.trunk
        if trunk is not None and trunk not in missing and not trunk.result.exists():
            raise ConfigError(
                f"{run.name} begins with a checkpoint of {trunk.name}, which has not been trained. "
                f"Name {trunk.variant} among --variants too."
            )


def _next(waiting: list[StudyRun], running: Collection[StudyRun]) -> StudyRun | None:
    """Take the first run that waits for no trunk; None where each of them does."""
    for run in waiting:
        if run.trunk not in waiting and run.trunk not in running:
            waiting.remove(run)
            return run
    return None


def _on_gpu(run: StudyRun) -> bool:
    """Return whether runs will use a GPU.

    The system is asked, not torch: CUDA, once looked at, cannot be used after a fork.
    """
    config = load(run.file(run.plan.run), run.overrides())
    return config.device == "cuda" or (config.device == "auto" and Path("/dev/nvidia0").exists())


@contextmanager
def _only_study(out: Path) -> Iterator[None]:
    """Keep other studies out of `out` while the block runs; a killed one leaves nothing behind."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "study.lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(
            f"--out={out} cannot be written to ({error.strerror}). Name a folder that can be."
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{out} is in use by another study. Wait for it.") from None
        yield


def _run_all(missing: Sequence[StudyRun], jobs: int, fork: bool) -> int:
    """Run processes, `jobs` at a time, until all are done or one met a mistake of the user's.

    A stop signal is handed to them: they save and end.
    """
    if fork:
        if jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        import megahybrid.commands.analyse
        import megahybrid.commands.evaluate
        import megahybrid.train.run  # noqa: F401 (all of torch and DeepSpeed once, for all runs)

    waiting, code = list(missing), EXIT_DONE
    running: dict[int, StudyRun] = {}
    began: dict[int, float] = {}
    stopping, done = False, 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for child in running:
            os.kill(child, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        while running or (waiting and not stopping and code != EXIT_USER_MISTAKE):
            while waiting and len(running) < jobs and not stopping and code != EXIT_USER_MISTAKE:
                ready = _next(waiting, running.values())
                if ready is None:  # each of them waits for one that is running
                    break
                run = ready
                child = run.start(fork)
                running[child], began[child] = run, time.monotonic()
            child, status = os.wait()
            if child not in running:
                continue
            run, ended = running.pop(child), os.waitstatus_to_exitcode(status)
            done += ended == EXIT_DONE
            _report_end(f"{done} of {len(missing)}", run, ended, time.monotonic() - began[child])
            # A mistake of the user's outweighs a failure: other runs would only repeat it.
            failed = ended if ended >= 0 else 128 - ended
            code = EXIT_USER_MISTAKE if EXIT_USER_MISTAKE in (code, failed) else code or failed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_RESUME if stopping else code


def _report_end(done: str, run: StudyRun, ended: int, seconds: float) -> None:
    if ended == EXIT_DONE:
        print(f"{done}: {run.name} ({seconds:.0f} s)", flush=True)
        return
    last = [line for line in run.log.read_text().splitlines() if line.strip()][-1:] or ["no output"]
    what = "stopped" if ended == EXIT_RESUME else f"failed with code {ended}"
    print(f"{done}: {run.name} {what}: {last[0]} (log: {run.log})", file=sys.stderr, flush=True)
