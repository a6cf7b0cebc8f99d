"""The work of one worker: a unit of text becomes tokens and records, in runs sorted by key."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.data_prep.chat_encoder import ChatEncoder, ChatJob
from megahybrid.data_prep.document_encoder import DocumentEncoder
from megahybrid.data_prep.documents import BadDocument, LongDocument, read_unit
from megahybrid.data_prep.inputs import Unit
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.loss import loss_of
from megahybrid.data_prep.unit_files import RunWriter, UnitResult, read_result


@dataclass(frozen=True)
class EncodeJob:
    """The settings that every unit needs.

    threads: of the tokenizer, where one unit is all the work. chat: of conversations, which are
    documents then. tokenizer_sha256: by which a file that was written anew is another one.
    """

    tokenizer: str
    eod: str | None
    text_field: str
    seed: int
    folder: str
    threads: int = 1
    kept: tuple[str, ...] = ()
    format: str = "auto"
    chat: ChatJob | None = None
    tokenizer_sha256: str = ""


def encode_unit(job: EncodeJob, number: int, unit: Unit) -> UnitResult:
    """Encodes a unit into `.tokens`, `.records` and `.bad`; one already done is not done again."""
    if (done := read_result(job.folder, number)) is not None:
        return done
    tokenizer = _tokenizer(job.tokenizer, job.eod, job.threads, job.tokenizer_sha256)
    chat = job.chat
    fields = Fields(job.text_field, job.kept, format=job.format, chat=chat is not None)
    dtype = np.dtype(tokenizer.info.dtype)
    with (
        RunWriter(job.folder, number, dtype, has_counts=chat is not None) as writer,
        nullcontext() if chat is None else chat.open(tokenizer, job.tokenizer) as template,
    ):
        encoder = DocumentEncoder(job.seed, tokenizer, writer)
        if chat is not None and template is not None:
            encoder = ChatEncoder(job.seed, tokenizer, writer, chat, template)
        size = 0.0
        for item in read_unit(unit, fields):
            size += item.size
            if isinstance(item, BadDocument):
                encoder.leave_out(item)
            elif isinstance(item, LongDocument):
                encoder.add_long(item)
            else:
                encoder.add(item)
        encoder.flush()
        rows = round(size) if unit.of_rows else None
        loss = loss_of(unit.bytes, rows, encoder.bad, encoder.empty)
        return writer.finish(unit.bytes, encoder.bad, dict(fields.found), loss)


@lru_cache(maxsize=1)
def _tokenizer(path: str, eod: str | None, threads: int, sha256: str) -> Tokenizer:
    return load_tokenizer(path, eod, threads)
