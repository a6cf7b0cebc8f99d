"""Special tokens behind the last of a tokenizer that is there already: every other id stays."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahybrid.data.tokenizer import CONTROL_PIECE, Tokenizer
from megahybrid.errors import DataError


def with_tokens(raw: bytes, path: Path, tokenizer: Tokenizer, tokens: Sequence[str]) -> bytes:
    """The file with those of `tokens` that it has not, as special tokens, in their order.

    raw: the file `path`, which `tokenizer` was read from. Raises DataError where a token is an
    ordinary one of its vocabulary.
    """
    new = [token for token in tokens if token not in tokenizer.special_tokens]
    if path.suffix != ".json":
        # Fields of a protobuf message may come in any order: pieces at its end are the last ones.
        return raw + b"".join(_piece(token) for token in new)
    value: dict[str, Any] = json.loads(raw)
    vocab = value["model"].get("vocab")
    for token in new:
        if isinstance(vocab, dict) and token in vocab:
            raise DataError(
                f"{path} has {token} as an ordinary token. Mark it as special in its added_tokens."
            )
    first = tokenizer.info.vocab_size
    value["added_tokens"] = (value.get("added_tokens") or []) + [
        {
            "id": first + number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(new)
    ]
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _piece(token: str) -> bytes:
    """Field 1 of a sentencepiece model: a message of text (1), score (2) and kind (3)."""
    text = token.encode()
    fields = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0)
    fields += b"\x18" + bytes([CONTROL_PIECE])
    assert len(fields) < 128, "lengths of one byte are all that our tokens need"
    return b"\x0a" + bytes([len(fields)]) + fields
