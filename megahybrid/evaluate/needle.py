"""Needles in haystacks: sentences hidden at a depth of a text, and a question at its end."""

import numpy as np

from megahybrid.config.suite import KeysHaystack, NeedleTask
from megahybrid.errors import ConfigError
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.haystack import Hay, Material, draw_strings, make_hay


class NeedleMaker:
    """Examples of one needle task, each exactly as long as asked."""

    def __init__(self, task: NeedleTask, material: Material) -> None:
        self.task, self.material = task, material
        self.hay: Hay | None = None
        if not isinstance(task.haystack, KeysHaystack):
            self.hay = make_hay(task.haystack, material)

    def make(
        self,
        length: int,
        depth: float,
        draw: np.random.Generator,
        generated_tokens: int | None = None,
    ) -> Example:
        """An example of `length` tokens with the first needle asked for at `depth`.

        With `generated_tokens` that many count in place of the answer's own. Raises ConfigError
        where the length cannot hold needles, question and answer.
        """
        task, encode = self.task, self.material.encode
        keys, values, asked = self._draw_needles(draw)
        needles = [
            encode(task.needle.format(key=key, value=value))
            for key, value in zip(keys, values, strict=True)
        ]
        depths = [depth, *draw.random(len(needles) - 1).tolist()]
        order = sorted(range(len(needles)), key=lambda n: depths[n])  # of the text
        # Several values are asked in the order in which the text has them.
        wanted = [n for n in order if n in asked] if task.variant == "multi_value" else asked
        named = list(dict.fromkeys(keys[n] for n in asked))
        question = encode(task.question.format(key=task.joint.join(named)))
        found = [values[n] for n in wanted]
        self.material.check_written([*keys, *found])
        answer = encode(task.answer.format(value=task.joint.join(found)))
        fixed = sum(map(len, needles)) + len(question)
        fixed += len(answer) if generated_tokens is None else generated_tokens
        if fixed >= length:
            raise ConfigError(
                f"lengths={length} is too short for needles, question and answer ({fixed} tokens "
                "with this tokenizer). Use longer rows."
            )
        hay, positions = self._hay(length - fixed, keys, draw)
        cuts = _cuts([depths[n] for n in order], len(hay), positions)
        tokens: list[int] = []
        spans: dict[int, tuple[int, int]] = {}
        done = 0
        for number, cut in zip(order, cuts, strict=True):
            tokens += hay[done:cut]
            spans[number] = (len(tokens), len(tokens) + len(needles[number]))
            tokens += needles[number]
            done = cut
        tokens += hay[done:]
        start = len(tokens)
        tokens += question
        return Example(
            tuple(tokens + answer),
            start,
            len(tokens),
            tuple(sorted(spans[n] for n in asked)),
            labels={"length": length, "depth": depth},
            references=tuple(found),
        )

    def _draw_needles(self, draw: np.random.Generator) -> tuple[list[str], list[str], list[int]]:
        """Keys and values of all needles, and which of them are asked for."""
        task = self.task
        count = 1 if task.variant == "single" else task.needles
        values = draw_strings(task.values, count, draw)
        if task.variant == "multi_value":
            return draw_strings(task.keys, 1, draw) * count, values, list(range(count))
        keys = draw_strings(task.keys, count, draw)
        return keys, values, list(range(count)) if task.variant == "multi_query" else [0]

    def _hay(
        self, count: int, keys: list[str], draw: np.random.Generator
    ) -> tuple[list[int], list[int] | None]:
        if self.hay is not None:
            return self.hay(count, draw)
        task, hay, positions = self.task, list[int](), [0]
        lists = [known for known in (task.keys, task.values) if isinstance(known, list)]
        few = min([16, *map(len, lists)])
        if isinstance(task.keys, list) and set(task.keys) <= set(keys):
            raise ConfigError(
                f"keys={task.keys} are all asked about, so none is left for haystack.kind=keys. "
                "Give more keys."
            )
        while len(hay) < count:
            others = [k for k in draw_strings(task.keys, few, draw) if k not in keys]
            for key, value in zip(others, draw_strings(task.values, few, draw), strict=False):
                hay += self.material.encode(task.needle.format(key=key, value=value))
                positions.append(len(hay))
        return hay[:count], [position for position in positions if position <= count]


def _cuts(depths: list[float], size: int, positions: list[int] | None) -> list[int]:
    """Return where in `size` tokens of hay needles go.

    They go to the nearest of `positions`, if there are any.
    """
    cuts = [round(depth * size) for depth in depths]
    if positions is None:
        return cuts
    known = np.asarray(positions)
    return [int(known[np.abs(known - cut).argmin()]) for cut in cuts]
