"""`megahybrid evaluate --context-gain`: what the tokens further back than the last c are worth."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megahybrid.commands.evaluate import held_out_sets, print_model
from megahybrid.commands.trained_model import TrainedModel, header, keep, load_trained_model
from megahybrid.data.dataset import TokenDataset
from megahybrid.errors import EXIT_DONE, ConfigError, DataError
from megahybrid.evaluate.context_gain import ContextGain
from megahybrid.evaluate.gain_table import gain_positions_table, gain_table
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.validation import evaluation_loss

Gains = dict[str, list[ContextGain]]


def context_gain(
    path: Path,
    mesh: ParallelMesh,
    contexts: Sequence[int],
    *,
    stride: int | None = None,
    data: Mapping[str, Path] | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    changes: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Print the context gain beyond each of `contexts` (none: the stage's longest length) on the
    run's held-out sets, or on the datasets of `data`, and keep it in the run.

    Documents are read to `length` tokens (default: four times the run's longest). Windows of a
    context c begin every `stride` tokens (default: c // 2). Raises MegahybridError, one line, for
    whatever the user can mend. Returns the exit code.
    """
    trained = load_trained_model(path, mesh, changes)
    with Console(stderr=True).status("scoring") as status:

        def say(name: str, gain: ContextGain) -> None:
            status.update(f"{name}: {gain.tokens:,} tokens beyond {gain.context:,}")

        gains = measured(trained, contexts, stride, data, length, max_tokens, say)
    result = {
        **header(trained),
        "context_gain": [
            {"set": name, **gain.to_json()} for name, told in gains.items() for gain in told
        ],
    }
    kept = keep(trained, "context_gain", "held_out", result) if data is None else None
    if as_json:
        print(json.dumps(result, indent=2))
        return EXIT_DONE
    console = Console(highlight=False)
    print_model(console, trained)
    reach = next(iter(gains.values()))[0].length
    console.print(
        "\nContext gain: loss with the last tokens of the context alone, less loss with all of it "
        f"(nats per token; documents to {reach:,} tokens)"
    )
    console.print(gain_table(gains))
    for name, told in gains.items():
        strides = ", ".join(f"{one.context:,} to {one.context + one.stride - 1:,}" for one in told)
        console.print(f"\n{name}, by position in the document (shown: {strides} tokens)")
        console.print(gain_positions_table(told))
    if kept is not None:
        console.print(f"\nkept in {kept}", markup=False, soft_wrap=True)
    return EXIT_DONE


def measured(
    trained: TrainedModel,
    contexts: Sequence[int],
    stride: int | None = None,
    data: Mapping[str, Path] | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    say: Any = lambda name, gain: None,
) -> Gains:
    """The gains of each set, as `context_gain` prints them; nothing is printed."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens={max_tokens} scores nothing. Use 1 or more.")
    scored = held_out_sets(trained, data, length, max_tokens)
    asked = sorted(contexts) or [trained.length]
    _check(asked, stride, scored.longest)
    _check_documents(asked[0], scored.sets)
    gains: Gains = {name: [] for name in scored.sets}

    def tell(name: str, gain: ContextGain) -> None:
        gains[name].append(gain)
        say(name, gain)

    scored.score_gain(evaluation_loss(trained.model), asked, tell, stride)
    return gains


def _check(contexts: Sequence[int], stride: int | None, longest: int) -> None:
    for context in contexts:
        if context < 1:
            raise ConfigError(f"--context-gain={context} leaves no token. Use 1 or more.")
        if context + 2 > longest:
            raise ConfigError(
                f"--context-gain={context} leaves no token beyond it: documents are read to "
                f"{longest:,} tokens. Use at most {longest - 2}, or a greater --length."
                if longest > 2
                else f"--length={longest} reads nothing beyond a context. Use 3 or more."
            )
    if len(set(contexts)) < len(contexts):
        twice = next(one for one in contexts if list(contexts).count(one) > 1)
        raise ConfigError(f"--context-gain names {twice} twice. Name each context once.")
    if stride is not None and not 1 <= stride <= longest:
        raise ConfigError(
            f"--stride={stride} is no step within documents of {longest:,} tokens. "
            f"Use 1 to {longest}."
        )


def _check_documents(context: int, sets: dict[str, TokenDataset]) -> None:
    """Raises DataError where no document has a token beyond the shortest context."""
    longest = {
        name: max((size for _, size in dataset.document_spans()), default=0)
        for name, dataset in sets.items()
    }
    if all(size < context + 2 for size in longest.values()):
        known = ", ".join(f"{name}: {size:,}" for name, size in longest.items())
        raise DataError(
            f"--context-gain={context} finds no document of more tokens (the longest of "
            f"{known}). Use fewer, or another set with --data."
        )
