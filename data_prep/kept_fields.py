"""The kept fields of a row as one line of strict JSON that any reader takes.

JSON has no NaN, no infinities and no bytes, and a lone surrogate is no Unicode. Numbers that are
not finite become null; bytes become the text they hold, or hex digits where they hold none; lone
surrogates become U+FFFD; what else JSON has no word for (a date, a decimal) becomes its text.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
DEEPEST = 100  # lists within lists; what lies deeper is null


def metadata_line(kept: Mapping[str, Any]) -> bytes:
    """Return the metadata of one row: a JSON object on one line, in ASCII."""
    return json.dumps(_strict(kept, 0), allow_nan=False).encode()


def _strict(value: Any, depth: int) -> Any:
    match value:
        case None | bool() | int():
            return value
        case str():
            return SURROGATE.sub("\ufffd", value)
        case float():
            return value if math.isfinite(value) else None
        case bytes() | bytearray() | memoryview():
            return _text_of(bytes(value))
        case _ if depth >= DEEPEST:
            return None
        case Mapping():
            return {_key(name): _strict(item, depth + 1) for name, item in value.items()}
        case Sequence() | set() | frozenset():
            return [_strict(item, depth + 1) for item in value]
        case _ if hasattr(value, "tolist"):  # an array or a scalar of numpy
            return _strict(value.tolist(), depth + 1)
    return SURROGATE.sub("\ufffd", str(value))


def _key(name: Any) -> str:
    found = _strict(name, DEEPEST)
    return found if isinstance(found, str) else str(name)


def _text_of(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.hex()
