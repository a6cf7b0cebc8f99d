"""`megahybrid launch …`: run on a Slurm cluster."""

import argparse
from pathlib import Path

from megahybrid.cli.arguments import command, described


def add_launch_commands(commands: argparse._SubParsersAction) -> None:
    """Add `launch` with its own commands."""
    text = "run on a Slurm cluster: submit, watch, stop, requeue"
    launch = command(commands, "launch", _launch, text)
    verbs = launch.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    submit = described(verbs, "submit", "submit a run, or go on with it")
    submit.add_argument("run_file", type=Path, metavar="RUN.yaml")
    submit.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    submit.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes that compute")
    submit.add_argument(
        "--site",
        required=True,
        metavar="SITE",
        help="a name under configs/sites/ (here, or megahybrid's own), or a file",
    )
    submit.add_argument("--name", metavar="NAME", help="name in the queue (default: the run's)")
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    row = submit.add_mutually_exclusive_group()
    row.add_argument(
        "--chain", type=int, default=1, metavar="K", help="K jobs, each after the one before"
    )
    row.add_argument("--array", type=int, metavar="K", help="the same as one array of K tasks")
    submit.add_argument("--spares", type=int, default=0, metavar="S", help="spare nodes")
    submit.add_argument("--exclude", default="", metavar="NODES", help="nodes to leave out: n3,n7")
    status = described(verbs, "status", "one line for each run")
    status.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="default: runs/*")
    tail = _run_verb(verbs, "tail", "the ranks' last lines, the first real error first")
    tail.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="lines of each rank")
    tail.add_argument(
        "-f", "--follow", action="store_true", help="follow until the jobs have ended"
    )
    _run_verb(verbs, "stop", "save, then end and do not come back")
    _run_verb(verbs, "save", "write a checkpoint at the end of this step")
    _run_verb(verbs, "cancel", "end all jobs of the run now")
    _run_verb(verbs, "requeue", "save and start again; or submit an ended run's script again")
    _run_verb(verbs, "nodes", "the nodes that the run used, their state and failures")


def _run_verb(verbs: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    verb = described(verbs, name, text)
    verb.add_argument("run_directory", type=Path, metavar="RUN", help="a run's folder")
    return verb


def _launch(arguments: argparse.Namespace) -> int:
    from megahybrid.commands import launch

    match arguments.verb:
        case "submit":
            return launch.submit(
                arguments.run_file,
                arguments.overrides,
                site=arguments.site,
                nodes=arguments.nodes,
                name=arguments.name,
                dry_run=arguments.dry_run,
                chain=arguments.chain,
                array=arguments.array,
                spares=arguments.spares,
                exclude=[node for node in arguments.exclude.split(",") if node],
            )
        case "status":
            return launch.status(arguments.runs)
        case "tail":
            return launch.tail(arguments.run_directory, arguments.lines, follow=arguments.follow)
        case "nodes":
            return launch.nodes(arguments.run_directory)
        case verb:
            return launch.control(verb, arguments.run_directory)
