"""Commands about run files and runs: train, check, describe, compare, report, watch, study."""

import argparse
from pathlib import Path

from megahybrid.cli.arguments import command, run_file


def add_run_commands(commands: argparse._SubParsersAction) -> None:
    train = command(commands, "train", _train, "train a run, or go on with it where it stopped")
    run_file(train)
    train.add_argument(
        "--processes", type=int, metavar="N", help="ranks on this machine (default: as many as fit)"
    )
    train.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start ranks that failed or hang again, so often at most",
    )
    train.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field that may differ from what the run was started with: model.layer_plan",
    )
    check = command(
        commands, "check", _check, "everything that can be told without training, in a second"
    )
    run_file(check)
    check.add_argument("--world-size", type=int, metavar="N", help="ranks the run will have")
    check.add_argument("--site", metavar="SITE", help="on a cluster: memory, hours, checkpoints")
    check.add_argument("--nodes", type=int, metavar="N", help="of the site")
    check.add_argument(
        "--no-files", action="store_true", help="look for no data: they are on another machine"
    )
    describe = command(commands, "describe", _describe, "layers, parameters, FLOPs and memory")
    run_file(describe)
    describe.add_argument("--json", action="store_true", help="the same figures as JSON")
    describe.add_argument("--world-size", type=int, metavar="N", help="ranks for memory per rank")
    compare = command(commands, "compare", _compare, "what differs between two runs")
    compare.add_argument("first", type=Path, metavar="A", help="a run file, or a run's folder")
    compare.add_argument("second", type=Path, metavar="B")
    report = command(commands, "report", _report, "plots and one page about a run")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    report.add_argument(
        "--html", action="store_true", help="the page alone; several runs stand side by side on it"
    )
    report.add_argument(
        "--wandb", choices=("offline", "online"), help="add its tables and pictures to wandb's run"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="of --html: where to write it")
    watch = command(commands, "watch", _watch, "serve a run's page while the run goes on")
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    watch.add_argument("--port", type=int, default=8800, help="0 takes any that is free")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen on")
    watch.add_argument(
        "--allow-others", action="store_true", help="let --host be one that others can reach"
    )


def add_study_command(commands: argparse._SubParsersAction) -> None:
    study = command(commands, "study", _study, "train and score a grid of variants and seeds")
    study.add_argument("folder", type=Path, metavar="DIR", help="folder with a study.yaml")
    study.add_argument("--out", type=Path, metavar="OUT", help="default: runs/<DIR's name>")
    study.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    study.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these instead")
    study.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core)")
    study.add_argument("--table", action="store_true", help="only print what has come out so far")


def _train(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.train import train

    return train(
        arguments.run_file,
        arguments.overrides,
        arguments.processes,
        arguments.allow,
        arguments.max_restarts,
        tables=True,
    )


def _check(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.check import check

    return check(
        arguments.run_file,
        arguments.overrides,
        world_size=arguments.world_size,
        site=arguments.site,
        nodes=arguments.nodes,
        files=not arguments.no_files,
    )


def _describe(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.check import describe

    return describe(
        arguments.run_file,
        arguments.overrides,
        world_size=arguments.world_size,
        as_json=arguments.json,
    )


def _compare(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.compare_runs import compare_runs

    return compare_runs(arguments.first, arguments.second)


def _report(arguments: argparse.Namespace) -> int:
    from megahybrid.commands.report import report

    return report(
        arguments.runs, page_alone=arguments.html, out=arguments.out, wandb=arguments.wandb
    )


def _watch(arguments: argparse.Namespace) -> int:
    from megahybrid.report.watch import watch

    return watch(
        arguments.runs,
        host=arguments.host,
        port=arguments.port,
        allow_others=arguments.allow_others,
    )


def _study(arguments: argparse.Namespace) -> int:
    from megahybrid.study.grid import study

    return study(
        arguments.folder,
        out=arguments.out,
        variants=arguments.variants,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        tabulate_only=arguments.table,
    )
