"""`megahybrid checkpoint resize-vocab`: rows for the tokens that a new tokenizer adds."""

from pathlib import Path

from megahybrid.errors import EXIT_DONE, CheckpointError, DataError
from megahybrid.printable import printable


def resize_vocab(checkpoint: Path, tokenizer: Path, out: Path, old: Path | None = None) -> int:
    """Write a checkpoint with rows for the tokens that `tokenizer` has beyond the old one.

    old: the tokenizer that the model was trained with; the run's own where None. Raises
    MegahybridError, and has written nothing, where one of its ids means another token now.
    """
    from megahybrid.checkpoint.folders import refuse_occupied
    from megahybrid.checkpoint.reader import Reader
    from megahybrid.checkpoint.resize import OTHER_MODEL, Growth, resize_vocabulary
    from megahybrid.commands.checkpoint import chosen
    from megahybrid.data.tokenizer import load_tokenizer
    from megahybrid.train.restore import run_of

    refuse_occupied(out, OTHER_MODEL)
    path = chosen(checkpoint)
    with Reader(path) as reader:
        run = run_of(reader)
    new = load_tokenizer(tokenizer)
    named = str(old) if old is not None else run.data.tokenizer
    if named is None:
        raise CheckpointError(
            f"{path}: its run names no tokenizer, so that the ids of the new one cannot be held to "
            "it. Name the one it was trained with: --old-tokenizer FILE."
        )
    known = load_tokenizer(named)
    size = known.info.vocab_size
    if size > run.model.vocab_size:
        raise DataError(
            f"tokenizer {named} has {size} tokens, more than the model knows "
            f"(model.vocab_size={run.model.vocab_size}). Name the one it was trained with."
        )
    before, after = known.names(), new.names()
    for token, (was, is_now) in enumerate(zip(before, after, strict=False)):
        if was != is_now:
            raise DataError(
                f"--tokenizer={tokenizer} has {is_now!r} as token {token}, which is {was!r} in "
                f"{named}: the model's rows would mean other tokens. Add tokens behind the last "
                "with `data tokenizer adopt --chat`."
            )
    if len(after) < len(before) or known.info.eod_id != new.info.eod_id:
        raise DataError(
            f"--tokenizer={tokenizer} has {len(after)} tokens and eod_id={new.info.eod_id}, and "
            f"{named} has {len(before)} and {known.info.eod_id}. Name one that goes on from it."
        )
    vocab_size = max(run.model.vocab_size, len(after))
    if len(after) == len(before):
        raise DataError(
            f"--tokenizer={tokenizer} has the {len(before)} tokens of {named}: there is no row to "
            "add. Train on with the checkpoint as it is."
        )
    growth = Growth(size, vocab_size, str(tokenizer), new.info.sha256)
    result = resize_vocabulary(path, out, growth)
    if result.path is None:
        raise CheckpointError(f"--out={out} could not be written ({result.error}).")
    print(
        f"{printable(str(result.path))}: rows {size:,} to {vocab_size - 1:,} are new, the mean of "
        f"those before. model.vocab_size={vocab_size} (was {run.model.vocab_size})"
    )
    return EXIT_DONE
