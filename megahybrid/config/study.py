"""A study: one recipe, several variants, several seeds, what each is scored on, and what should
come out."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megahybrid.config import limits
from megahybrid.config.base import Frozen, Name, did_you_mean
from megahybrid.config.suite import IdRange, NeedleTask
from megahybrid.printable import shortened

RULE = re.compile(r"(\S+):(\S+) (>=|<=|>|<) (?:(\S+):(\S+)|(-?[0-9.]+))")


class Puzzles(Frozen):
    """Documents drawn for a study: one puzzle each, of `length` tokens."""

    kind: Literal["recall", "copy", "induction", "phonebook"]
    length: Annotated[int, limits.LENGTH] = Field(
        ge=8, description="tokens of a puzzle, without what ends the document"
    )
    rows: Annotated[int, limits.ROWS] = Field(ge=1, description="puzzles")
    pairs: Annotated[int, limits.LENGTH] = Field(
        default=4, ge=1, description="recall: pairs in a puzzle"
    )
    targets: Literal["answers", "all"] = Field(
        default="answers", description="answers: nothing else counts in the loss"
    )
    seed: int = Field(default=0, description="of the draws; scoring uses others")


class NeedleDocuments(Frozen):
    """Documents with needles, question and answer, drawn as a suite's needle task draws them.

    Lengths and depths are drawn anew for each; hay: held_out means the dataset `hay`.
    """

    kind: Literal["needles"]
    task: NeedleTask = Field(description="what a document is; `trials` are not used")
    rows: Annotated[int, limits.ROWS] = Field(ge=1, description="documents")
    hay: str | None = Field(default=None, description="dataset of which a held_out haystack is")
    tokenizer: str = Field(description="tokenizer file")
    targets: Literal["answers", "all"] = Field(
        default="answers", description="answers: nothing else counts in the loss"
    )
    seed: int = Field(default=0, description="of the draws; scoring uses others")


Drawn = Annotated[Puzzles | NeedleDocuments, Field(discriminator="kind")]


class Gate(Frozen):
    """The score that a run must reach to count: others are counted and left out of figures."""

    task: Name
    length: int
    least: float = Field(ge=0, le=1, description="token accuracy")


class Control(Frozen):
    """The variant that must learn the task: where fewer of its runs are past the gate, the study
    is void."""

    variant: Name
    seeds: int = Field(ge=1, description="runs of it that must be past the gate")


class HeldOut(Frozen):
    """Held-out loss by position, as `megahybrid evaluate` gives it."""

    length: Annotated[int, limits.LENGTH] = Field(
        ge=1, description="tokens of a row; positions reach as far"
    )
    max_tokens: int | None = Field(default=None, ge=1, description="of each set at most")


class Study(Frozen):
    """A grid of runs. Files are relative to the study's folder, data to where it is run from.

    In `prepare`, overrides and paths {out} stands for the study's own output folder, and in the
    overrides of a branch {trunk} for the folder of the run that it begins with.
    """

    hypothesis: str = Field(description="written before the first run")
    pass_rule: str = Field(description="what must come out, in words")
    rules: list[str] = Field(
        default=[],
        description="the same for the machine: 'variant:figure > variant:figure' or '>= number', "
        "of medians over the runs that count",
    )
    run: str = Field(description="the run file that all share")
    variants: Annotated[dict[Name, list[str]], limits.VARIANTS] = Field(
        min_length=1, description="overrides of the run file, key=value, by name"
    )
    common: list[str] = Field(default=[], description="overrides that all variants share")
    branches: dict[Name, Name] = Field(
        default={},
        description="variants that begin with another's checkpoint, of the same seed: {branch: "
        "trunk}; its newest and all of it, unless they set start.checkpoint and start.take",
    )
    seeds: Annotated[list[int], Field(min_length=1)]
    prepare: list[str] = Field(
        default=[], description="megahybrid data commands, each given once before anything else"
    )
    data: Annotated[dict[Name, Drawn], limits.SOURCES] = Field(
        default={}, description="sources to draw, by name"
    )
    ids: IdRange = Field(default=[2, 90], description="ids of puzzles: first, last + 1")
    suite: str | None = Field(default=None, description="what each run is scored on")
    analyse: str | None = Field(default=None, description="suite on which attention is looked at")
    held_out: HeldOut | None = Field(default=None, description="loss by position")
    gate: Gate | None = Field(default=None, description="which runs count")
    control: Control | None = Field(
        default=None, description="the variant without whose success no rule is judged"
    )
    columns: list[str] = Field(
        default=[], description="figures of the printed table; empty: each task at each length"
    )

    def figures(self) -> list[str]:
        """Every figure that rules and columns name."""
        sides = [side for rule in self.rules for side in rule_parts(rule)[0::2]]
        return [*self.columns, *(figure for variant, figure in sides if variant is not None)]

    @model_validator(mode="after")
    def _check(self) -> "Study":
        if self.suite is None and self.analyse is None and self.held_out is None:
            raise ValueError("names no suite, analyse or held_out (0 figures). Name one.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={shortened(str(self.seeds))} names one twice. Name each once.")
        if (runs := len(self.variants) * len(self.seeds)) > limits.RUNS:
            raise ValueError(
                f"seeds has {len(self.seeds):,} entries for {len(self.variants):,} variants: "
                f"{runs:,} runs, more than {limits.RUNS:,} (each is trained). Name fewer."
            )
        self._check_branches()
        if self.control is not None:
            self._check_control(self.control)
        for rule in self.rules:
            for variant, _ in rule_parts(rule)[0::2]:
                if variant is not None and variant not in self.variants:
                    hint = did_you_mean(variant, self.variants)
                    raise ValueError(f"rules names variant '{variant}', which is not there.{hint}")
        return self

    def _check_branches(self) -> None:
        for name in dict.fromkeys([*self.branches, *self.branches.values()]):
            if name not in self.variants:
                hint = did_you_mean(name, self.variants)
                raise ValueError(f"branches names variant '{name}', which is not there.{hint}")
        for branch, trunk in self.branches.items():
            if trunk in self.branches:
                raise ValueError(
                    f"branches.{branch}={trunk} is a branch itself. Name the variant from which "
                    f"{trunk} begins, or train {trunk} whole."
                )

    def _check_control(self, control: Control) -> None:
        if control.variant not in self.variants:
            hint = did_you_mean(control.variant, self.variants)
            raise ValueError(
                f"control names variant '{control.variant}', which is not there.{hint}"
            )
        if self.gate is None:
            raise ValueError("control has no gate to be past. Give one, or remove control.")
        if control.seeds > len(self.seeds):
            raise ValueError(
                f"control.seeds={control.seeds} is more than seeds has ({len(self.seeds)}). "
                "Use fewer."
            )


Side = tuple[str | None, str]  # variant and figure; None and a number


def rule_parts(rule: str) -> tuple[Side, Side, Side]:
    """Left, (None, comparison), right. Raises ValueError for what is no rule."""
    found = RULE.fullmatch(rule)
    if found is None:
        raise ValueError(
            f"rules has {rule!r}, which is none. Write 'variant:figure > variant:figure' or "
            "'variant:figure >= number'."
        )
    left, figure, comparison, right, other, number = found.groups()
    return (left, figure), (None, comparison), (right, other) if right else (None, number)
