"""The command line. Parsing imports nothing heavy; each command imports what it needs."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megahybrid.errors import EXIT_DONE, ConfigError, MegahybridError

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one line and code 2."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse ends a list of overrides at the first option; they may stand behind it as well.
    strays = [word for word in rest if word.startswith("-") or "=" not in word]
    if strays or (rest and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        return parsed.run(parsed)
    except MegahybridError as error:
        for line in str(error).splitlines():
            print(f"megahybrid: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left (`| head`): nothing is wrong and nothing is owed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megahybrid",
        description="Pretrain long-context language models whose layers differ in how they see "
        "position.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run_commands(commands)
    _add_checkpoint_commands(commands)
    _add_study_command(commands)
    _add_interop_commands(commands)
    _add_stored_commands(commands)
    _add_data_commands(commands)
    _add_launch_commands(commands)
    return parser


def _add_run_commands(commands: argparse._SubParsersAction) -> None:
    train = _command(commands, "train", _train, "train a run, or go on with it where it stopped")
    _run_file(train)
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
    check = _command(commands, "check", _check, "everything the config alone can tell, in a second")
    _run_file(check)
    check.add_argument("--world-size", type=int, metavar="N", help="ranks the run will have")
    check.add_argument("--site", metavar="SITE", help="on a cluster: memory, hours, checkpoints")
    check.add_argument("--nodes", type=int, metavar="N", help="of the site")
    describe = _command(commands, "describe", _describe, "layers, parameters, FLOPs and memory")
    _run_file(describe)
    describe.add_argument("--json", action="store_true", help="the same figures as JSON")
    describe.add_argument("--world-size", type=int, metavar="N", help="ranks for memory per rank")
    compare = _command(commands, "compare", _compare, "what differs between two runs")
    compare.add_argument("first", type=Path, metavar="A", help="a run file, or a run's folder")
    compare.add_argument("second", type=Path, metavar="B")
    report = _command(commands, "report", _report, "plots and one page about a run")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    report.add_argument(
        "--html", action="store_true", help="the page alone; several runs stand side by side on it"
    )
    report.add_argument(
        "--wandb", choices=("offline", "online"), help="add its tables and pictures to wandb's run"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="of --html: where to write it")
    watch = _command(commands, "watch", _watch, "serve a run's page while the run goes on")
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    watch.add_argument("--port", type=int, default=8800, help="0 takes any that is free")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen on")
    watch.add_argument(
        "--allow-others", action="store_true", help="let --host be one that others can reach"
    )


def _add_checkpoint_commands(commands: argparse._SubParsersAction) -> None:
    evaluate = _command(
        commands, "evaluate", _evaluate, "held-out loss by position, or a suite's questions"
    )
    _checkpoint(evaluate)
    evaluate.add_argument(
        "suite", nargs="?", type=Path, metavar="SUITE.yaml", help="needles, puzzles, RULER"
    )
    evaluate.add_argument("--tokenizer", type=Path, help="for a suite, if the run names none")
    evaluate.add_argument(
        "--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness instead"
    )
    evaluate.add_argument("--include", type=Path, metavar="DIR", help="its task files of your own")
    evaluate.add_argument("--limit", type=int, metavar="N", help="its documents per task at most")
    evaluate.add_argument("--data", type=Path, metavar="DIR", help="another dataset to score")
    evaluate.add_argument(
        "--length", type=int, metavar="N", help="tokens of a row; loss by position reaches as far"
    )
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="tokens scored at most")
    evaluate.add_argument(
        "--beyond",
        action="store_true",
        help="also rows of 2, 4 and 8 times the trained length, and a sliding window",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _changes(evaluate)
    analyse = _command(commands, "analyse", _analyse, "what the heads look at while they answer")
    _checkpoint(analyse)
    analyse.add_argument(
        "suite", nargs="?", type=Path, metavar="SUITE.yaml", help="whose needles and puzzles"
    )
    analyse.add_argument("--examples", type=Path, metavar="FILE.json", help="your own token ids")
    analyse.add_argument("--length", type=int, metavar="N", help="tokens (default: as trained)")
    analyse.add_argument("--depth", type=float, default=0.5, help="of the needle: 0 to 1")
    analyse.add_argument("--trials", type=int, default=8, metavar="N", help="texts to average over")
    analyse.add_argument(
        "--threshold", type=float, default=0.1, help="needle mass of a retrieval head"
    )
    analyse.add_argument("--tokenizer", type=Path, help="tokenizer file, if the run names none")
    analyse.add_argument("--json", action="store_true", help="print JSON")
    _changes(analyse)
    sample = _command(commands, "sample", _sample, "continue a prompt")
    _checkpoint(sample)
    sample.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    sample.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to add")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    sample.add_argument("--seed", type=int, default=1)
    sample.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens the model sees (default: as it was trained)",
    )
    sample.add_argument("--tokenizer", type=Path, help="tokenizer file, if the run names none")


def _add_study_command(commands: argparse._SubParsersAction) -> None:
    study = _command(commands, "study", _study, "train and score a grid of variants and seeds")
    study.add_argument("folder", type=Path, metavar="DIR", help="folder with a study.yaml")
    study.add_argument("--out", type=Path, metavar="OUT", help="default: runs/<DIR's name>")
    study.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    study.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these instead")
    study.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core)")
    study.add_argument("--table", action="store_true", help="only print what has come out so far")


def _add_interop_commands(commands: argparse._SubParsersAction) -> None:
    export = _command(commands, "export", _export, "a checkpoint as a folder for transformers")
    export.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    export.add_argument("--architecture", metavar="NAME", help="the class to say the model in")
    export.add_argument("--tokenizer", metavar="FILE", help="the run's when left out; or: none")
    bring_in = _command(commands, "import", _import, "a Hugging Face folder as a checkpoint")
    bring_in.add_argument("folder", type=Path, metavar="HF_DIR", help="folder on this disk")
    bring_in.add_argument("run_file", type=Path, metavar="RUN.yaml", help="written if missing")
    bring_in.add_argument(
        "out", type=Path, nargs="?", metavar="OUT",
        help="folder to make (default: what RUN.yaml starts from, or runs/NAME-imported)",
    )  # fmt: skip
    bring_in.add_argument("--plan", type=Path, metavar="FILE", help="another layer plan for it")
    bring_in.add_argument("--data", type=Path, metavar="DIR", help="loss before and after --plan")


def _add_stored_commands(commands: argparse._SubParsersAction) -> None:
    from megahybrid.checkpoint.commands import add_arguments

    add_arguments(commands)
    commands.choices["checkpoint"].set_defaults(run=_stored)


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    from data_prep.arguments import add_arguments

    add_arguments(commands)
    commands.choices["data"].set_defaults(run=_data)


def _add_launch_commands(commands: argparse._SubParsersAction) -> None:
    from launch.commands import add_arguments

    add_arguments(commands)
    commands.choices["launch"].set_defaults(run=_launch)


def _command(
    commands: argparse._SubParsersAction, name: str, run: Run, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="fields to change, by dotted name: parallel.tensor=4",
    )


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint's folder, or a run's (its newest one)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _stored(arguments: argparse.Namespace) -> int:
    from megahybrid.checkpoint.commands import run

    return run(arguments)


def _changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="SCHEME.FIELD=VALUE",
        help="look at the model with a scheme changed: local.window=null",
    )


def _train(arguments: argparse.Namespace) -> int:
    from megahybrid.train.command import train

    return train(
        arguments.run_file,
        arguments.overrides,
        arguments.processes,
        arguments.allow,
        arguments.max_restarts,
        _track,
    )


def _track(directory: Path, suite: str | None, step: int) -> Any:
    """Training knows nothing of the report, which draws what its trackers show."""
    from megahybrid.report.tracked import tracked

    return tracked(directory, suite, step)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.site is not None or arguments.nodes is not None:
        if arguments.site is None or arguments.nodes is None or arguments.world_size is not None:
            raise ConfigError(
                f"--site={arguments.site} and --nodes={arguments.nodes} go together and without "
                "--world-size (it is nodes times the site's ranks per node). Give both."
            )
        from launch.commands import check

        return check(arguments.run_file, arguments.overrides, arguments.site, arguments.nodes)
    from megahybrid.config import load
    from megahybrid.config.summary import summary

    run = load(arguments.run_file, arguments.overrides)
    if arguments.world_size is not None and arguments.world_size < 1:
        raise ConfigError(
            f"--world-size={arguments.world_size} is no number of ranks. Use 1 or more."
        )
    run.check(arguments.world_size)
    print(summary(run, arguments.world_size))
    return EXIT_DONE


def _describe(arguments: argparse.Namespace) -> int:
    from megahybrid.config import load
    from megahybrid.config.describe import describe, render

    run = load(arguments.run_file, arguments.overrides)
    if arguments.world_size is not None and arguments.world_size < 1:
        raise ConfigError(
            f"--world-size={arguments.world_size} is no number of ranks. Use 1 or more."
        )
    run.check(arguments.world_size)
    description = describe(run, arguments.world_size)
    print(json.dumps(description, indent=2) if arguments.json else render(description))
    return EXIT_DONE


def _compare(arguments: argparse.Namespace) -> int:
    from megahybrid.train.compare_command import compare_runs

    return compare_runs(arguments.first, arguments.second)


def _report(arguments: argparse.Namespace) -> int:
    from megahybrid.report import write_page, write_report

    if arguments.out is not None and not arguments.html:
        raise ConfigError(f"--out={arguments.out} is for the page alone. Add --html.")
    if arguments.html:
        print(write_page(arguments.runs, arguments.out))
    for run in arguments.runs:
        for path in [] if arguments.html else write_report(run):
            print(path)
        if arguments.wandb:
            from megahybrid.report.tracked import send_report

            send_report(run, arguments.wandb)
    return EXIT_DONE


def _watch(arguments: argparse.Namespace) -> int:
    from megahybrid.report.watch import watch

    return watch(
        arguments.runs,
        host=arguments.host,
        port=arguments.port,
        allow_others=arguments.allow_others,
    )


def _data(arguments: argparse.Namespace) -> int:
    from data_prep.commands import run

    return run(arguments)


def _launch(arguments: argparse.Namespace) -> int:
    from launch.commands import run

    return run(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.lm_eval:
        from megahybrid.train.lm_eval_command import evaluate_lm_eval

        return evaluate_lm_eval(
            arguments.checkpoint,
            arguments.lm_eval,
            include=arguments.include,
            length=arguments.length,
            limit=arguments.limit,
            tokenizer=arguments.tokenizer,
            device=arguments.device,
        )
    if arguments.suite is not None:
        from megahybrid.train.suite_command import evaluate_suite

        others = {"--data": arguments.data, "--length": arguments.length}
        others |= {"--beyond": arguments.beyond or None}
        for name, value in (others | {"--max-tokens": arguments.max_tokens}).items():
            if value is not None:
                given = name if value is True else f"{name}={value}"
                raise ConfigError(
                    f"{given} is for held-out loss, but a suite was given "
                    f"({arguments.suite}). Leave one of them out."
                )
        return evaluate_suite(
            arguments.checkpoint,
            arguments.suite,
            tokenizer=arguments.tokenizer,
            device=arguments.device,
            changes=arguments.change,
            as_json=arguments.json,
        )
    from megahybrid.train.evaluate_command import evaluate

    return evaluate(
        arguments.checkpoint,
        data=arguments.data,
        length=arguments.length,
        max_tokens=arguments.max_tokens,
        device=arguments.device,
        changes=arguments.change,
        beyond=arguments.beyond,
        as_json=arguments.json,
    )


def _analyse(arguments: argparse.Namespace) -> int:
    from megahybrid.train.analyse_command import analyse

    return analyse(
        arguments.checkpoint,
        suite_file=arguments.suite,
        examples_file=arguments.examples,
        length=arguments.length,
        depth=arguments.depth,
        trials=arguments.trials,
        threshold=arguments.threshold,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        changes=arguments.change,
        as_json=arguments.json,
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


def _sample(arguments: argparse.Namespace) -> int:
    from megahybrid.train.sample_command import sample

    return sample(
        arguments.checkpoint,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        tokenizer=arguments.tokenizer,
        context=arguments.context,
        device=arguments.device,
    )


def _export(arguments: argparse.Namespace) -> int:
    from megahybrid.interop.export import export

    return export(
        arguments.checkpoint,
        arguments.out,
        dtype=arguments.dtype,
        architecture=arguments.architecture,
        tokenizer=arguments.tokenizer,
    )


def _import(arguments: argparse.Namespace) -> int:
    from megahybrid.interop.bring_in import import_model

    return import_model(
        arguments.folder,
        arguments.run_file,
        arguments.out,
        plan_file=arguments.plan,
        data=arguments.data,
    )
