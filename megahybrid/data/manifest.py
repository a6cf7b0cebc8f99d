"""`manifest.json`: what a folder of token shards holds, and with which tokenizer it was made.

The manifest is written last, so a folder that has one is complete. Reading checks every field and
every sum; whatever is wrong becomes one `DataError` line.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megahybrid.errors import DataError

FORMAT = "megahybrid-tokens"
VERSION = 1
MANIFEST_NAME = "manifest.json"
BLOCK_BYTES = 16 * 2**20  # unit of the checksums: small enough to name the damage, large to be few
ITEM_BYTES = {"uint16": 2, "int32": 4}


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. `eod_id` follows every document."""

    kind: str
    sha256: str
    vocab_size: int
    eod_id: int

    @property
    def dtype(self) -> str:
        """uint16 where every id fits, else int32 (Megatron's format has no uint32)."""
        return "uint16" if self.vocab_size <= 2**16 else "int32"


@dataclass(frozen=True)
class LengthBin:
    """Documents of min_tokens to 2 * min_tokens - 1 tokens, eod included."""

    min_tokens: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class ShardEntry:
    """One pair of files. `bytes` and the checksums are of the .bin; the .idx follows from it.

    `mask_crc32` is of the .mask that says which targets count, `notes_crc32` of the .jsonl that
    says more of the documents; None where there is none.
    """

    bin: str
    idx: str
    documents: int
    tokens: int
    bytes: int
    block_bytes: int
    crc32: tuple[int, ...]
    mask_crc32: int | None = None
    notes_crc32: int | None = None


@dataclass(frozen=True)
class Manifest:
    """All that a reader must know before it opens a shard."""

    tokenizer: TokenizerInfo
    dtype: str
    documents: int
    tokens: int
    length_histogram: tuple[LengthBin, ...]
    shards: tuple[ShardEntry, ...]
    sources: tuple[Mapping[str, Any], ...]
    command: str

    def dump(self) -> str:
        """The file's text."""
        value: dict[str, Any] = {"format": FORMAT, "version": VERSION} | asdict(self)
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
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing (a prepared dataset has one). "
            "Prepare the data with `megahybrid data tokenize`."
        ).because(error) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path.").because(
            error
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON (damaged). Prepare or copy the data again.") from None
    return _Fields(path, value).manifest(), hashlib.sha256(raw).hexdigest()


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


class _Fields:
    """Typed access to one JSON object; every complaint names the file and the field."""

    def __init__(self, path: Path, value: Any, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(value, dict):
            raise self.error("", value, "is not an object")
        self.value = value

    def error(self, key: str, found: Any, what: str) -> DataError:
        shown = json.dumps(found, default=str)[:60]
        name = (self.prefix + key).strip(".") or "content"
        return DataError(
            f"{self.path}: {name}={shown} {what}. The manifest is damaged or not ours: "
            "prepare or copy the data again."
        )

    def whole(self, key: str, minimum: int = 0) -> int:
        found = self.value.get(key)
        if not isinstance(found, int) or isinstance(found, bool) or found < minimum:
            raise self.error(key, found, f"is not a whole number of at least {minimum}")
        return found

    def text(self, key: str) -> str:
        found = self.value.get(key)
        if not isinstance(found, str):
            raise self.error(key, found, "is not text")
        return found

    def file_name(self, key: str) -> str:
        found = self.text(key)
        if not found or found != Path(found).name or "\0" in found:
            raise self.error(key, found, "is not a plain file name")
        return found

    def items(self, key: str) -> "list[_Fields]":
        found = self.value.get(key)
        if not isinstance(found, list):
            raise self.error(key, found, "is not a list")
        return [
            _Fields(self.path, item, f"{self.prefix}{key}[{index}].")
            for index, item in enumerate(found)
        ]

    def expect(self, key: str, expected: Any, reason: str) -> None:
        if self.value.get(key) != expected:
            raise self.error(key, self.value.get(key), f"is not {expected} ({reason})")

    def manifest(self) -> Manifest:
        self.expect("format", FORMAT, "the format's name")
        self.expect("version", VERSION, "the version this program reads")
        tokenizer = _Fields(self.path, self.value.get("tokenizer"), "tokenizer.").tokenizer()
        self.expect("dtype", tokenizer.dtype, f"tokenizer.vocab_size={tokenizer.vocab_size}")
        shards = tuple(item.shard(tokenizer.dtype) for item in self.items("shards"))
        self.expect("tokens", sum(shard.tokens for shard in shards), "sum over shards")
        self.expect("documents", sum(shard.documents for shard in shards), "sum over shards")
        histogram = tuple(
            LengthBin(item.whole("min_tokens", 1), item.whole("documents"), item.whole("tokens"))
            for item in self.items("length_histogram")
        )
        return Manifest(
            tokenizer=tokenizer,
            dtype=tokenizer.dtype,
            documents=self.whole("documents"),
            tokens=self.whole("tokens"),
            length_histogram=histogram,
            shards=shards,
            sources=tuple(item.value for item in self.items("sources")),
            command=self.text("command"),
        )

    def tokenizer(self) -> TokenizerInfo:
        info = TokenizerInfo(
            kind=self.text("kind"),
            sha256=self.text("sha256"),
            vocab_size=self.whole("vocab_size", 1),
            eod_id=self.whole("eod_id"),
        )
        if info.eod_id >= info.vocab_size or info.vocab_size > 2**31:
            raise self.error("eod_id", info.eod_id, f"is beyond vocab_size={info.vocab_size}")
        return info

    def shard(self, dtype: str) -> ShardEntry:
        entry = ShardEntry(
            bin=self.file_name("bin"),
            idx=self.file_name("idx"),
            documents=self.whole("documents", 1),
            tokens=self.whole("tokens", 1),
            bytes=self.whole("bytes", 1),
            block_bytes=self.whole("block_bytes", 1),
            crc32=self.checksums(),
            mask_crc32=self.whole("mask_crc32") if "mask_crc32" in self.value else None,
            notes_crc32=self.whole("notes_crc32") if "notes_crc32" in self.value else None,
        )
        self.expect("bytes", entry.tokens * ITEM_BYTES[dtype], f"{entry.tokens} {dtype} tokens")
        if entry.block_bytes % ITEM_BYTES[dtype]:
            raise self.error("block_bytes", entry.block_bytes, f"cuts a {dtype} token in two")
        blocks = -(-entry.bytes // entry.block_bytes)
        if len(entry.crc32) != blocks:
            raise self.error("crc32", len(entry.crc32), f"checksums, not one per block ({blocks})")
        return entry

    def checksums(self) -> tuple[int, ...]:
        found = self.value.get("crc32")
        if not isinstance(found, list) or not all(type(item) is int for item in found):
            raise self.error("crc32", found, "is not a list of whole numbers")
        return tuple(found)
