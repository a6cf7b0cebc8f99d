"""A study: one recipe, several variants, several seeds, and what each is scored on."""

from typing import Annotated, Literal

from pydantic import Field

from megahybrid.config.base import Frozen, Name
from megahybrid.config.suite import IdRange


class Puzzles(Frozen):
    """Documents drawn for a study: one puzzle each, of `length` tokens."""

    kind: Literal["recall", "copy", "induction", "phonebook"]
    length: int = Field(ge=8, description="tokens of a puzzle, without what ends the document")
    rows: int = Field(ge=1, description="puzzles")
    pairs: int = Field(default=4, ge=1, description="recall: pairs in a puzzle")
    seed: int = Field(default=0, description="of the draws; scoring uses others")


class Gate(Frozen):
    """What a run must score to count: others are excluded from medians, and counted."""

    task: Name
    length: int
    least: float = Field(ge=0, le=1, description="token accuracy")


class Study(Frozen):
    """A grid of runs. Files are relative to the study's folder."""

    hypothesis: str = Field(description="written before the first run")
    pass_rule: str = Field(description="what must come out, in words")
    run: str = Field(description="the run file that all share")
    variants: dict[Name, list[str]] = Field(
        min_length=1, description="overrides of the run file, key=value, by name"
    )
    seeds: Annotated[list[int], Field(min_length=1)]
    suite: str = Field(description="what each run is scored on")
    data: dict[Name, Puzzles] = Field(default={}, description="sources to draw, by name")
    ids: IdRange = Field(default=[2, 90], description="ids of puzzles: first, last + 1")
    gate: Gate | None = Field(default=None, description="which runs count")
