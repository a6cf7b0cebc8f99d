"""`megahybrid launch …`: the arguments, and what each command prints."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.run_folder import holds_run


def add_arguments(commands: argparse._SubParsersAction) -> None:
    """The command `launch` with its own commands."""
    text = "run on a Slurm cluster: submit, watch, stop, requeue"
    launch = commands.add_parser("launch", help=text, description=text[0].upper() + text[1:] + ".")
    verbs = launch.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    submit = _verb(verbs, "submit", "submit a run, or go on with it")
    submit.add_argument("run_file", type=Path, metavar="RUN.yaml")
    submit.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    submit.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes that compute")
    submit.add_argument(
        "--site",
        required=True,
        metavar="SITE",
        help="a name under configs/sites/ (here, or megahybrid's own), or a file",
    )
    submit.add_argument("--name", metavar="NAME", help="in the queue (default: the run's)")
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    row = submit.add_mutually_exclusive_group()
    row.add_argument(
        "--chain", type=int, default=1, metavar="K", help="K jobs, each after the one before"
    )
    row.add_argument("--array", type=int, metavar="K", help="the same as one array of K tasks")
    submit.add_argument("--spares", type=int, default=0, metavar="S", help="nodes that stand by")
    submit.add_argument("--exclude", default="", metavar="NODES", help="nodes not to use: n3,n7")
    status = _verb(verbs, "status", "one line for each run")
    status.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="default: runs/*")
    tail = _run_verb(verbs, "tail", "the ranks' last lines, the first real error first")
    tail.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="of each rank")
    tail.add_argument("-f", "--follow", action="store_true", help="go on until the jobs have ended")
    _run_verb(verbs, "stop", "save, then end and do not come back")
    _run_verb(verbs, "save", "write a checkpoint at the end of this step")
    _run_verb(verbs, "cancel", "end all jobs of the run now")
    _run_verb(verbs, "requeue", "save and start again; or submit an ended run's script again")
    _run_verb(verbs, "nodes", "the nodes the run met, their state and failures")


def _verb(verbs: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def _run_verb(verbs: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    verb = _verb(verbs, name, text)
    verb.add_argument("run_directory", type=Path, metavar="RUN", help="a run's folder")
    return verb


def run(arguments: argparse.Namespace) -> int:
    """One command; returns the exit code."""
    if arguments.verb == "submit":
        return _submit(arguments)
    if arguments.verb == "status":
        return _status(arguments.runs)
    directory = arguments.run_directory
    _check_run(directory)
    if arguments.verb == "tail":
        return _tail(directory, arguments.lines, arguments.follow)
    if arguments.verb == "nodes":
        from megahybrid.launch.status import node_lines

        print("\n".join(node_lines(directory)))
        return EXIT_DONE
    from megahybrid.launch import control

    actions = {
        "stop": control.stop,
        "save": control.save,
        "cancel": control.cancel,
        "requeue": control.requeue,
    }
    print(actions[arguments.verb](directory))
    return EXIT_DONE


def _check_run(directory: Path) -> None:
    """Raise ConfigError where no run is: a request that is written there would reach nobody."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no folder. Name the directory of a run.")
    if not holds_run(directory):
        raise ConfigError(
            f"{directory} holds no run (no ledger, checkpoints, job or logs). Name the directory "
            "of a run."
        )


def _submit(arguments: argparse.Namespace) -> int:
    from megahybrid.launch.forecast import forecast
    from megahybrid.launch.script import batch_script
    from megahybrid.launch.submit import plan, submit

    job, resolved = plan(
        arguments.run_file,
        arguments.overrides,
        site=arguments.site,
        nodes=arguments.nodes,
        name=arguments.name,
        spares=arguments.spares,
        exclude=[node for node in arguments.exclude.split(",") if node],
        chain=arguments.chain if arguments.array is None else arguments.array,
        array=arguments.array is not None,
    )
    if arguments.dry_run:
        print(batch_script(job), end="")
        print("".join(f"# {line}\n" for line in forecast(job, resolved)), end="")
        return EXIT_DONE
    for line in forecast(job, resolved):
        print(line)
    numbers = submit(job, resolved)
    print(f"job {', '.join(numbers)} submitted; see: megahybrid launch status {job.run_directory}")
    return EXIT_DONE


def check(run_file: Path, overrides: Sequence[str], site: str, nodes: int) -> int:
    """`megahybrid check RUN.yaml --site SITE --nodes N`: the run and what is known of it there."""
    from megahybrid.config.missing_data import missing_in_words
    from megahybrid.config.summary import summary
    from megahybrid.launch.forecast import forecast
    from megahybrid.launch.submit import plan
    from megahybrid.printable import printable

    job, run = plan(run_file, overrides, site=site, nodes=nodes)
    print(summary(run, job.world_size))
    print("\n".join(forecast(job, run)))
    if (missing := missing_in_words(run)) is not None:
        print(printable(missing))
    return EXIT_DONE


def _status(runs: list[Path]) -> int:
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


def _tail(directory: Path, lines: int, follow: bool) -> int:
    from megahybrid.launch import tail
    from megahybrid.launch.control import queued

    print("\n".join(tail.tail(directory, lines)), flush=True)
    if follow:
        tail.follow(
            directory, lambda line: print(line, flush=True), lambda: bool(queued(directory))
        )
    return EXIT_DONE
