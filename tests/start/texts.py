"""Text of our own, as much as a test needs."""

import random
from pathlib import Path


def write_texts(folder: Path, documents: int = 12, words: int = 3000) -> Path:
    """Files of drawn words in sentences, half of them in Cyrillic letters; the same each time."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    lists = [
        ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(4000)]
        for letters in ("abcdefghijklmnoprstuvw", "абвгдежзиклмнопрстуфя")
    ]
    for number in range(documents):
        chosen = draw.choices(lists[number % 2], k=words + 50 * number)
        lines = [" ".join(chosen[i : i + 10]) + ".\n" for i in range(0, len(chosen), 10)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder
