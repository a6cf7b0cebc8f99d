"""`tokenize`: text to datasets that `megahybrid train` reads, the same whatever the workers."""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from megahybrid.data.chat.probe import check_template
from megahybrid.data.manifest import made_by, sync_folder, write_durably
from megahybrid.data.token_writer import SHARD_TOKENS, TokenWriter, check_shard_tokens
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.data_prep.chat_encoder import ChatJob
from megahybrid.data_prep.encode_unit import EncodeJob, encode_unit
from megahybrid.data_prep.fresh import alone_in
from megahybrid.data_prep.inputs import Unit, cut_units, shared_unit_bytes
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.job_folder import (
    JOB,
    QUARANTINE,
    WORK,
    begin_job,
    identity_of,
    released_if_refused,
)
from megahybrid.data_prep.loss import Loss, refuse_loss, refuse_nothing
from megahybrid.data_prep.merge import Merge, Split, runs_of
from megahybrid.data_prep.progress import byte_bars
from megahybrid.data_prep.survey import PrintLine, print_nothing, survey
from megahybrid.data_prep.unit_files import UnitResult, unit_path
from megahybrid.errors import DataError


@dataclass(frozen=True)
class TokenizeReport:
    """The outcome of `tokenize`.

    Documents and tokens by part, how many were left out, by reason, in how many rows each field to
    be kept was found, and how much of the inputs was lost.
    """

    output: str
    documents: dict[str, int]
    tokens: dict[str, int]
    bad: dict[str, int]
    duplicates: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    loss: Loss = field(default_factory=Loss)


def tokenize(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    held_out: float = 0.0,
    longest: int = 0,
    deduplicate: bool = False,
    seed: int = 0,
    text_field: str = "text",
    format: str = "auto",
    kept: Sequence[str] = (),
    pattern: str = "**/*",
    eod: str | None = None,
    workers: int = 1,
    memory_bytes: int = 2**28,
    shard_tokens: int = SHARD_TOKENS,
    max_bad_fraction: float = 0.05,
    chat: ChatJob | None = None,
    quiet: bool = False,
    print_line: PrintLine = print_nothing,
) -> TokenizeReport:
    """Writes OUTPUT/train, and OUTPUT/held_out and /held_out_long where they are asked for.

    Documents are in an order keyed by (seed, text). `held_out` is a fraction of the documents, by
    hash of the text; `longest` so many of the longest ones, held out apart; `deduplicate` leaves
    out all but the first of documents with the same text; `kept` are fields of the rows that are
    kept beside the tokens. What cannot be read is listed in
    OUTPUT/quarantine.jsonl. An interrupted call, made again with the same arguments, goes on where
    it was and ends with the same bytes (a finished one says what it made); `workers` and
    `memory_bytes` may differ.

    `format` is how every file is read, "auto" by its content; `print_line` is told what is read.
    With `chat` the field holds the messages of a conversation, and the datasets have masks of what
    the assistant wrote.

    Raises DataError when nothing is left to write or a part would be empty, or more than
    `max_bad_fraction` of the bytes on disk (of the rows of a hub dataset) is lost, as soon as that
    is certain. Another call may then begin anew in the same folder.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out} is not from 0 to below 1. Use a fraction like 0.02.")
    check_shard_tokens(shard_tokens)
    folder = Path(output)
    loaded = load_tokenizer(tokenizer, eod)
    info = loaded.info
    if chat is not None:
        with chat.open(loaded, str(tokenizer)) as template:
            check_template(template, loaded)
    table: list[str] = []
    try:
        fields = Fields(text_field, format=format, chat=chat is not None)
        found = survey(inputs, pattern, fields, output=folder, print_line=table.append)
    except DataError:
        _print_all(table, print_line)  # a refusal of what is left out is read beside it
        raise
    files = found.files
    units = list(cut_units(files, shared_unit_bytes(files)))
    threads = workers if len(units) == 1 else 1
    work = str(folder / WORK)
    read = (text_field, seed, work, threads, tuple(kept), format)
    job = EncodeJob(str(tokenizer), eod, *read, chat, info.sha256)
    split = Split(held_out, longest, deduplicate)
    # How units are cut may change with the version; what another one has left is not gone on with.
    identity = identity_of(job, files, info, split, shard_tokens) | {"units": len(units)}
    with alone_in(folder):
        if (made := begin_job(folder, identity)) is not None:
            return TokenizeReport(**made | {"output": str(folder), "loss": Loss(**made["loss"])})
        _print_all(table, print_line)
        with released_if_refused(folder), byte_bars(quiet) as progress:
            results = _encode_all(job, units, workers, progress, max_bad_fraction)
            bad = _quarantine(folder, len(units))
            documents = sum(result.documents for result in results)
            loss = sum((result.loss for result in results), Loss())
            refuse_nothing(documents, bad, loss)
            refuse_loss(bad, loss, max_bad_fraction, str(folder / QUARANTINE))
            command = _command(inputs, tokenizer, job, split, shard_tokens, pattern)
            sources = [source.entry() for source in found.sources]
            parts = ["train"] + ["held_out"] * (held_out > 0) + ["held_out_long"] * (longest > 0)
            merged = folder / WORK / "merged"
            shutil.rmtree(merged, ignore_errors=True)
            writers = {
                part: TokenWriter(
                    merged / part,
                    info,
                    sources=sources,
                    command=command,
                    shard_tokens=shard_tokens,
                    has_metadata=bool(kept),
                )
                for part in parts
            }
            total = sum(result.tokens for result in results) * np.dtype(info.dtype).itemsize
            task = progress.add_task("shuffle", total=total, tokens="")
            merge = Merge(
                runs_of(Path(job.folder), results),
                split,
                writers,
                memory_bytes,
                lambda done: progress.advance(task, done),
            )
            merge.run()
            manifests = {part: writer.close() for part, writer in writers.items()}
            merge.refuse_empty_parts(manifests)
        report = TokenizeReport(
            output=str(folder),
            documents={part: manifest.documents for part, manifest in manifests.items()},
            tokens={part: manifest.tokens for part, manifest in manifests.items()},
            bad=bad,
            duplicates=merge.duplicates,
            kept={name: sum(result.kept.get(name, 0) for result in results) for name in kept},
            loss=loss,
        )
        _publish(folder, parts, identity, report)
        return report


def _print_all(lines: Sequence[str], print_line: PrintLine) -> None:
    for line in lines:
        print_line(line)


def _publish(
    folder: Path, parts: Sequence[str], identity: dict[str, Any], report: TokenizeReport
) -> None:
    """Moves the parts to their places; whenever it is killed, the next call ends the same."""
    for part in parts:
        merged = folder / WORK / "merged" / part
        shutil.rmtree(folder / part, ignore_errors=True)
        os.replace(merged, folder / part)
    sync_folder(folder)
    made = asdict(report) | {"output": ""}  # nothing in the folder depends on where it is
    write_durably(folder / JOB, json.dumps({"job": identity, "report": made}).encode())
    shutil.rmtree(folder / WORK)


def _encode_all(
    job: EncodeJob,
    units: Sequence[Unit],
    workers: int,
    progress: Progress,
    max_bad_fraction: float,
) -> list[UnitResult]:
    total = sum(unit.bytes for unit in units)
    on_disk = sum(unit.bytes for unit in units if not unit.of_rows)
    task = progress.add_task("tokenize", total=total, tokens="")
    results = []
    loss = Loss()
    bad: Counter[str] = Counter()
    tokens = 0
    for result in _results(job, units, workers):
        results.append(result)
        bad.update(result.bad)
        tokens += result.tokens
        progress.update(task, advance=result.bytes, tokens=f"{tokens / 1e6:,.1f} M tokens")
        loss += result.loss
        if len(results) < len(units) and loss.is_sure_to_exceed(max_bad_fraction, on_disk):
            so_far = replace(loss, bytes=max(loss.bytes, on_disk))
            refuse_loss(bad, so_far, max_bad_fraction, f"{job.folder}/unit-*.bad", so_far=True)
    return sorted(results, key=lambda result: result.number)


def _results(job: EncodeJob, units: Sequence[Unit], workers: int) -> Iterator[UnitResult]:
    numbered = enumerate(units)
    if workers <= 1 or len(units) <= 1:
        yield from (encode_unit(job, number, unit) for number, unit in numbered)
        return
    # Spawned, so that no thread of the caller (torch's, say) is copied half alive.
    with ProcessPoolExecutor(
        min(workers, len(units)), mp_context=get_context("spawn"), initializer=_begin_worker
    ) as pool:
        waiting: set[Future[UnitResult]] = set()
        try:
            while True:
                for number, unit in islice(numbered, 2 * workers - len(waiting)):
                    waiting.add(pool.submit(encode_unit, job, number, unit))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise DataError(
                "a tokenizing process was killed (out of memory?). Call the command again to go "
                "on, with fewer --workers."
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _begin_worker() -> None:
    # One process is one core here; the tokenizers library would otherwise start a thread for each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent.

    A pool's process waits for work for ever where its parent was killed, and would go on writing
    into a folder that another call may have by then.
    """
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _quarantine(folder: Path, units: int) -> dict[str, int]:
    """Joins the units' lists of what was bad into one file; counts by reason."""
    reasons: Counter[str] = Counter()
    path = folder / QUARANTINE
    with open(path, "wb") as file:
        for number in range(units):
            with open(unit_path(folder / WORK, number, "bad"), "rb") as listing:
                for line in listing:
                    reasons[json.loads(line)["reason"]] += 1
                    file.write(line)
    if not reasons:
        path.unlink()
    return dict(sorted(reasons.items()))


def _command(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    job: EncodeJob,
    split: Split,
    shard_tokens: int,
    pattern: str,
) -> str:
    """Return a command that would make the same data.

    The options that change only speed or place are left out.
    """
    words = ["megahybrid", "data", "tokenize", *map(str, inputs), "--tokenizer", str(tokenizer)]
    words += ["--held-out", str(split.held_out), "--longest", str(split.longest)]
    field = "--field" if job.chat is None else "--chat"
    words += ["--seed", str(job.seed), field, job.text_field, "--glob", pattern]
    words += ["--shard-tokens", str(shard_tokens)] + (["--eod", job.eod] if job.eod else [])
    words += ["--deduplicate"] * split.deduplicate
    words += ["--format", job.format] if job.format != "auto" else []
    words += [] if job.chat is None else job.chat.words()
    words += [word for name in job.kept for word in ("--keep", name)]
    return made_by(words)
