"""A suite: which questions a checkpoint is asked, at which lengths and depths, and how often."""

import os
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from megahybrid.config import limits
from megahybrid.config.base import Frozen, Name
from megahybrid.config.loader import load
from megahybrid.config.packaged import named, or_packaged

SUITES = Path("configs/suites")

Lengths = Annotated[list[Annotated[int, Field(ge=8), limits.LENGTH]], Field(min_length=1)]
Depths = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
IdRange = Annotated[list[int], Field(min_length=2, max_length=2)]
Strings = Annotated[list[str], Field(min_length=2)]
Draw = Literal["words", "numbers", "uuids"] | Strings


class HeldOutHaystack(Frozen):
    """Documents of one of the run's held-out sets, from a drawn place on, joined."""

    kind: Literal["held_out"]
    set: Name | None = Field(default=None, description="its name; null: the run's first")


class TextHaystack(Frozen):
    """A text file, from a drawn place on, and again from its beginning where it ends."""

    kind: Literal["text"]
    path: str = Field(description="UTF-8 text")


class NoiseHaystack(Frozen):
    """A text that is repeated."""

    kind: Literal["noise"]
    text: str = Field(
        default="The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
        "back again.\n",
        min_length=1,
        description="what is repeated",
    )


class KeysHaystack(Frozen):
    """Needles about other keys, and nothing else."""

    kind: Literal["keys"]


Haystack = Annotated[
    HeldOutHaystack | TextHaystack | NoiseHaystack | KeysHaystack, Field(discriminator="kind")
]


class NeedleTask(Frozen):
    """Sentences hidden in a text, and a question about them at its end.

    single: one needle. multi_key: `needles` of different keys, one asked. multi_value: `needles` of
    one key, all values asked, in the text's order. multi_query: `needles` of different keys, all
    asked. `depths` are where the first needle asked for stands, as a share of the haystack; others
    stand at drawn places.
    """

    kind: Literal["needle"]
    variant: Literal["single", "multi_key", "multi_value", "multi_query"] = "single"
    lengths: Lengths = Field(description="tokens of haystack, needles, question and answer")
    depths: Depths = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], description="0: at the beginning")
    trials: Annotated[int, limits.TRIALS] = Field(
        default=10, ge=1, description="examples per length and depth"
    )
    needles: Annotated[int, limits.NEEDLES] = Field(
        default=4, ge=2, description="sentences, unless single"
    )
    haystack: Haystack = Field(default=NoiseHaystack(kind="noise"), description="what hides them")
    keys: Draw = Field(default="words", description="what is asked about; or a list of strings")
    values: Draw = Field(default="numbers", description="what is to be found; or a list")
    needle: str = Field(
        default=" One of the special magic numbers for {key} is: {value}.",
        description="the sentence, with {key} and {value}",
    )
    question: str = Field(
        default="\nWhat are all the special magic numbers for {key}? They are:",
        description="the end of the prompt, with {key}",
    )
    answer: str = Field(default=" {value}", description="the completion, with {value}")
    joint: str = Field(default=", ", description="between several keys or values")

    @property
    def questions(self) -> int:
        """Examples of the task."""
        return self.trials * len(self.lengths) * len(self.depths)

    @model_validator(mode="after")
    def _check_templates(self) -> "NeedleTask":
        for name, fields in (
            ("needle", ("{key}", "{value}")),
            ("question", ("{key}",)),
            ("answer", ("{value}",)),
        ):
            for field in fields:
                if field not in getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} does not name {field}. Write it where "
                        "it belongs."
                    )
        return self


class SyntheticTask(Frozen):
    """Puzzles over token ids, for models trained on them: no tokenizer is needed.

    recall: pairs of key and value in noise, then every key asked once. copy: a sequence and once
    more. induction: a pair seen once, then its first half. phonebook: a list of names and numbers,
    one asked. `ids` is the range [first, last + 1] they use (null: the model's vocabulary).
    """

    kind: Literal["recall", "copy", "induction", "phonebook"]
    lengths: Lengths = Field(description="tokens, question and answer included")
    pairs: Annotated[int, limits.LENGTH] = Field(
        default=4, ge=1, description="recall: pairs in a row, whatever its length"
    )
    trials: Annotated[int, limits.TRIALS] = Field(default=100, ge=1, description="rows per length")
    ids: IdRange | None = Field(default=None, description="first id, last id + 1")

    @property
    def questions(self) -> int:
        """Examples of the task."""
        return self.trials * len(self.lengths)


RulerName = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
RULER_TASKS: tuple[str, ...] = get_args(RulerName)


class RulerTask(Frozen):
    """RULER's tasks (arXiv 2404.06654) with texts of our own, scored by greedy generation.

    Lengths count the tokens that may be generated, as RULER's do. `essay` is what needles hide in
    (RULER uses essays); `passages` is a JSON file of {question, answers, passages} for qa_1 and
    qa_2.
    """

    kind: Literal["ruler"]
    tasks: Annotated[list[RulerName], limits.TASKS] = Field(
        min_length=1, description="of the thirteen"
    )
    lengths: Lengths = Field(description="tokens of prompt and generation")
    trials: Annotated[int, limits.TRIALS] = Field(
        default=10, ge=1, description="examples per task and length"
    )
    essay: Haystack = Field(default=NoiseHaystack(kind="noise"), description="haystack of needles")
    passages: dict[Literal["qa_1", "qa_2"], str] = Field(
        default={}, description="files of questions"
    )

    @property
    def questions(self) -> int:
        """Examples of the task."""
        return self.trials * len(self.lengths) * len(self.tasks)

    @model_validator(mode="after")
    def _check_passages(self) -> "RulerTask":
        for name in self.tasks:
            if name.startswith("qa") and name not in self.passages:
                raise ValueError(
                    f"passages names no file for {name}. Give a JSON list of question, answers "
                    "and passages, or leave the task out."
                )
        return self


class ChatTask(Frozen):
    """Prompts of held-out conversations: whether the model ends its turn, by greedy generation.

    Each prompt is what a conversation of the set says up to a drawn turn of the assistant, each of
    another conversation. The score is the share of answers that end their turn within `lengths`
    tokens, its end included.
    """

    kind: Literal["chat"]
    set: Name | None = Field(
        default=None, description="a held-out set made of conversations; null: the run's first"
    )
    lengths: Lengths = Field(default=[64], description="tokens that an answer may have")
    trials: Annotated[int, limits.TRIALS] = Field(default=100, ge=1, description="prompts")

    @property
    def questions(self) -> int:
        """Examples of the task."""
        return self.trials


Task = Annotated[NeedleTask | SyntheticTask | RulerTask | ChatTask, Field(discriminator="kind")]


class Suite(Frozen):
    """Tasks by name. Every example is drawn from (seed, task, length, depth, trial) alone."""

    seed: int = Field(default=1, description="of every draw")
    batch_tokens: Annotated[int, limits.BATCH_TOKENS] = Field(
        default=16_384, ge=1, description="tokens passed at once, at most"
    )
    tasks: Annotated[dict[Name, Task], limits.TASKS] = Field(
        min_length=1, description="what is asked"
    )

    @model_validator(mode="after")
    def _check_questions(self) -> "Suite":
        for name, task in self.tasks.items():
            if task.questions > limits.QUESTIONS:
                raise ValueError(
                    f"tasks.{name}.trials={task.trials} asks {task.questions:,} questions over all "
                    f"lengths, more than {limits.QUESTIONS:,} (each is drawn and answered). Lower "
                    "it, or name fewer lengths."
                )
        return self


def load_suite(path: str | Path) -> Suite:
    """Return the suite of that file, or of that name: `needles` is configs/suites/needles.yaml in
    the working directory, or else in megahybrid itself."""
    found = None
    if len(Path(path).parts) == 1 and not Path(path).suffix and not os.path.exists(path):
        found = named(str(path), SUITES)
    return load(found or or_packaged(path), type=Suite)
