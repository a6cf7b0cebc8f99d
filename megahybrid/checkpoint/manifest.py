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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from megahybrid.checkpoint.fragments import (
    STATES,
    State,
    coverage_fault,
    inside,
    volume,
    whole,
)
from megahybrid.checkpoint.names import name_fault
from megahybrid.checkpoint.train_record import TrainRecord, WrittenBy
from megahybrid.config.base import Count, Frozen
from megahybrid.config.parsing import first_fault, parse_json
from megahybrid.errors import CheckpointError
from megahybrid.printable import shortened

FORMAT = "megahybrid-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
ELEMENT_BYTES = 4
BLOCK_BYTES = 16 * 2**20

# A bare name: a manifest can never point outside its own folder.
FILE_NAME = re.compile(r"fragments-\d{4,}\.safetensors")
Value = TypeVar("Value", bound=Frozen)


class TensorRecord(Frozen):
    """A canonical tensor: its global shape and the states that are kept of it."""

    shape: tuple[Count, ...]
    states: tuple[State, ...] = STATES
    dtype: Literal["float32"] = "float32"


class FragmentRecord(Frozen):
    """The place of one fragment: `key` in `file`, in this folder."""

    tensor: str
    state: State
    box: tuple[tuple[Count, Count], ...]
    flat: tuple[Count, Count]
    file: str
    key: str


class FileRecord(Frozen):
    """Size of a file and the CRC-32 of each of its blocks; the last block may be short."""

    bytes: Count
    block_bytes: Count
    crc32: tuple[Count, ...]


class Manifest(Frozen):
    """One complete checkpoint. `step` counts the run's steps, `optimizer_step` updates applied."""

    step: Count
    tokens: Count
    model_fingerprint: str
    optimizer_step: Count
    tensors: dict[str, TensorRecord]
    fragments: tuple[FragmentRecord, ...]
    files: dict[str, FileRecord]
    train_state: dict[str, Any]
    config: dict[str, Any]
    written_by: dict[str, Any]
    format: Literal["megahybrid-checkpoint"] = "megahybrid-checkpoint"
    version: Count = VERSION

    @cached_property
    def places(self) -> dict[tuple[str, str], list[FragmentRecord]]:
        places: dict[tuple[str, str], list[FragmentRecord]] = defaultdict(list)
        for fragment in self.fragments:
            places[fragment.tensor, fragment.state].append(fragment)
        return places

    def of(self, tensor: str, state: str) -> list[FragmentRecord]:
        """The fragments of one state of one tensor."""
        return self.places.get((tensor, state), [])

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
        values = json.loads(json.dumps(self.model_dump(mode="python"), allow_nan=False))
        values = {"format": values.pop("format"), "version": values.pop("version")} | values
        values["sha256"] = _digest(values)
        lines = ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in values.items())
        return "{\n" + lines + "\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and fully check `folder`/manifest.json.

    Raises CheckpointError, one line; Misnamed where the folder stands among a run's checkpoints
    under another step's name.
    """
    path = folder / MANIFEST_NAME
    try:
        # A pipe or a device in its place would be waited for, or read, without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")
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
            f"{path}: version={shortened(repr(version))} is none that this megahybrid reads "
            f"({', '.join(map(str, READERS))}). Update megahybrid."
        )
    stated = values.pop("sha256", None)
    text = _canonical(values)
    found = hashlib.sha256(text.encode()).hexdigest()
    check.same("sha256", stated, found, "The manifest is damaged; use another step's folder")
    return READERS[version](values, text, check)


class _Check:
    """Turn what is wrong with a manifest into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def that(self, condition: bool, message: str) -> None:
        if not condition:
            self.fault("", message)

    def same(self, name: str, stated: Any, found: Any, advice: str) -> None:
        if stated != found:
            shown = shortened(repr(stated))
            raise CheckpointError(f"{self.path}: {name}={shown} is not {found!r}. {advice}.")

    def value(self, type: type[Value], text: str, plain: Any, where: str = "") -> Value:
        """Return the value that JSON text says, or raise what is wrong with it in one line."""
        try:
            return parse_json(type, text)
        except ValueError as error:
            self.that(False, first_fault(error, type, plain, where))
            raise

    def fault(self, where: str, message: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {where}{message}. Use another step's folder.")


def _read_version_1(values: dict[str, Any], text: str, check: _Check) -> Manifest:
    manifest = check.value(Manifest, text, values)
    for name, type in (("train_state", TrainRecord), ("written_by", WrittenBy)):
        plain = values[name]
        check.value(type, json.dumps(plain), plain, name)
    for name in ("step", "tokens"):
        kept = manifest.train_state.get(name, values[name])
        check.that(
            kept == values[name],
            f"train_state.{name}={kept!r} is not the {name}={values[name]} of the manifest",
        )
    for name, tensor in manifest.tensors.items():
        states = tensor.states
        check.that(len(set(states)) == len(states), f"tensors.{name}.states={states} repeat")
    for name, record in manifest.files.items():
        check.that(FILE_NAME.fullmatch(name) is not None, f"files names {name!r}")
        _check_file(record, check, f"files.{name}")
    held = dict.fromkeys(manifest.files, 0)
    for index, fragment in enumerate(manifest.fragments):
        _check_fragment(fragment, manifest, check, f"fragments[{index}]")
        held[fragment.file] += (fragment.flat[1] - fragment.flat[0]) * ELEMENT_BYTES
    for name, size in held.items():
        # What is read is never more than the disk holds, whatever shapes somebody wrote.
        record = manifest.files[name]
        check.that(
            size <= record.bytes, f"files.{name} has {record.bytes} bytes for fragments of {size}"
        )
    places = {(fragment.file, fragment.key) for fragment in manifest.fragments}
    check.that(len(places) == len(manifest.fragments), "two fragments share a file and key")
    return manifest


def _check_file(record: FileRecord, check: _Check, where: str) -> None:
    check.that(record.block_bytes > 0, f"{where}.block_bytes=0")
    blocks = -(-record.bytes // record.block_bytes)
    check.that(
        len(record.crc32) == blocks,
        f"{where} lists {len(record.crc32)} checksums for {blocks} blocks",
    )


def _check_fragment(part: FragmentRecord, manifest: Manifest, check: _Check, where: str) -> None:
    tensor = manifest.tensors.get(part.tensor)
    if tensor is None:
        check.fault(where, f".tensor={part.tensor!r} is not listed under tensors")
    check.that(
        part.state in tensor.states,
        f"{where}.state={part.state!r} is not one of tensors.{part.tensor}.states={tensor.states}",
    )
    check.that(part.file in manifest.files, f"{where}.file={part.file!r} is not under files")
    check.that(
        inside(part.box, whole(tensor.shape)),
        f"{where}.box={[list(side) for side in part.box]} leaves {part.tensor}'s shape "
        f"{list(tensor.shape)}",
    )
    check.that(
        part.flat[0] <= part.flat[1] <= volume(part.box),
        f"{where}.flat={list(part.flat)} leaves its box of {volume(part.box)} elements",
    )


READERS: dict[int, Callable[[dict[str, Any], str, _Check], Manifest]] = {1: _read_version_1}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(values).encode()).hexdigest()


def _lines(value: Any) -> str:
    """Compact JSON, but one line for each entry of a container."""
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n]"
    if isinstance(value, dict) and value:
        lines = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + "\n}"
    return json.dumps(value)
