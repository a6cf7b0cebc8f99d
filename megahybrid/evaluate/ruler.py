"""RULER's thirteen tasks (arXiv 2404.06654), drawn here, offline, for any tokenizer and length.

The templates are our own words; what is varied, asked and counted is the paper's. Scores are shares
of the reference strings found in greedily generated text (for questions: whether one is found).
"""

import json
import string
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.config.packaged import located, or_packaged
from megahybrid.config.suite import KeysHaystack, NeedleTask, NoiseHaystack, RulerTask
from megahybrid.errors import ConfigError, DataError
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.haystack import Hay, Material, draw_strings, make_hay
from megahybrid.evaluate.needle import NeedleMaker
from megahybrid.plain_file import read_plain_file

# Tokens that may be generated, as RULER's own settings have them.
GENERATED = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}

FILLER_TOKENS = 100  # of a passage made of essays

# name: (variant, hay, keys, values)
NEEDLES: dict[str, tuple[str, str, str, str]] = {
    "niah_single_1": ("single", "noise", "words", "numbers"),
    "niah_single_2": ("single", "essay", "words", "numbers"),
    "niah_single_3": ("single", "essay", "words", "uuids"),
    "niah_multikey_1": ("multi_key", "essay", "words", "numbers"),
    "niah_multikey_2": ("multi_key", "keys", "words", "numbers"),
    "niah_multikey_3": ("multi_key", "keys", "uuids", "uuids"),
    "niah_multivalue": ("multi_value", "essay", "words", "numbers"),
    "niah_multiquery": ("multi_query", "essay", "words", "numbers"),
}
# (how many items, draws) -> text, question, references
Build = Callable[[int, np.random.Generator], tuple[str, str, list[str]]]
NOISE = NoiseHaystack(kind="noise")


def generated_tokens(name: str, length: int) -> int:
    """Tokens that may be generated for a task; a fourth of the length where that is less."""
    return min(GENERATED[name.split("_")[0]], max(8, length // 4))


def matches(name: str, references: Sequence[str], text: str) -> float:
    """RULER's score: the share of references in the text; for questions 1 if any is in it."""
    found = [reference.lower() in text.lower() for reference in references]
    return float(any(found)) if name.startswith("qa") else sum(found) / len(found)


class RulerMaker:
    """Examples of RULER's tasks for one tokenizer."""

    def __init__(self, task: RulerTask, material: Material) -> None:
        self.task, self.material = task, material
        self._needles: dict[str, NeedleMaker] = {}
        self._essay: Hay | None = None
        self.questions: dict[str, list[dict[str, Any]]] = {
            str(name): _read_questions(Path(file), str(name))
            for name, file in task.passages.items()
        }

    def make(self, name: str, length: int, draw: np.random.Generator) -> Example:
        """One example: prompt and `generated_tokens` are at most `length` tokens.

        Needle tasks fill the length exactly; others hold as many statements, words or passages as
        fit. Raises ConfigError where not even the question fits.
        """
        if name in NEEDLES:
            maker = self._needles.setdefault(name, self._needle_maker(name))
            depth = float(draw.integers(0, 41)) / 40
            return maker.make(length, depth, draw, generated_tokens(name, length))
        seed = int(draw.integers(2**62))
        for build, least in self._builders(name, draw):
            found = self._fitted(name, length, build, least, seed)
            if found is not None:
                return found
        raise ConfigError(
            f"lengths={length} is too short for RULER's {name} "
            f"({length - generated_tokens(name, length)} tokens beside the generated ones, with "
            "this tokenizer). Use longer rows."
        )

    def _builders(self, name: str, draw: np.random.Generator) -> list[tuple[Build, int]]:
        """Return the functions that may make the text, in order of preference.

        Each comes with the least items that it must have.
        """
        if name == "vt":
            return [(variables, 1)]
        if name == "fwe":
            return [(frequent_words, 1)]
        if name == "cwe":
            return [
                (partial(common_words, times=times), least)
                for times, least in (((30, 3), 20), ((10, 2), 20), ((4, 1), 1))
            ]
        items = self.questions[name]
        chosen = int(draw.integers(len(items)))
        return [(lambda size, draw: question(items, chosen, size, draw, self._filler), 1)]

    def _filler(self, draw: np.random.Generator) -> str:
        """A passage cut out of the essays, for rows longer than all passages."""
        assert self.material.tokenizer is not None  # questions were encoded with it
        if self._essay is None:
            essay = self.task.essay
            # Needles make no passage.
            source = NOISE if isinstance(essay, KeysHaystack) else essay
            self._essay = make_hay(source, self.material)
        text = self.material.tokenizer.decode(self._essay(FILLER_TOKENS, draw)[0])
        return " ".join(text.split())

    def _needle_maker(self, name: str) -> NeedleMaker:
        variant, hay, keys, values = NEEDLES[name]
        hays = {"noise": NOISE, "essay": self.task.essay, "keys": KeysHaystack(kind="keys")}
        task = NeedleTask.model_validate(
            {
                "kind": "needle",
                "variant": variant,
                "lengths": [8],
                "haystack": hays[hay],
                "keys": keys,
                "values": values,
            }
        )
        return NeedleMaker(task, self.material)

    def _fitted(
        self,
        name: str,
        length: int,
        build: Build,
        least: int,
        seed: int,
    ) -> Example | None:
        """The example with the most items that fits: sizes double, then are halved between.

        None where not even `least` items fit.
        """
        budget = length - generated_tokens(name, length)
        encode = self.material.encode

        def parts(size: int) -> tuple[list[int], list[int], list[str]]:
            body, asked, found = build(size, np.random.default_rng(seed))
            return encode(body), encode(asked), found

        low, high = 0, least
        while high <= length and sum(map(len, parts(high)[:2])) <= budget:
            low, high = high, 2 * high
        while low and high - low > max(1, low // 64):
            middle = (low + high) // 2
            if sum(map(len, parts(middle)[:2])) <= budget:
                low = middle
            else:
                high = middle
        if low < least:
            return None
        body, asked, found = parts(low)
        self.material.check_written(found)
        answer = encode(" " + ", ".join(found if name[:2] != "qa" else found[:1]))
        tokens = tuple(body + asked + answer)
        start = len(body)
        labels = {"length": length}
        return Example(tokens, start, start + len(asked), (), None, labels, tuple(found))


def variables(size: int, draw: np.random.Generator, hops: int = 4) -> tuple[str, str, list[str]]:
    """vt: a chain of `hops` assignments scattered over `size` sentences of noise."""
    letters = np.array(list(string.ascii_uppercase))
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(draw.choice(letters, 5))
        names += [name] if name not in names else []
    value = str(draw.integers(10_000, 100_000))
    statements = [f"VAR {names[0]} = {value}."]
    statements += [f"VAR {names[n + 1]} = VAR {names[n]}." for n in range(hops)]
    positions = np.sort(draw.integers(0, size + 1, hops + 1))
    text = [NOISE.text.strip()] * size
    for position, line in sorted(zip(positions, statements, strict=True), key=lambda one: -one[0]):
        text.insert(int(position), line)
    # Equal places were inserted in reverse of their order; assignments must follow one another.
    lines = iter(statements)
    text = [next(lines) if line.startswith("VAR ") else line for line in text]
    body = "Follow the chain of assignments in this text.\n" + "\n".join(text)
    return body, f"\nAll variables whose value is {value} are:", names


def common_words(
    size: int, draw: np.random.Generator, times: tuple[int, int], common: int = 10
) -> tuple[str, str, list[str]]:
    """cwe: ten words stand often and `size` others seldom, as the two numbers `times` say."""
    often, seldom = times
    words = draw_strings("words", common + size, draw)
    listed = [word for word in words[:common] for _ in range(often)]
    listed += [word for word in words[common:] for _ in range(seldom)]
    shuffled = [listed[n] for n in draw.permutation(len(listed))]
    numbered = " ".join(f"{n + 1}. {word}" for n, word in enumerate(shuffled))
    body = "Some words of this list stand in it far more often than others.\n" + numbered
    return body, f"\nThe {common} most common words of the list are:", words[:common]


def frequent_words(
    size: int, draw: np.random.Generator, alpha: float = 2.0
) -> tuple[str, str, list[str]]:
    """fwe: about 4 × `size` coded words, the k-th with a frequency ∝ k^-alpha; the first three."""
    letters = np.array(list(string.ascii_lowercase))
    coded: list[str] = []
    while len(coded) < 50:
        word = "".join(draw.choice(letters, 6))
        coded += [word] if word not in coded else []
    ranks = np.arange(1, len(coded) + 1) ** -alpha
    counts = np.round(8 * size * ranks / ranks.sum()).astype(int)
    # The third must stand out from the fourth at any size.
    counts[:3] = np.maximum(counts[:3], counts[3] + np.array([3, 2, 1]))
    listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
    shuffled = [listed[n] for n in draw.permutation(len(listed))]
    body = "In this coded text some words are frequent; dots are noise.\n"
    return body + " ... ".join(shuffled), "\nThe three most frequent coded words are:", coded[:3]


def question(
    items: Sequence[dict[str, Any]],
    chosen: int,
    size: int,
    draw: np.random.Generator,
    filler: Callable[[np.random.Generator], str],
) -> tuple[str, str, list[str]]:
    """qa: the passages of one question among `size` - 1 others in drawn order.

    The others are those of other questions, then, where there are no more, pieces of essays.
    """
    item = items[chosen]
    gold = list(item["passages"])
    known = dict.fromkeys(text for other in items for text in other["passages"])
    others = [text for text in known if text not in gold]
    few = [others[n] for n in draw.permutation(len(others))[: max(0, size - 1)]]
    texts = gold + few + [filler(draw) for _ in range(size - 1 - len(few))]
    listed = [texts[n] for n in draw.permutation(len(texts))]
    body = "Answer the question from these documents.\n"
    body += "\n".join(f"Document {n + 1}: {text}" for n, text in enumerate(listed))
    return body, f"\nQuestion: {item['question']}\nAnswer:", list(item["answers"])


def _read_questions(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        items = json.loads(read_plain_file(located(or_packaged(path))))
    except (OSError, ValueError) as error:
        raise DataError(f"passages.{name}={path} cannot be read as JSON ({error}).") from None
    fields = ("question", "answers", "passages")
    for item in items if isinstance(items, list) and items else [None]:
        if not isinstance(item, dict) or not all(item.get(field) for field in fields):
            raise DataError(
                f"passages.{name}={path} is not a list of {', '.join(fields)} (one entry lacks "
                "some). Give each entry a text and two lists of texts."
            )
    return items
