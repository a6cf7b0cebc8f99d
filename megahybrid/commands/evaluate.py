"""`megahybrid evaluate`: score a checkpoint on held-out sets, as training does at a stage's end."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megahybrid.commands.named_data import with_held_out
from megahybrid.commands.trained_model import TrainedModel, header, keep, load_trained_model
from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.evaluate.progress import EvaluationProgress
from megahybrid.evaluate.table import (
    loss_table,
    position_table,
    reach_table,
    same_documents_table,
    turn_table,
)
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.validation import HeldOutSets, evaluation_loss

TIMES = (1, 2, 4, 8)  # of the trained length


def evaluate(
    path: Path,
    mesh: ParallelMesh,
    *,
    data: Mapping[str, Path] | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    changes: Sequence[str] = (),
    beyond: bool = False,
    as_json: bool = False,
) -> int:
    """Print loss and loss by position of the run's held-out sets, or of the datasets of `data`.

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
    scored = held_out_sets(trained, data, length, max_tokens)
    rows = trained.length if beyond else length or trained.length
    work = scored.work(rows, "stream") + scored.work(scored.longest, "documents")
    work += _reach_work(trained, scored) if beyond else 0
    with EvaluationProgress("scoring", work) as progress:
        scored.advance = progress.advance
        stream, far = _score(trained, scored, rows, progress.say)
        reach = _reach(trained, scored, progress.say) if beyond else None
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
    data: Mapping[str, Path] | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Return what `evaluate` prints as JSON; nothing is printed."""
    _check_numbers(length, max_tokens)
    scored = held_out_sets(trained, data, length, max_tokens)
    return _json(trained, *_score(trained, scored, length or trained.length))


def held_out_sets(
    trained: TrainedModel,
    data: Mapping[str, Path] | None,
    longest: int | None,
    max_tokens: int | None,
) -> HeldOutSets:
    """The run's held-out sets, or the datasets of `data`, open for scoring. Raises MegahybridError
    where there is none, or where one is not the model's."""
    run = with_held_out(trained.run, data)
    if not run.data.held_out:
        raise ConfigError(
            "data.held_out names no set in this run (0 sets). Name a dataset with --data."
        )
    return HeldOutSets(
        run,
        trained.mesh,
        longest=longest,
        max_tokens=max_tokens,
        context=trained.model.context,
    )


def _score(
    trained: TrainedModel, scored: HeldOutSets, rows: int, say: Callable[[str], object] = bool
) -> tuple[dict[str, HeldOutLoss], dict[str, HeldOutLoss]]:
    """Return the score of each set in rows of `rows` tokens, and by position in documents."""
    stream: dict[str, HeldOutLoss] = {}
    far: dict[str, HeldOutLoss] = {}

    def keep(name: str, score: HeldOutLoss, kind: str) -> None:
        (stream if kind == "stream" else far)[name] = score

    token_loss = evaluation_loss(trained.model)
    say(f"scoring rows of {rows:,}")
    scored.score(token_loss, rows, keep)
    say("scoring documents")
    scored.score_far(token_loss, keep)
    return stream, far


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


def _reach_work(trained: TrainedModel, scored: HeldOutSets) -> int:
    """Return the tokens that `_reach` reads."""
    longest = TIMES[-1] * trained.length
    most, scored.max_tokens = scored.max_tokens, _whole_rows(scored.max_tokens, longest)
    work = sum(scored.work(times * trained.length, "stream") for times in TIMES)
    work += scored.work(longest, "stream", trained.length)
    scored.max_tokens = most
    return work


def _whole_rows(max_tokens: int, longest: int) -> int:
    """The same tokens in rows of every length: whole rows of the longest, one at least."""
    return max(longest, max_tokens // longest * longest)


def _reach(trained: TrainedModel, scored: HeldOutSets, say: Callable[[str], object]) -> Reach:
    token_loss = evaluation_loss(trained.model)
    longest = TIMES[-1] * trained.length
    scored.max_tokens = _whole_rows(scored.max_tokens, longest)
    rows: dict[int, dict[str, HeldOutLoss]] = {}
    sliding: dict[str, HeldOutLoss] = {}
    for times in TIMES:
        found = rows.setdefault(times * trained.length, {})

        def tell(name: str, score: HeldOutLoss, _: str, found: dict = found) -> None:
            found[name] = score

        say(f"scoring rows of {times * trained.length:,}")
        scored.score(token_loss, times * trained.length, tell)

    def keep(name: str, score: HeldOutLoss, _: str) -> None:
        sliding[name] = score

    say("sliding a window")
    scored.score_sliding(token_loss, trained.length, longest, keep)
    return Reach(rows, sliding)


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
