"""A sentencepiece model as a `tokenizer.json`: the form that AutoTokenizer reads without more.

The model file is a protobuf message; the few fields that matter are read here by hand, so that
neither protobuf nor sentencepiece is needed. Fields: sentencepiece_model.proto of sentencepiece.
"""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megahybrid.errors import InteropError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "▁"


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces by id as (text, score, kind), and how text is prepared."""

    pieces: tuple[tuple[str, float, int], ...]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    add_prefix: bool
    squeeze: bool  # runs of spaces become one, and none stay at the ends


def parse(raw: bytes) -> SentencePieceModel:
    """Return the model in the file's bytes. Raises InteropError for kinds we do not know."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(raw):
        if number == 1:
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            pieces.append((fields[1].decode("utf-8"), score, fields.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    algorithm = trainer.get(3, UNIGRAM)
    if algorithm not in (UNIGRAM, BPE) or trainer.get(24):
        raise InteropError(
            "the tokenizer is neither BPE nor unigram with spaces before words, so it has no "
            "tokenizer.json. Export with --tokenizer none, and ship it beside."
        )
    return SentencePieceModel(
        tuple(pieces),
        algorithm,
        bool(trainer.get(35, 0)),
        normalizer.get(2, b""),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """Return the same tokenizer in the format of Hugging Face's tokenizers."""
    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for index, (text, _, kind) in enumerate(model.pieces)
        if kind in (CONTROL, UNKNOWN, USER)
    ]
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    fuse = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [replace, *fuse, *([strip] if model.add_prefix else [])],
        },
        "model": _bpe(model) if model.algorithm == BPE else _unigram(model),
    }


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.squeeze:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _unknown(model: SentencePieceModel) -> int:
    return next(index for index, piece in enumerate(model.pieces) if piece[2] == UNKNOWN)


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": _unknown(model),
        "vocab": [[text, score] for text, score, _ in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    """Merges in the order of the scores of what they make; control and user pieces make none."""
    ids = {text: index for index, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    ranked = sorted(ids, key=lambda text: (-model.pieces[ids[text]][1], ids[text]))
    merges = []
    for text in ranked:
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[_unknown(model)][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {text: index for index, (text, _, _) in enumerate(model.pieces)},
        "merges": [list(pair) for pair in merges],
    }


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of one message: whole numbers for varints, bytes for the rest."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(raw, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
