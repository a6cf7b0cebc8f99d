"""`manifest.json`: what a folder of token shards holds, and with which tokenizer it was made.

The manifest is written last, so a folder that has one is complete. Reading checks every field and
every sum; whatever is wrong becomes one `DataError` line.
"""

import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megahybrid import __version__
from megahybrid.config.base import Count, Crc32, Positive, Record
from megahybrid.config.parsing import read_record
from megahybrid.errors import ConfigError, DataError, first_line
from megahybrid.plain_file import read_plain_file
from megahybrid.printable import shortened

MANIFEST_NAME = "manifest.json"
BLOCK_BYTES = 16 * 2**20  # unit of the checksums: small enough to name the damage, large to be few
LARGEST = 2**28  # bytes; that of 10¹² tokens has some 10⁷
ITEM_BYTES = {"uint16": 2, "int32": 4}


class TokenizerInfo(Record):
    """The tokenizer that made the ids. `eod_id` follows every document."""

    kind: str
    sha256: str
    vocab_size: Positive
    eod_id: Count

    @property
    def dtype(self) -> str:
        """uint16 where every id fits, else int32 (Megatron's format has no uint32)."""
        return "uint16" if self.vocab_size <= 2**16 else "int32"

    def faults(self) -> Iterator[str]:
        """An id that the vocabulary has not, or that int32 has not."""
        if self.vocab_size > 2**31:
            yield f"vocab_size={self.vocab_size} is more than {2**31} (ids are int32)"
        if self.eod_id >= self.vocab_size:
            yield f"eod_id={self.eod_id} is beyond vocab_size={self.vocab_size}"


class LengthBin(Record):
    """Documents of min_tokens to 2 * min_tokens - 1 tokens, eod included."""

    min_tokens: Positive
    documents: Count
    tokens: Count


class ShardEntry(Record):
    """One pair of files. `bytes` and the checksums are of the .bin; the .idx follows from it.

    `mask_crc32` is of the .mask that says which targets count, `notes_crc32` of the .jsonl that
    holds the documents' metadata; None where there is none.
    """

    bin: str
    idx: str
    documents: Positive
    tokens: Positive
    bytes: Positive
    block_bytes: Positive
    crc32: tuple[Crc32, ...]
    mask_crc32: Crc32 | None = None
    notes_crc32: Crc32 | None = None

    def faults(self) -> Iterator[str]:
        """Names that lead elsewhere, and checksums that are not one for each block."""
        for name, found in (("bin", self.bin), ("idx", self.idx)):
            if found in ("", ".", "..") or found != Path(found).name or not found.isprintable():
                yield f"{name}={shortened(found)} is not a plain file name"
        blocks = -(-self.bytes // self.block_bytes)
        if len(self.crc32) != blocks:
            yield f"crc32={len(self.crc32)} checksums are not one per block ({blocks})"


class Manifest(Record):
    """All that a reader must know before it opens a shard."""

    format: Literal["megahybrid-tokens"] = "megahybrid-tokens"
    version: Literal[1] = 1
    tokenizer: TokenizerInfo
    dtype: str
    documents: Count
    tokens: Count
    length_histogram: tuple[LengthBin, ...]
    shards: tuple[ShardEntry, ...]
    sources: tuple[dict[str, Any], ...]
    command: str

    def faults(self) -> Iterator[str]:
        """Parts that disagree: every number that is said twice is compared."""
        if self.dtype != self.tokenizer.dtype:
            yield (
                f"dtype={shortened(self.dtype)} is not {self.tokenizer.dtype} "
                f"(tokenizer.vocab_size={self.tokenizer.vocab_size})"
            )
            return
        item = ITEM_BYTES[self.dtype]
        for index, shard in enumerate(self.shards):
            name, tokens = f"shards.{index}", f"{shard.tokens} {self.dtype} tokens"
            if shard.bytes != shard.tokens * item:
                yield f"{name}.bytes={shard.bytes} is not {tokens}"
            if shard.block_bytes % item:
                yield f"{name}.block_bytes={shard.block_bytes} cuts one of {tokens} in two"
        names = [name for shard in self.shards for name in (shard.bin, shard.idx)]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            yield f"shards={len(self.shards)} entries name {shortened(twice[0])} twice"
        for name, parts in (("shards", self.shards), ("length_histogram", self.length_histogram)):
            for what in ("documents", "tokens"):
                found, expected = getattr(self, what), sum(getattr(part, what) for part in parts)
                if found != expected:
                    yield f"{what}={found} is not {expected} (sum over {name})"

    def dump(self) -> str:
        """The file's text."""
        value = self.model_dump()
        for shard in value["shards"]:
            for name in ("mask_crc32", "notes_crc32"):
                if shard[name] is None:
                    del shard[name]
        return json.dumps(value, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of `folder` and the sha256 of its bytes.

    Raises DataError when it is missing, not ours, or does not add up.
    """
    path = folder / MANIFEST_NAME
    again = "The manifest is damaged or not ours: prepare or copy the data again."
    try:
        raw = read_plain_file(path, LARGEST)
        value = json.loads(raw)
        if not isinstance(value, dict) or "format" not in value or "version" not in value:
            raise DataError(f"{path} has no format and version. {again}")
        return read_record(Manifest, raw), hashlib.sha256(raw).hexdigest()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing (a prepared dataset has one). "
            "Prepare the data with `megahybrid data tokenize`."
        ).because(error) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path.").because(
            error
        ) from None
    except ConfigError as error:
        fault = first_line(error).removesuffix(" Change it.").removesuffix(".")
        raise DataError(f"{path}: {fault}. {again}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON (damaged). Prepare or copy the data again.") from None


def made_by(words: Sequence[str]) -> str:
    """Return the `command` of a manifest or a plan: what a shell takes, and the version that ran it
    as a comment there. A field of its own would be refused by 0.1.0."""
    return f"{shlex.join(words)}  # megahybrid {__version__}"


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that it appears whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
