"""`megahybrid evaluate`: score a checkpoint on held-out sets, as training does at a stage's end."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megahybrid.commands.trained_model import TrainedModel, header, keep, load_trained_model
from megahybrid.config import RunConfig
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.run_tokenizer import known_tokenizer
from megahybrid.errors import EXIT_DONE, ConfigError, DataError
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.evaluate.table import (
    loss_table,
    position_table,
    reach_table,
    same_documents_table,
    turn_table,
)
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.validation import HeldOutSets, evaluation_loss, open_held_out

TIMES = (1, 2, 4, 8)  # of the trained length


def evaluate(
    path: Path,
    mesh: ParallelMesh,
    *,
    data: Path | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    changes: Sequence[str] = (),
    beyond: bool = False,
    as_json: bool = False,
) -> int:
    """Print loss and loss by position of the run's held-out sets, or of the dataset `data`.

    Rows have `length` tokens (default: the stage's longest) and positions reach as far (default:
    four times the run's longest). `beyond` scores rows of 1, 2, 4 and 8 times the stage's length as
    well, positions to 8 times, and what a model sees through a window of the stage's length that
    slides over each document. `changes` of schemes as `load_trained_model` takes them. Raises
    MegahybridError, one line, for whatever the user can mend. Returns the exit code.
    """
    _check_numbers(length, max_tokens)
    trained = load_trained_model(path, mesh, changes)
    if beyond:
        if length is not None:
            raise ConfigError(
                f"--length={length} and --beyond both say how long rows are (2 answers). "
                "Leave one of them out."
            )
        length = TIMES[-1] * trained.length
    sets = held_out_sets(trained.run, data)
    scored = HeldOutSets(
        trained.run,
        trained.mesh,
        sets=sets,
        longest=length,
        max_tokens=max_tokens,
        context=trained.model.context,
    )
    stream: dict[str, HeldOutLoss] = {}
    far: dict[str, HeldOutLoss] = {}
    reach: Reach | None = None
    token_loss = evaluation_loss(trained.model)
    with Console(stderr=True).status("scoring") as status:

        def tell(name: str, score: HeldOutLoss, rows: str) -> None:
            (stream if rows == "stream" else far)[name] = score
            status.update(f"scored {name} ({rows}, {score.tokens:,} tokens)")

        scored.score(token_loss, trained.length if beyond else length or trained.length, tell)
        scored.score_far(token_loss, tell)
        if beyond:
            reach = _reach(trained, scored, status.update)
    result = _json(trained, stream, far) | (reach.to_json() if reach else {})
    kept = keep(trained, "loss", "held_out", result) if beyond and data is None else None
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(trained, stream, far, reach, kept)
    return EXIT_DONE


def scores(
    trained: TrainedModel,
    *,
    data: Path | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Return what `evaluate` prints as JSON; nothing is printed."""
    _check_numbers(length, max_tokens)
    scored = HeldOutSets(
        trained.run,
        trained.mesh,
        sets=held_out_sets(trained.run, data),
        longest=length,
        max_tokens=max_tokens,
        context=trained.model.context,
    )
    stream: dict[str, HeldOutLoss] = {}
    far: dict[str, HeldOutLoss] = {}

    def keep(name: str, score: HeldOutLoss, rows: str) -> None:
        (stream if rows == "stream" else far)[name] = score

    token_loss = evaluation_loss(trained.model)
    scored.score(token_loss, length or trained.length, keep)
    scored.score_far(token_loss, keep)
    return _json(trained, stream, far)


def _check_numbers(length: int | None, max_tokens: int | None) -> None:
    for name, value in (("--length", length), ("--max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} scores nothing. Use 1 or more.")


@dataclass(frozen=True)
class Reach:
    """Held-out loss in rows of multiples of the trained length, and through a sliding window."""

    rows: dict[int, dict[str, HeldOutLoss]]
    sliding: dict[str, HeldOutLoss]

    def to_json(self) -> dict[str, Any]:
        """Return the result as `evaluations` keep it."""
        return {
            "rows": {
                str(length): {name: _brief(score) for name, score in scores.items()}
                for length, scores in self.rows.items()
            },
            "sliding": {name: _brief(score) for name, score in self.sliding.items()},
        }


def _brief(score: HeldOutLoss) -> dict[str, Any]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
    }


def _reach(trained: TrainedModel, scored: HeldOutSets, say: Callable[[str], None]) -> Reach:
    token_loss = evaluation_loss(trained.model)
    # The same tokens in rows of every length: whole rows of the longest, one at least.
    longest = TIMES[-1] * trained.length
    scored.max_tokens = max(longest, scored.max_tokens // longest * longest)
    rows: dict[int, dict[str, HeldOutLoss]] = {}
    sliding: dict[str, HeldOutLoss] = {}
    for times in TIMES:
        found = rows.setdefault(times * trained.length, {})

        def tell(name: str, score: HeldOutLoss, _: str, found: dict = found) -> None:
            found[name] = score
            say(f"scored {name} in rows of {score.length:,} tokens")

        scored.score(token_loss, times * trained.length, tell)

    def keep(name: str, score: HeldOutLoss, _: str) -> None:
        sliding[name] = score

    scored.score_sliding(token_loss, trained.length, longest, keep)
    return Reach(rows, sliding)


def held_out_sets(run: RunConfig, data: Path | None) -> dict[str, TokenDataset]:
    """The run's held-out sets by name, or the dataset `data` alone. Raises MegahybridError where
    there is none, or where it is not the model's."""
    if data is not None:
        dataset = TokenDataset(data, vocab_size=run.model.vocab_size)
        _check_vocabulary(run, data, dataset)
        return {data.resolve().name: dataset}
    if not run.data.held_out:
        raise ConfigError(
            "data.held_out names no set in this run (0 sets). Name a dataset with --data."
        )
    return open_held_out(run)


def _check_vocabulary(run: RunConfig, data: Path, dataset: TokenDataset) -> None:
    """Raises DataError where --data was made with another tokenizer than the run's data."""
    known = known_tokenizer(run)
    if known is None or dataset.manifest is None:
        return
    trained_on, source = known
    found = dataset.manifest.tokenizer.sha256
    if found != trained_on.sha256:
        raise DataError(
            f"--data={data} was made with the tokenizer {found[:12]}, not the "
            f"{trained_on.sha256[:12]} that the model was trained with ({source}). "
            "Prepare the data with that tokenizer."
        )


def print_model(console: Console, trained: TrainedModel) -> None:
    """Print which model is scored, and on what."""
    place = f"{trained.mesh.device.type}, {trained.precision}"
    console.print(str(trained.checkpoint), markup=False, soft_wrap=True)
    console.print(
        f"step {trained.step:,} · {trained.tokens:,} tokens · stage {trained.stage.name} · {place}",
        markup=False,
    )
    if trained.changes:
        console.print(f"changed: {', '.join(trained.changes)}", markup=False)


def _print(
    trained: TrainedModel,
    stream: dict[str, HeldOutLoss],
    far: dict[str, HeldOutLoss],
    reach: Reach | None,
    kept: Path | None,
) -> None:
    console = Console(highlight=False)
    print_model(console, trained)
    rows = next(iter(stream.values())).length
    console.print(f"\nHeld-out loss, rows of {rows:,} tokens")
    console.print(loss_table(stream))
    beyond = ""
    if any(score.length > trained.length for score in far.values()):
        beyond = f" (below the line: beyond the stage's {trained.length:,} tokens)"
    console.print(f"\nLoss by position in the document{beyond}")
    console.print(position_table(far, trained.length))
    console.print("\nThe same, of those documents alone that reach the last position")
    for name, score in far.items():
        console.print(same_documents_table(name, score, trained.length))
    if any(score.by_turn for score in far.values()):
        console.print("\nLoss of the assistant's tokens by its turn in the conversation")
        console.print(turn_table(far))
    if reach is not None:
        console.print("\nRows of multiples of the stage's length, and through a sliding window")
        console.print(reach_table(reach.rows, reach.sliding, trained.length))
    if kept is not None:
        console.print(f"\nkept in {kept}", markup=False, soft_wrap=True)


def _json(
    trained: TrainedModel, stream: dict[str, HeldOutLoss], far: dict[str, HeldOutLoss]
) -> dict[str, Any]:
    scores = [
        {
            "set": name,
            "stage": trained.stage.name,
            "step": trained.step,
            "rows": rows,
            **score.to_json(),
            "perplexity": score.perplexity,
            "bits_per_token": score.bits_per_token,
            "bits_per_byte": score.bits_per_byte,
        }
        for rows, by_set in (("stream", stream), ("documents", far))
        for name, score in by_set.items()
    ]
    return {**header(trained), "scores": scores}
