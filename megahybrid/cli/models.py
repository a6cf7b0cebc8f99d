"""Commands about one trained model: evaluate, analyse, sample, export, import."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megahybrid.cli.arguments import changes, checkpoint, command, context_ranks, named_data
from megahybrid.errors import ConfigError

if TYPE_CHECKING:
    from megahybrid.parallel.mesh import ParallelMesh


def add_checkpoint_commands(commands: argparse._SubParsersAction) -> None:
    evaluate = command(
        commands, "evaluate", _evaluate, "held-out loss by position, or a suite's questions"
    )
    checkpoint(evaluate)
    context_ranks(evaluate)
    evaluate.add_argument(
        "suite", nargs="?", type=Path, metavar="SUITE.yaml", help="needles, puzzles, RULER"
    )
    evaluate.add_argument("--tokenizer", type=Path, help="for a suite, if the run names none")
    evaluate.add_argument(
        "--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness instead"
    )
    evaluate.add_argument("--include", type=Path, metavar="DIR", help="its task files of your own")
    evaluate.add_argument("--limit", type=int, metavar="N", help="its documents per task at most")
    named_data(evaluate, "datasets instead of the run's held-out sets")
    evaluate.add_argument(
        "--length", type=int, metavar="N", help="tokens of a row; loss by position reaches as far"
    )
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="tokens scored at most")
    evaluate.add_argument(
        "--beyond",
        action="store_true",
        help="also rows of 2, 4 and 8 times the trained length, and a sliding window",
    )
    evaluate.add_argument(
        "--context-gain",
        nargs="*",
        type=int,
        metavar="C",
        help="instead: nats that tokens further back than the last C are worth (default: the "
        "trained length)",
    )
    evaluate.add_argument(
        "--stride", type=int, metavar="S", help="its windows begin every S tokens (default: C / 2)"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    changes(evaluate)
    analyse = command(commands, "analyse", _analyse, "what the heads look at while they answer")
    checkpoint(analyse)
    context_ranks(analyse)
    analyse.add_argument(
        "suite", nargs="?", type=Path, metavar="SUITE.yaml", help="whose needles and puzzles"
    )
    named_data(analyse, "hay for needles: datasets instead of the run's held-out sets")
    analyse.add_argument("--examples", type=Path, metavar="FILE.json", help="your own token ids")
    analyse.add_argument("--length", type=int, metavar="N", help="tokens (default: as trained)")
    analyse.add_argument("--depth", type=float, help="of the needle: 0 to 1 (default: 0.5)")
    analyse.add_argument(
        "--trials", type=int, metavar="N", help="texts to average over (default: 8)"
    )
    analyse.add_argument(
        "--threshold", type=float, default=0.1, help="needle mass of a retrieval head"
    )
    analyse.add_argument("--tokenizer", type=Path, help="tokenizer file, if the run names none")
    analyse.add_argument("--json", action="store_true", help="print JSON")
    analyse.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw needle mass by layer and head"
    )
    changes(analyse)
    sample = command(commands, "sample", _sample, "continue a prompt")
    checkpoint(sample)
    asked = sample.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="text to continue")
    asked.add_argument(
        "--chat",
        metavar="TEMPLATE",
        help="talk instead, a line a turn: chatml, llama3, cohere, plain, or a .jinja file",
    )
    sample.add_argument("--system", metavar="TEXT", help="with --chat: what is said first")
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


def add_interop_commands(commands: argparse._SubParsersAction) -> None:
    export = command(commands, "export", _export, "a checkpoint as a folder for transformers")
    export.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="default: fp32, or bf16 where no weight is rounded by it, as after an import",
    )
    export.add_argument("--architecture", metavar="NAME", help="the class to say the model in")
    export.add_argument("--tokenizer", metavar="FILE", help="the run's when left out; or: none")
    export.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="the model chats: chatml, llama3, cohere, plain, or a .jinja file",
    )
    bring_in = command(commands, "import", _import, "a Hugging Face folder as a checkpoint")
    bring_in.add_argument("folder", type=Path, metavar="HF_DIR", help="folder on this disk")
    bring_in.add_argument("run_file", type=Path, metavar="RUN.yaml", help="written if missing")
    bring_in.add_argument(
        "out", type=Path, nargs="?", metavar="OUT",
        help="folder to make (default: what RUN.yaml starts from, or runs/NAME-imported)",
    )  # fmt: skip
    bring_in.add_argument("--plan", type=Path, metavar="FILE", help="another layer plan for it")
    bring_in.add_argument("--data", type=Path, metavar="DIR", help="loss before and after --plan")


def _on_ranks(
    arguments: argparse.Namespace,
    work: "Callable[[ParallelMesh], int]",
    context: int | None = None,
) -> int:
    from megahybrid.commands.model_ranks import on_model_ranks

    return on_model_ranks(work, arguments.tensor, context, arguments.device, arguments.words)


def _evaluate(arguments: argparse.Namespace) -> int:
    _refuse_mixtures(arguments)
    return _on_ranks(arguments, lambda mesh: _evaluate_on(mesh, arguments), arguments.context)


def _evaluate_on(mesh: "ParallelMesh", arguments: argparse.Namespace) -> int:
    from megahybrid.commands.named_data import named_sets

    if arguments.lm_eval:
        from megahybrid.commands.lm_eval import evaluate_lm_eval

        return evaluate_lm_eval(
            arguments.checkpoint,
            arguments.lm_eval,
            mesh,
            include=arguments.include,
            length=arguments.length,
            limit=arguments.limit,
            tokenizer=arguments.tokenizer,
        )
    if arguments.suite is not None:
        from megahybrid.commands.suite import evaluate_suite

        return evaluate_suite(
            arguments.checkpoint,
            arguments.suite,
            mesh,
            data=named_sets(arguments.data),
            tokenizer=arguments.tokenizer,
            changes=arguments.change,
            as_json=arguments.json,
        )
    if arguments.context_gain is not None:
        from megahybrid.commands.context_gain import context_gain

        return context_gain(
            arguments.checkpoint,
            mesh,
            arguments.context_gain,
            stride=arguments.stride,
            data=named_sets(arguments.data),
            length=arguments.length,
            max_tokens=arguments.max_tokens,
            changes=arguments.change,
            as_json=arguments.json,
        )
    from megahybrid.commands.evaluate import evaluate

    return evaluate(
        arguments.checkpoint,
        mesh,
        data=named_sets(arguments.data),
        length=arguments.length,
        max_tokens=arguments.max_tokens,
        changes=arguments.change,
        beyond=arguments.beyond,
        as_json=arguments.json,
    )


def _refuse_mixtures(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for an option that belongs to another of evaluate's four kinds."""
    given = {
        "--data": ",".join(arguments.data) or None,
        "--length": arguments.length,
        "--max-tokens": arguments.max_tokens,
        "--beyond": arguments.beyond or None,
        "--include": arguments.include,
        "--limit": arguments.limit,
        "--tokenizer": arguments.tokenizer,
        "--json": arguments.json or None,
        "--change": arguments.change or None,
        "--context-gain": arguments.context_gain,
        "--stride": arguments.stride,
    }
    known: tuple[str, ...]
    if arguments.lm_eval:
        kind, asked = "lm-evaluation-harness", f"--lm-eval {' '.join(arguments.lm_eval)}"
        known = ("--length", "--include", "--limit", "--tokenizer")
        given["a suite"] = arguments.suite
    elif arguments.suite is not None:
        kind, asked = "a suite", str(arguments.suite)
        known = ("--data", "--tokenizer", "--json", "--change")
    elif arguments.context_gain is not None:
        kind, asked = (
            "context gain",
            " ".join(["--context-gain", *map(str, arguments.context_gain)]),
        )
        options = ("--data", "--length", "--max-tokens", "--json", "--change")
        known = ("--context-gain", "--stride", *options)
    else:
        kind, asked = "held-out loss", "no suite and no --lm-eval"
        known = ("--data", "--length", "--max-tokens", "--beyond", "--json", "--change")
    for name, value in given.items():
        if value is not None and name not in known:
            if isinstance(value, list) and name == "--context-gain":
                value = " ".join(map(str, value)) or True
            said = name if value is True else f"{name}={value}"
            raise ConfigError(f"{said} says nothing to {kind} ({asked} given). Leave it out.")


def _analyse(arguments: argparse.Namespace) -> int:
    def work(mesh: "ParallelMesh") -> int:
        from megahybrid.commands.analyse import analyse
        from megahybrid.commands.named_data import named_sets

        return analyse(
            arguments.checkpoint,
            mesh,
            suite_file=arguments.suite,
            examples_file=arguments.examples,
            data=named_sets(arguments.data),
            length=arguments.length,
            depth=arguments.depth,
            trials=arguments.trials,
            threshold=arguments.threshold,
            tokenizer=arguments.tokenizer,
            changes=arguments.change,
            as_json=arguments.json,
            picture=arguments.picture,
        )

    return _on_ranks(arguments, work, arguments.context)


def _sample(arguments: argparse.Namespace) -> int:
    def work(mesh: "ParallelMesh") -> int:
        from megahybrid.commands.sample import sample

        if arguments.chat is None and arguments.system is not None:
            raise ConfigError("--system begins a conversation. Add --chat, or leave it out.")
        if arguments.chat is not None:
            from megahybrid.commands.chat import chat

            return chat(
                arguments.checkpoint,
                mesh,
                template=arguments.chat,
                system=arguments.system,
                tokens=arguments.tokens,
                temperature=arguments.temperature,
                seed=arguments.seed,
                tokenizer=arguments.tokenizer,
                context=arguments.context,
            )
        return sample(
            arguments.checkpoint,
            mesh,
            prompt=arguments.prompt,
            tokens=arguments.tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            tokenizer=arguments.tokenizer,
            context=arguments.context,
        )

    return _on_ranks(arguments, work)


def _export(arguments: argparse.Namespace) -> int:
    from megahybrid.interop.export import export

    return export(
        arguments.checkpoint,
        arguments.out,
        dtype=arguments.dtype,
        architecture=arguments.architecture,
        tokenizer=arguments.tokenizer,
        chat_template=arguments.chat_template,
    )


def _import(arguments: argparse.Namespace) -> int:
    from megahybrid.interop.import_model import import_model

    return import_model(
        arguments.folder,
        arguments.run_file,
        arguments.out,
        plan_file=arguments.plan,
        data=arguments.data,
    )
