"""`megahybrid sample`: continue a prompt with a checkpoint's model."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from megahybrid.commands.trained_model import TrainedModel, load_trained_model
from megahybrid.data.run_tokenizer import tokenizer_of
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.evaluate.sampling import sample_tokens
from megahybrid.parallel.mesh import ParallelMesh


def sample(
    path: Path,
    mesh: ParallelMesh,
    *,
    prompt: str,
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 1,
    tokenizer: Path | None = None,
    context: int | None = None,
) -> int:
    """Print `prompt` and up to `tokens` tokens that follow it, until a document ends.

    The tokenizer is the one that the run names, or `tokenizer`; it must be the one that made the
    run's data, where that is on this machine. The model sees the last `context` tokens (default:
    the longest rows of its stage); where the text grows beyond, stderr says so. Raises
    MegahybridError, one line, for whatever the user can mend. Returns the exit code.
    """
    check_sampling(tokens, temperature, context)  # before a model is read for nothing
    trained = load_trained_model(path, mesh)
    text = continued(
        trained,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        tokenizer=tokenizer,
        context=context,
        cropped=lambda: tell_cropped(trained, context),
    )
    print(text)
    return EXIT_DONE


def check_sampling(tokens: int, temperature: float, context: int | None) -> None:
    """Raise ConfigError where nothing could be drawn so."""
    if tokens < 1:
        raise ConfigError(f"--tokens={tokens} adds nothing. Use 1 or more.")
    if not 0 <= temperature < math.inf:
        raise ConfigError(
            f"--temperature={temperature:g} is no temperature. Use 0 (the likeliest) or more."
        )
    if context is not None and context < 1:
        raise ConfigError(f"--context={context} shows the model nothing. Use 1 or more.")


def tell_cropped(trained: TrainedModel, context: int | None) -> None:
    """Say once that the model does not see the whole text any more."""
    seen = context or trained.length
    limit = f"tokens of stage {trained.stage.name}" if context is None else "of --context"
    print(
        f"megahybrid: the text is longer than the {seen} {limit}: "
        f"from here on the model sees its last {seen} only.",
        file=sys.stderr,
    )


def _encode(words: Tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not UTF-8 text. Give it in UTF-8.") from None
    ids = words.encode([prompt])[0]
    if not ids:
        # The target after eod does not count in training, so there is no learnt first token.
        raise ConfigError(
            "--prompt is empty, and a model learns to continue documents, not to begin them. "
            "Give it some text."
        )
    return ids


def continued(
    trained: TrainedModel,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int,
    tokenizer: Path | None,
    context: int | None,
    cropped: Callable[[], None] = lambda: None,
) -> str:
    """Return what `sample` prints, of a model that is loaded; nothing is printed. `cropped` is
    called once, where the model does not see the whole text any more."""
    check_sampling(tokens, temperature, context)
    words, eod_id = tokenizer_of(trained.run, tokenizer)
    ids = _encode(words, prompt)
    ids += sample_tokens(
        trained.model,
        ids,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        context_tokens=context or trained.length,
        vocab_size=words.info.vocab_size,
        eod_id=eod_id,
        cropped=cropped,
    )
    return words.decode(ids)
