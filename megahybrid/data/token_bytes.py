"""How many bytes of text each id of a tokenizer stands for, so that losses of several compare."""

import re

import numpy as np

from megahybrid.data.token_file import Array
from megahybrid.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megahybrid.data.word_cache import SPACE_SIGN

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Tokenizer) -> Array | None:
    """The bytes of UTF-8 text of each id [vocab_size], int64; None where a token's name does not
    tell (word pieces, or a file with its own decoder).

    Control tokens and eod stand for none. In a byte-level vocabulary each character of a name is a
    byte; elsewhere a name is the text, with a sign for a space, or one byte.
    """
    names, special = tokenizer.names(), tokenizer.special_tokens
    match tokenizer:
        case SentencePieceTokenizer():
            byte_level = False
        case HuggingFaceTokenizer():
            kinds = tokenizer.decoders()
            byte_level = "ByteLevel" in kinds
            if not byte_level and not kinds & {"Metaspace", "ByteFallback"}:
                return None
        case _:
            return None
    sizes = np.array(
        [
            len(name) if byte_level else 1 if BYTE.fullmatch(name) else _text_bytes(name)
            for name in names
        ],
        dtype=np.int64,
    )
    for name, token in special.items():
        sizes[token] = 0 if name in tokenizer.control_tokens else len(name.encode())
    sizes[tokenizer.info.eod_id] = 0
    return sizes


def _text_bytes(name: str) -> int:
    return len(name.replace(SPACE_SIGN, " ").encode("utf-8", "replace"))
