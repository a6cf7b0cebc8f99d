"""Small conversations of our own making, from which a tiny model learns to answer and to stop.

Facts about Python's library, counting, repeating and politeness: what can be learnt from two
thousand conversations by a model that has read Python's library. Every word of them is ours.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TypeVar

from megahybrid.errors import DataError

T = TypeVar("T")
Turn = tuple[str, str]  # what the user says, and the answer

SYSTEMS = (
    "Answer in a sentence.",
    "You know Python's library.",
    "Be short.",
    "You help people who write Python.",
)
MODULES = {
    "collections": ("deque", "Counter", "OrderedDict", "namedtuple"),
    "functools": ("partial", "lru_cache", "reduce", "wraps"),
    "itertools": ("chain", "islice", "groupby", "product"),
    "contextlib": ("suppress", "closing", "ExitStack"),
    "datetime": ("timedelta", "timezone"),
    "json": ("dumps", "loads", "JSONDecodeError"),
    "os": ("getcwd", "listdir", "getenv"),
    "random": ("shuffle", "choice", "randint"),
    "math": ("sqrt", "floor", "gcd"),
    "threading": ("Lock", "Event", "Barrier"),
    "subprocess": ("Popen", "check_output"),
    "pathlib": ("Path", "PurePath"),
    "struct": ("pack", "unpack"),
    "shutil": ("copyfile", "rmtree", "which"),
}
PLACE = {name: module for module, names in MODULES.items() for name in names}
WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island"),
    *("jacket", "kettle", "lantern", "mirror", "needle", "orange", "pencil", "river", "stone"),
)
GREETINGS = ("Hello.", "Hi.", "Good morning.", "Good evening.")
THANKS = ("Thanks.", "Thank you.", "That is all.", "Good bye.")


def make_chats(output: str | Path, count: int = 2000, seed: int = 1) -> int:
    """Write `count` different conversations, one {"messages"} a line; returns bytes.

    The same count and seed give the same bytes, on any machine.
    """
    target = Path(output)
    if target.suffix != ".jsonl":
        raise DataError(f"output={target} does not end in .jsonl. Name a file like chats.jsonl.")
    if target.is_dir():
        raise DataError(f"output={target} is a folder. Name a file like chats.jsonl.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for messages in made_chats(count, seed):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        size = file.tell()
    os.replace(temporary, target)
    return size


def made_chats(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield `count` conversations, no two of which are equal: lists of messages."""
    draw = Random(seed)
    known: set[str] = set()
    while len(known) < count:
        messages = _conversation(draw)
        text = json.dumps(messages)
        if text not in known:
            known.add(text)
            yield messages


def _conversation(draw: Random) -> list[dict[str, str]]:
    """One conversation: perhaps a system's word, one to four questions, perhaps thanks."""
    turns: list[Turn] = []
    if draw.random() < 0.2:
        turns.append((_one(draw, GREETINGS), "Hello! What would you like to know?"))
    for _ in range(1 + int(draw.random() * 2.5)):
        turns += _one(draw, (_module, _module, _members, _count, _next, _repeat, _call))(draw)
    if draw.random() < 0.3:
        turns.append((_one(draw, THANKS), "You are welcome."))
    found = []
    if draw.random() < 0.3:
        found.append({"role": "system", "content": _one(draw, SYSTEMS)})
    for question, answer in turns:
        found.append({"role": "user", "content": question})
        found.append({"role": "assistant", "content": answer})
    return found


def _module(draw: Random) -> list[Turn]:
    name = _one(draw, tuple(PLACE))
    asked = _one(draw, ("Which module has {}?", "Where is {}?", "What do I import for {}?"))
    turns = [(asked.format(name), f"{name} is in {PLACE[name]}.")]
    if draw.random() < 0.3:
        turns.append(("How do I import it?", f"from {PLACE[name]} import {name}"))
    return turns


def _members(draw: Random) -> list[Turn]:
    module = _one(draw, tuple(MODULES))
    *first, last = MODULES[module]
    return [(f"Name something in {module}.", f"{', '.join(first)} and {last} are in {module}.")]


def _count(draw: Random) -> list[Turn]:
    first, steps = int(draw.random() * 20), 2 + int(draw.random() * 5)
    numbers = [str(first + step) for step in range(steps + 1)]
    return [(f"Count from {numbers[0]} to {numbers[-1]}.", ", ".join(numbers) + ".")]


def _next(draw: Random) -> list[Turn]:
    number = int(draw.random() * 98)
    turns = [(f"What comes after {number}?", f"{number + 1}.")]
    if draw.random() < 0.4:
        turns.append(("And after that?", f"{number + 2}."))
    return turns


def _repeat(draw: Random) -> list[Turn]:
    words = [_one(draw, WORDS) for _ in range(1 + int(draw.random() * 3))]
    return [(f"Say {', '.join(words)}.", ", ".join(words) + ".")]


def _call(draw: Random) -> list[Turn]:
    name, argument = _one(draw, tuple(PLACE)), _one(draw, WORDS)
    return [(f"Call {name} with {argument}.", f"{name}({argument})")]


def _one(draw: Random, choices: tuple[T, ...]) -> T:
    # random() alone is promised to be the same in every version of Python.
    return choices[int(draw.random() * len(choices))]
