"""Hugging Face datasets as inputs, streamed: the only door to the package datasets.

`hf:NAME`, with options as in a URL: `hf:allenai/c4?config=en&split=train&revision=607bd4c`. Other
options go to `load_dataset` as they are (`hf:json?data_files=/data/a.json`).
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.tables import BadRow, Row
from megahybrid.errors import DataError

PREFIX = "hf:"


def is_hub(given: str | Path) -> bool:
    """Return whether an input names a Hugging Face dataset."""
    return str(given).startswith(PREFIX)


def shards(given: str | Path) -> int:
    """Return into how many parts the dataset can be streamed."""
    return int(_open(str(given)).num_shards)


def read_shard(given: str, index: int, fields: Fields) -> Iterator[Row]:
    """The rows of a shard, whole.

    Raises DataError when the stream breaks: what could not be fetched is no bad document.
    """
    dataset = _open(given)
    if dataset.num_shards > 1:
        dataset = dataset.shard(num_shards=dataset.num_shards, index=index)
    rows = iter(dataset)
    row = 0
    while True:
        try:
            value = next(rows, None)
        except Exception as error:  # the library and its transports raise many kinds
            raise _failed(given, error) from None
        if value is None:
            return
        text = fields.value(value, sparse=True)
        text = text if isinstance(text, str) else BadRow(fields.missing)
        yield Row(row, text, value)
        row += 1


@lru_cache(maxsize=4)
def _open(given: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"input {given} needs the package datasets, which is not installed. "
            "Run `pip install megahybrid[data]`."
        ) from None
    name, _, query = given.removeprefix(PREFIX).partition("?")
    options: dict[str, Any] = dict(parse_qsl(query))
    split, config = options.pop("split", "train"), options.pop("config", None)
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True, **options)
    except Exception as error:
        raise _failed(given, error) from None


def _failed(given: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"input {given} cannot be read ({reason}). Correct its name, config or split, or look at "
        "the network; the same command then goes on."
    )
