"""Which layer has which scheme: `LayerPlan`. The sequence of schemes is the architecture."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, assert_never

from pydantic import Discriminator, Field, Tag, model_validator

from megahybrid.config import limits
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.base import Frozen, Name, did_you_mean, few
from megahybrid.errors import ConfigError


class Periodic(Frozen):
    """A pattern by rule: after `prefix`, layer i (counted from the end of the prefix) has `special`
    where i % period == offset and `default` elsewhere; `last` replaces the final layer."""

    default: Name = Field(description="scheme of most layers")
    special: Name = Field(description="scheme of every period-th layer")
    period: int = Field(ge=1, description="layers from one special layer to the next")
    offset: int = Field(ge=0, description="layers before the first special one, after the prefix")
    prefix: list[Name] = Field(default=[], description="schemes of the first layers")
    last: Name | None = Field(default=None, description="scheme of the final layer")

    @model_validator(mode="after")
    def _check_offset(self) -> "Periodic":
        if self.offset >= self.period:
            raise ValueError(
                f"offset={self.offset} never occurs (period={self.period}). "
                f"Use 0 to {self.period - 1}."
            )
        return self

    def names(self, num_layers: int) -> tuple[str, ...]:
        """The scheme's name for each of so many layers, at least those of the prefix."""
        names = list(self.prefix)
        for index in range(num_layers - len(self.prefix)):
            names.append(self.special if index % self.period == self.offset else self.default)
        if self.last is not None:
            names[-1] = self.last
        return tuple(names)


def _pattern_form(value: Any) -> str:
    return "rule" if isinstance(value, dict | Periodic) else "list"


Pattern = Annotated[
    Annotated[list[Name], Tag("list")] | Annotated[Periodic, Tag("rule")],
    Discriminator(_pattern_form),
]


class LayerPlan(Frozen):
    """The scheme of each layer: the sequence of schemes is the architecture."""

    num_layers: Annotated[int, limits.LAYERS] = Field(ge=1, description="blocks")
    pattern: Pattern = Field(description="one period of scheme names, or a rule")
    schemes: Annotated[dict[Name, AttentionScheme], limits.SCHEMES] = Field(
        min_length=1, description="attention schemes by name"
    )

    @model_validator(mode="after")
    def _check_pattern(self) -> "LayerPlan":
        if isinstance(self.pattern, list):
            if not self.pattern:
                raise ValueError(
                    "pattern=[] names no scheme. Name one scheme per layer of a period."
                )
            if self.num_layers % len(self.pattern):
                raise ValueError(
                    f"pattern has {len(self.pattern)} entries, which do not tile "
                    f"num_layers={self.num_layers}. Use a multiple of {len(self.pattern)} layers, "
                    "or a pattern given by period and offset."
                )
        elif len(self.pattern.prefix) > self.num_layers:
            raise ValueError(
                f"pattern.prefix has {len(self.pattern.prefix)} entries, more than "
                f"num_layers={self.num_layers}. Shorten the prefix."
            )
        used = dict.fromkeys(self.names())
        for name in used:
            if name not in self.schemes:
                raise ValueError(
                    f"pattern names '{name}', which schemes does not define."
                    f"{did_you_mean(name, self.schemes)}"
                )
        unused = [name for name in self.schemes if name not in used]
        if unused:
            raise ValueError(
                f"schemes defines '{unused[0]}', which no layer uses "
                f"(pattern uses {few(sorted(used))}). "
                "Remove it or name it in pattern."
            )
        return self

    def names(self) -> tuple[str, ...]:
        """The scheme's name for each layer, first layer first."""
        match self.pattern:
            case list():
                return tuple(self.pattern) * (self.num_layers // len(self.pattern))
            case Periodic():
                return self.pattern.names(self.num_layers)
            case never:
                assert_never(never)

    def expand(self) -> tuple[AttentionScheme, ...]:
        """One scheme per layer, first layer first."""
        return tuple(self.schemes[name] for name in self.names())

    def counts(self) -> list[tuple[AttentionScheme, int]]:
        """Each scheme that layers have, with how many have it, in the order of first layers. What
        is the same in each of them is worked out once."""
        return [(self.schemes[name], count) for name, count in Counter(self.names()).items()]

    def with_overrides(
        self, overrides: Mapping[str, Mapping[str, Any]], where: str = "schemes"
    ) -> "LayerPlan":
        """The plan with fields of named schemes changed, as a stage does: {scheme: {field: value}}.

        Mappings are merged (`position: {theta: 100000}` keeps the scaling); a mapping of another
        `kind` replaces the old one whole, so it must be complete. `where` is the dotted path of
        `overrides`. Raises ConfigError with one line per mistake.
        """
        schemes = dict(self.schemes)
        lines: list[str] = []
        for name, fields in overrides.items():
            if name not in schemes:
                lines.append(
                    f"{where}.{name} names no scheme of model.layer_plan.schemes "
                    f"({few(self.schemes)}).{did_you_mean(name, self.schemes)}"
                )
                continue
            try:
                schemes[name] = self.schemes[name].with_overrides(fields, f"{where}.{name}")
            except ConfigError as error:
                lines += str(error).splitlines()
        if lines:
            raise ConfigError(*lines)
        return self.model_copy(update={"schemes": schemes})
