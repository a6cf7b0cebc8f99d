"""The tokenizer of a run, held to the one that made its data."""

from pathlib import Path

import numpy as np

from megahybrid.config import RunConfig
from megahybrid.data.manifest import MANIFEST_NAME, TokenizerInfo, read_manifest
from megahybrid.data.packing import PLAN_NAME, PackPlan
from megahybrid.data.token_bytes import token_bytes
from megahybrid.data.token_file import Array
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.errors import ConfigError, DataError, MegahybridError


def tokenizer_of(run: RunConfig, path: Path | None) -> tuple[Tokenizer, int]:
    """The tokenizer and the id that ends a document."""
    name, file = "--tokenizer", path
    if file is None:
        if run.data.tokenizer is None:
            raise ConfigError(
                "data.tokenizer=null: this run names no tokenizer. Name its file with --tokenizer."
            )
        name, file = "data.tokenizer", Path(run.data.tokenizer)
    tokenizer = load_tokenizer(file)
    if tokenizer.info.vocab_size > run.model.vocab_size:
        raise DataError(
            f"{name}={file} has {tokenizer.info.vocab_size} tokens, more than the model knows "
            f"(model.vocab_size={run.model.vocab_size}). Name the tokenizer that made the data."
        )
    known = known_tokenizer(run)
    if known is None:
        return tokenizer, tokenizer.info.eod_id
    made_with, source = known
    if tokenizer.info.sha256 != made_with.sha256:
        raise DataError(
            f"{name}={file} has sha256 {tokenizer.info.sha256[:12]}, but {source} was made with "
            f"{made_with.sha256[:12]}. Name the tokenizer that made the data."
        )
    return tokenizer, made_with.eod_id


def known_tokenizer(run: RunConfig) -> tuple[TokenizerInfo, str] | None:
    """Return the tokenizer that the run's data was made with, and which dataset says so.

    None where no data with a manifest is on this machine.
    """
    for _, path in run.data.datasets():
        folder = Path(path)
        if (folder / PLAN_NAME).exists():
            folder = PackPlan(folder).dataset
        if (folder / MANIFEST_NAME).exists():
            return read_manifest(folder)[0].tokenizer, path
    return None


def bytes_of_ids(run: RunConfig) -> Array | None:
    """The bytes of text that each id of the model stands for, int64; None where the run's tokenizer
    is not here, is not the one that made the data, or does not tell."""
    try:
        tokenizer, eod = tokenizer_of(run, None)
    except MegahybridError:
        return None
    sizes = token_bytes(tokenizer)
    if sizes is None:
        return None
    found = np.zeros(run.model.vocab_size, np.int64)
    found[: len(sizes)] = sizes
    found[eod] = 0
    return found
