"""The folder of a `tokenize` job: what it was called with, and what another call may do there.

OUTPUT/.work holds the encoded units of a job and `job.json`, what it was called with; OUTPUT gets
its own `job.json` when the job is done. A call goes on with the units of the same inputs and
tokenizer, whatever it asks of the parts; it begins anew where the last one was refused, or had
encoded nothing; otherwise it is told what differs.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megahybrid.data.manifest import MANIFEST_NAME, TokenizerInfo, write_durably
from megahybrid.data_prep.encode_unit import EncodeJob
from megahybrid.data_prep.fresh import refuse_occupied
from megahybrid.data_prep.hub import is_hub
from megahybrid.data_prep.inputs import InputFile
from megahybrid.data_prep.loss import Refused
from megahybrid.data_prep.merge import Split
from megahybrid.errors import DataError

WORK = ".work"
QUARANTINE = "quarantine.jsonl"
JOB = "job.json"  # in WORK: the unfinished job; in the output: the one that made it
REFUSED = "refused"  # in WORK: the job's outcome was refused, so that its units bind nobody
OF_PARTS = ("held_out", "longest", "deduplicate", "shard_tokens")  # nothing encoded depends on them
PARTS = ("train", "held_out", "held_out_long")
TOLD = 3  # changed files that a message names
OPTIONS = {"text_field": "--field", "kept": "--keep", "eod": "--eod", "tokenizer": "--tokenizer"}
OF_TOKENIZER = ("kind", "sha256", "vocab_size", "eod_id")

Identity = dict[str, Any]


def identity_of(
    job: EncodeJob,
    files: Sequence[InputFile],
    info: TokenizerInfo,
    split: Split,
    shard_tokens: int,
) -> Identity:
    """All that the bytes of a job's output depend on."""
    listed = [_named(file) for file in files]
    value = asdict(job) | info.model_dump() | asdict(split)
    del value["folder"], value["threads"], value["chat"], value["tokenizer_sha256"]
    if job.chat is not None:
        value |= job.chat.identity()
    # As it is read again: tuples come back as lists.
    return dict(json.loads(json.dumps(value | {"files": listed, "shard_tokens": shard_tokens})))


def _named(file: InputFile) -> list[Any]:
    """Return the facts by which an input is known to be the same.

    They are its size and time, or its content where it is a copy of a stream.
    """
    if is_hub(file.path):
        return [str(file.path)]
    if file.held is not None:
        return [file.shown, file.size, file.digest]
    return [str(file.path), file.size, file.path.stat().st_mtime_ns]


def begin_job(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """Makes the work folder, or goes on with what lies there; what was made, if it is finished.

    Raises DataError, and has written nothing, where another job holds the folder.
    """
    work = folder / WORK
    finished = _read(folder / JOB)
    if finished is not None:
        return _finished(folder, finished, identity)
    unfinished = _read(work / JOB)
    if unfinished is not None and _encoding(unfinished) == _encoding(identity):
        (work / REFUSED).unlink(missing_ok=True)
        if unfinished != identity:
            for part in PARTS:  # which a killed call may have moved to its place already
                shutil.rmtree(folder / part, ignore_errors=True)
            write_durably(work / JOB, json.dumps(identity).encode())
        return None
    if unfinished is not None and _worth_keeping(work):
        raise DataError(
            f"{folder} holds an unfinished job with other inputs or options "
            f"({_difference(unfinished, identity)}). Call it with the same ones, or remove {work}."
        )
    refuse_occupied(folder, (WORK, QUARANTINE))
    shutil.rmtree(work, ignore_errors=True)
    (folder / QUARANTINE).unlink(missing_ok=True)
    work.mkdir(parents=True)
    write_durably(work / JOB, json.dumps(identity).encode())
    return None


@contextmanager
def released_if_refused(folder: Path) -> Iterator[None]:
    """Leave the folder to any other call where this one is refused.

    No folder stays where nothing was encoded or listed.
    """
    try:
        yield
    except Refused:
        work = folder / WORK
        if any(tokens.stat().st_size for tokens in work.glob("unit-*.tokens")):
            write_durably(work / REFUSED, b"")
        else:
            shutil.rmtree(work, ignore_errors=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def _worth_keeping(work: Path) -> bool:
    """Return whether an interrupted call had encoded something."""
    return not (work / REFUSED).exists() and any(work.glob("unit-*.done"))


def _finished(folder: Path, value: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    made, report = value.get("job"), value.get("report")
    if not isinstance(made, dict) or not isinstance(report, dict) or not _is_report(report):
        raise _damaged(folder / JOB)
    if made != identity:
        raise DataError(
            f"{folder} is not empty: it was made from other inputs or options "
            f"({_difference(made, identity)}). Name a new folder, or remove this one."
        )
    for part in report["tokens"]:
        if not (folder / part / MANIFEST_NAME).exists():
            raise DataError(
                f"{folder} is not empty: {JOB} says that it is finished, but "
                f"{part}/{MANIFEST_NAME} is missing. Name a new folder, or remove this one."
            )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return dict(report)


def _is_report(value: Mapping[str, Any]) -> bool:
    counts = [value.get(name) for name in ("documents", "tokens", "bad", "kept", "loss")]
    return all(
        isinstance(count, dict) and all(type(number) is int for number in count.values())
        for count in counts
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Return the value of a job.json; None where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(path)
    return value


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged or not ours. Name a new folder, or remove this one.")


def _encoding(identity: Mapping[str, Any]) -> Identity:
    return {name: value for name, value in identity.items() if name not in OF_PARTS}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences of two jobs on one line, the files first."""
    try:
        differences = list(_changed_files(before.get("files"), now["files"]))
    except (TypeError, ValueError, IndexError, OverflowError):
        return f"{JOB} is damaged"
    if any(before.get(name) != now[name] for name in OF_TOKENIZER):
        hashes = [str(job.get("sha256"))[:12] for job in (before, now)]
        word = " then and now" if hashes[0] == hashes[1] else f" {hashes[0]} then, {hashes[1]} now"
        eods = f"eod_id {before.get('eod_id')} then, {now['eod_id']} now"
        differences.append(f"the tokenizer has sha256{word}, {eods}")
    for name in sorted({*before, *now} - {"files", "units", *OF_TOKENIZER}):
        if before.get(name) != now.get(name):
            option = OPTIONS.get(name, "--" + name.replace("_", "-"))
            differences.append(f"{option} was {before.get(name)}, is {now.get(name)}")
    if not differences:
        differences.append(f"another version cut the inputs into {before.get('units')} units")
    return "; ".join(differences)


def _changed_files(before: Any, now: Sequence[Sequence[Any]]) -> Iterator[str]:
    old = {entry[0]: entry for entry in before or ()}
    new = {entry[0]: entry for entry in now}
    for verb, names in (("is new", new.keys() - old.keys()), ("is gone", old.keys() - new.keys())):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            yield f"input {min(names)}{more} {verb}"
    changed = [name for name in new if name in old and old[name] != new[name]]
    for name in changed[:TOLD]:
        (_, size, moment), (_, size_now, moment_now) = old[name], new[name]
        if size != size_now:
            yield f"input {name} had {size:,} bytes, has {size_now:,}"
        elif isinstance(moment, str) or isinstance(moment_now, str):
            yield f"input {name} holds something else"
        else:
            yield f"input {name} was modified at {_time(moment)}, then at {_time(moment_now)}"
    if len(changed) > TOLD:
        yield f"{len(changed) - TOLD:,} more inputs have changed"
    if list(old) != list(new) and old.keys() == new.keys():
        yield "the inputs come in another order"


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
