"""`megahybrid check` and `megahybrid describe`: what a run file alone can tell, without a rank."""

import json
from collections.abc import Sequence
from pathlib import Path

from megahybrid.config import RunConfig, check_run, load
from megahybrid.config.explain import show
from megahybrid.errors import EXIT_DONE, ConfigError, DataError

MOST_RANKS = 10_000_000  # what is counted for each of them stays within 64 bits


def check(
    run_file: Path,
    overrides: Sequence[str],
    *,
    world_size: int | None = None,
    site: str | None = None,
    nodes: int | None = None,
    files: bool = True,
) -> int:
    """Print what the run is, or every mistake in it; with a site, what is known of it there.

    Raises DataError for data, suites, checkpoints and packages that it names and that are not here;
    without `files` none are looked for.
    """
    if site is None and nodes is None:
        from megahybrid.config.summary import summary

        run = _checked(run_file, overrides, world_size)
        print(summary(run, world_size))
        _print_warnings(run)
        return _refuse_missing(run, files)
    if site is None or nodes is None or world_size is not None:
        raise ConfigError(
            f"--site={site} and --nodes={nodes} go together and without "
            "--world-size (it is nodes times the site's ranks per node). Give both."
        )
    return _check_on_site(run_file, overrides, site, nodes, files)


def _check_on_site(
    run_file: Path, overrides: Sequence[str], site: str, nodes: int, files: bool
) -> int:
    from megahybrid.config.summary import summary
    from megahybrid.launch.forecast import forecast
    from megahybrid.launch.submit import plan

    job, run = plan(run_file, overrides, site=site, nodes=nodes)
    print(summary(run, job.world_size))
    print("\n".join(forecast(job, run)))
    _print_warnings(run)
    return _refuse_missing(run, files)


def _print_warnings(run: RunConfig) -> None:
    from megahybrid.config.advice import warnings

    for line in warnings(run):
        print(line)


def _refuse_missing(run: RunConfig, files: bool) -> int:
    """Raise DataError, a line for each thing that is missing; EXIT_DONE where all is there."""
    if not files:
        return EXIT_DONE
    from megahybrid.config.files import missing_files
    from megahybrid.printable import printable

    if lines := [printable(line) for line in missing_files(run)]:
        raise DataError(*lines, "For a machine without these files: --no-files.")
    return EXIT_DONE


def describe(
    run_file: Path,
    overrides: Sequence[str],
    *,
    world_size: int | None = None,
    as_json: bool = False,
) -> int:
    """Print a run's layers, parameters, FLOPs and memory."""
    from megahybrid.config.describe import describe, render
    from megahybrid.config.missing_data import dataset_exists
    from megahybrid.interop.architectures.table import huggingface_fits

    run = _checked(run_file, overrides, world_size)
    description = describe(run, world_size, huggingface_fits)
    if any(dataset_exists(path) for _, path in run.data.datasets()):
        from megahybrid.data.shares import data_shares  # with numpy

        description["data"] = data_shares(run)
    print(json.dumps(description, indent=2) if as_json else render(description))
    return EXIT_DONE


def _checked(run_file: Path, overrides: Sequence[str], world_size: int | None) -> RunConfig:
    """The run that is named, checked against the number of ranks where that is given."""
    run = load(run_file, overrides)
    if world_size is not None and not 1 <= world_size <= MOST_RANKS:
        least = "1 or more" if world_size < 1 else f"{MOST_RANKS:,} or fewer"
        raise ConfigError(f"--world-size={show(world_size)} is no number of ranks. Use {least}.")
    check_run(run, world_size)
    return run
