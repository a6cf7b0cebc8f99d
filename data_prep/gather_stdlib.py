"""Text that every machine has: the running Python's own standard library."""

import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from megahybrid.errors import DataError

NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "lib-dynload")


def gather_stdlib(output: str | Path) -> tuple[int, int]:
    """Writes OUTPUT.jsonl, one {"id", "text"} a line: sources in name order, then pydoc topics.

    Returns documents and bytes of text.
    """
    target = Path(output)
    if target.suffix != ".jsonl":
        raise DataError(f"output={target} does not end in .jsonl. Name a file like stdlib.jsonl.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    documents = size = 0
    with open(temporary, "w", encoding="utf-8") as file:
        for name, text in stdlib_documents():
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            documents += 1
            size += len(text.encode())
    os.replace(temporary, target)
    return documents, size


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Name and text of every source file that decodes, then of every topic of `pydoc`'s help."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in NOT_LIBRARY for part in relative.parts):
            continue
        text = _source_text(path)
        if text.strip() and "\0" not in text:
            yield f"lib/{relative.as_posix()}", text
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _source_text(path: Path) -> str:
    """The text of a source file by its declared encoding; empty when it breaks its own promise."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""
