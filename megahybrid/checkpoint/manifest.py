"""The manifest of a checkpoint: what it holds and where, as JSON that is checked before use.

The fields are `Manifest`'s; `sha256` covers all others, so that one flipped bit is found. It is
written last: a folder without a manifest is no checkpoint. `VERSION` rises when the meaning of a
field changes; `READERS` keeps one function for every version there was.
"""

import errno
import hashlib
import json
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megahybrid.checkpoint.fragments import (
    STATES,
    Box,
    Flat,
    coverage_fault,
    inside,
    volume,
    whole,
)
from megahybrid.checkpoint.names import name_fault
from megahybrid.errors import CheckpointError

FORMAT = "megahybrid-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
DTYPE = "float32"
ELEMENT_BYTES = 4
BLOCK_BYTES = 16 * 2**20

# A bare name: a manifest can never point outside its own folder.
FILE_NAME = re.compile(r"fragments-\d{4,}\.safetensors")


@dataclass(frozen=True)
class TensorRecord:
    """A canonical tensor: its global shape and the states that are kept of it."""

    shape: tuple[int, ...]
    states: tuple[str, ...] = STATES
    dtype: str = DTYPE


@dataclass(frozen=True)
class FragmentRecord:
    """Where one fragment lies: `key` in `file`, in this folder."""

    tensor: str
    state: str
    box: Box
    flat: Flat
    file: str
    key: str


@dataclass(frozen=True)
class FileRecord:
    """Size of a file and the CRC-32 of each of its blocks; the last block may be short."""

    bytes: int
    block_bytes: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """One complete checkpoint. `step` counts the run's steps, `optimizer_step` updates applied."""

    step: int
    tokens: int
    model_fingerprint: str
    optimizer_step: int
    tensors: Mapping[str, TensorRecord]
    fragments: tuple[FragmentRecord, ...]
    files: Mapping[str, FileRecord]
    train_state: Mapping[str, Any]
    config: Mapping[str, Any]
    written_by: Mapping[str, Any]
    format: str = FORMAT
    version: int = VERSION

    @cached_property
    def _places(self) -> dict[tuple[str, str], list[FragmentRecord]]:
        places = defaultdict(list)
        for fragment in self.fragments:
            places[fragment.tensor, fragment.state].append(fragment)
        return places

    def of(self, tensor: str, state: str) -> list[FragmentRecord]:
        """The fragments of one state of one tensor."""
        return self._places.get((tensor, state), [])

    def coverage(self) -> list[str]:
        """One line for every state of a tensor that is not held exactly once; empty if none."""
        faults = []
        for name, tensor in self.tensors.items():
            for state in tensor.states:
                parts = ((part.box, part.flat) for part in self.of(name, state))
                if fault := coverage_fault(parts, whole(tensor.shape)):
                    faults.append(f"{name} ({state}): {fault}")
        return faults

    def to_json(self) -> str:
        """The text of manifest.json: one line per tensor, fragment and file, for a human reader."""
        # Through JSON once: the digest must see the keys as text, as a reader will.
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        values = {"format": values.pop("format"), "version": values.pop("version")} | values
        values["sha256"] = _digest(values)
        lines = ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in values.items())
        return "{\n" + lines + "\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and fully check `folder`/manifest.json. Raises CheckpointError, one line; Misnamed where
    the folder stands among a run's checkpoints under another step's name."""
    path = folder / MANIFEST_NAME
    try:
        # A pipe or a device in its place would be waited for, or read, without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        text = path.read_bytes().decode("utf-8")
        values = json.loads(text, parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing, so {folder.name} is not a complete checkpoint. "
            "Use another step's folder."
        ).because(error) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Use another step's folder."
        ).because(error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: it is not JSON ({error}). Use another step's folder."
        ) from None
    manifest = parse(values, path)
    if fault := name_fault(folder, manifest.step):
        raise Misnamed(f"{folder}: {fault}.")
    return manifest


class Misnamed(CheckpointError):
    """A folder of a run's checkpoints that is named after another step than it holds."""


def parse(values: Any, path: Path) -> Manifest:
    """The manifest that decoded JSON says, or a CheckpointError that names `path`."""
    check = _Check(path)
    check.that(isinstance(values, dict), "is not a JSON object")
    check.same("format", values.get("format"), FORMAT, "It is not a checkpoint of megahybrid")
    version = values.get("version")
    if type(version) is not int or version not in READERS:
        raise CheckpointError(
            f"{path}: version={version!r} is none that this megahybrid reads "
            f"({', '.join(map(str, READERS))}). Update megahybrid."
        )
    stated = values.get("sha256")
    found = _digest({key: value for key, value in values.items() if key != "sha256"})
    check.same("sha256", stated, found, "The manifest is damaged; use another step's folder")
    return READERS[version](values, check)


class _Check:
    """Turns what is wrong with a manifest into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def that(self, condition: bool, message: str) -> None:
        if not condition:
            raise CheckpointError(f"{self.path}: {message}. Use another step's folder.")

    def same(self, name: str, stated: Any, found: Any, advice: str) -> None:
        if stated != found:
            raise CheckpointError(f"{self.path}: {name}={stated!r} is not {found!r}. {advice}.")

    def fields(self, value: Any, types: Mapping[str, type], where: str) -> Any:
        self.that(isinstance(value, dict), f"{where} is not an object")
        for name, kind in types.items():
            self.that(name in value, f"{where} has no field {name!r}")
            found = value[name]
            right = isinstance(found, kind) and not (kind is int and isinstance(found, bool))
            self.that(right, f"{where}.{name}={found!r} is not of type {kind.__name__}")
            self.that(kind is not int or found >= 0, f"{where}.{name}={found!r} is negative")
        extra = sorted(set(value) - set(types))
        self.that(not extra, f"{where} has unknown fields {extra}")
        return value

    def integers(self, value: Any, where: str) -> tuple[int, ...]:
        right = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        self.that(right, f"{where}={value!r} is not a list of whole numbers")
        return tuple(value)

    def pair(self, value: Any, where: str) -> tuple[int, int]:
        numbers = self.integers(value, where)
        self.that(len(numbers) == 2, f"{where}={value!r} is not [start, stop]")
        return numbers[0], numbers[1]


_FIELDS: dict[str, type] = {
    "format": str,
    "version": int,
    "step": int,
    "tokens": int,
    "model_fingerprint": str,
    "optimizer_step": int,
    "tensors": dict,
    "fragments": list,
    "files": dict,
    "train_state": dict,
    "config": dict,
    "written_by": dict,
    "sha256": str,
}


def _read_version_1(values: dict[str, Any], check: _Check) -> Manifest:
    check.fields(values, _FIELDS, "manifest")
    for name in ("step", "tokens"):
        kept = values["train_state"].get(name, values[name])
        check.that(
            type(kept) is int and kept == values[name],
            f"train_state.{name}={kept!r} is not the {name}={values[name]} of the manifest",
        )
    tensors = {
        name: _tensor(record, check, f"tensors.{name}")
        for name, record in values["tensors"].items()
    }
    files = {
        name: _file(record, check, f"files.{name}") for name, record in values["files"].items()
    }
    for name in files:
        check.that(FILE_NAME.fullmatch(name) is not None, f"files names {name!r}")
    fragments = tuple(
        _fragment(record, check, f"fragments[{index}]", tensors, files)
        for index, record in enumerate(values["fragments"])
    )
    places = {(fragment.file, fragment.key) for fragment in fragments}
    check.that(len(places) == len(fragments), "two fragments share a file and key")
    plain = {
        name: values[name]
        for name in _FIELDS
        if name not in ("tensors", "fragments", "files", "sha256")
    }
    return Manifest(tensors=tensors, fragments=fragments, files=files, **plain)


def _tensor(value: Any, check: _Check, where: str) -> TensorRecord:
    check.fields(value, {"shape": list, "states": list, "dtype": str}, where)
    states = tuple(value["states"])
    check.that(
        all(state in STATES for state in states) and len(set(states)) == len(states),
        f"{where}.states={list(states)!r} are not of {list(STATES)}",
    )
    check.that(value["dtype"] == DTYPE, f"{where}.dtype={value['dtype']!r} is not {DTYPE!r}")
    return TensorRecord(check.integers(value["shape"], f"{where}.shape"), states, DTYPE)


def _file(value: Any, check: _Check, where: str) -> FileRecord:
    check.fields(value, {"bytes": int, "block_bytes": int, "crc32": list}, where)
    record = FileRecord(
        value["bytes"], value["block_bytes"], check.integers(value["crc32"], f"{where}.crc32")
    )
    check.that(record.block_bytes > 0, f"{where}.block_bytes=0")
    blocks = -(-record.bytes // record.block_bytes)
    check.that(
        len(record.crc32) == blocks,
        f"{where} lists {len(record.crc32)} checksums for {blocks} blocks",
    )
    return record


def _fragment(
    value: Any,
    check: _Check,
    where: str,
    tensors: Mapping[str, TensorRecord],
    files: Mapping[str, FileRecord],
) -> FragmentRecord:
    types = {"tensor": str, "state": str, "box": list, "flat": list, "file": str, "key": str}
    check.fields(value, types, where)
    name, state = value["tensor"], value["state"]
    check.that(name in tensors, f"{where}.tensor={name!r} is not listed under tensors")
    check.that(
        state in tensors[name].states,
        f"{where}.state={state!r} is not one of tensors.{name}.states={tensors[name].states}",
    )
    check.that(value["file"] in files, f"{where}.file={value['file']!r} is not under files")
    box = tuple(check.pair(side, f"{where}.box") for side in value["box"])
    shape = tensors[name].shape
    check.that(
        inside(box, whole(shape)), f"{where}.box={value['box']} leaves {name}'s shape {list(shape)}"
    )
    flat = check.pair(value["flat"], f"{where}.flat")
    check.that(
        flat[0] <= flat[1] <= volume(box),
        f"{where}.flat={list(flat)} leaves its box of {volume(box)} elements",
    )
    return FragmentRecord(name, state, box, flat, value["file"], value["key"])


READERS: dict[int, Callable[[dict[str, Any], _Check], Manifest]] = {1: _read_version_1}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(value: Any) -> str:
    """Compact JSON, but one line for each entry of a container."""
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n]"
    if isinstance(value, dict) and value:
        lines = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + "\n}"
    return json.dumps(value)
