"""`megahybrid launch …`: a function for each command, and what it prints."""

from collections.abc import Sequence
from pathlib import Path

from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.run_folder import holds_run


def control(verb: str, run_directory: Path) -> int:
    """Ask something of a run on the cluster: stop, save, cancel or requeue."""
    from megahybrid.launch import control

    _check_run(run_directory)
    actions = {
        "stop": control.stop,
        "save": control.save,
        "cancel": control.cancel,
        "requeue": control.requeue,
    }
    print(actions[verb](run_directory))
    return EXIT_DONE


def nodes(run_directory: Path) -> int:
    """Print the nodes that the run met, their state and failures."""
    from megahybrid.launch.status import node_lines

    _check_run(run_directory)
    print("\n".join(node_lines(run_directory)))
    return EXIT_DONE


def _check_run(directory: Path) -> None:
    """Raise ConfigError where no run is: a request that is written there would reach nobody."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder. Name the directory of a run.")
    if not holds_run(directory):
        raise ConfigError(
            f"{directory} holds no run (no ledger, checkpoints, job or logs). Name the directory "
            "of a run."
        )


def submit(
    run_file: Path,
    overrides: Sequence[str],
    *,
    site: str,
    nodes: int,
    name: str | None = None,
    dry_run: bool = False,
    chain: int = 1,
    array: int | None = None,
    spares: int = 0,
    exclude: Sequence[str] = (),
) -> int:
    """Submit a run as a chain or an array of jobs; with `dry_run` print the script alone."""
    from megahybrid.launch.forecast import forecast
    from megahybrid.launch.script import batch_script
    from megahybrid.launch.submit import plan, submit

    job, resolved = plan(
        run_file,
        overrides,
        site=site,
        nodes=nodes,
        name=name,
        spares=spares,
        exclude=list(exclude),
        chain=chain if array is None else array,
        array=array is not None,
    )
    if dry_run:
        print(batch_script(job), end="")
        print("".join(f"# {line}\n" for line in forecast(job, resolved)), end="")
        return EXIT_DONE
    for line in forecast(job, resolved):
        print(line)
    numbers = submit(job, resolved)
    print(f"job {', '.join(numbers)} submitted; see: megahybrid launch status {job.run_directory}")
    return EXIT_DONE


def status(runs: Sequence[Path]) -> int:
    """Print one line for each run; of all under runs/ where none is named."""
    from megahybrid.launch.job import FOLDER
    from megahybrid.launch.status import read_queue, status_line

    for path in runs:
        _check_run(path)
    named = runs or sorted(path.parent for path in Path("runs").glob(f"*/{FOLDER}"))
    queue = read_queue()
    for path in named:
        print(status_line(path.absolute(), queue))
    if not named:
        print("runs/ holds no run that was submitted. Name a run's folder.")
    return EXIT_DONE


def tail(run_directory: Path, lines: int, *, follow: bool = False) -> int:
    """Print the ranks' last lines, the first real error first."""
    from megahybrid.launch import tail
    from megahybrid.launch.control import queued

    _check_run(run_directory)
    print("\n".join(tail.tail(run_directory, lines)), flush=True)
    if follow:
        tail.follow(
            run_directory, lambda line: print(line, flush=True), lambda: bool(queued(run_directory))
        )
    return EXIT_DONE
