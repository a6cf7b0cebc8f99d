"""`ParallelConfig`: how a run is spread over ranks. The data degree is never written: it is the
world size divided by `tensor` and the context axis. Sequence parallelism is on exactly when
tensor > 1."""

import bisect
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from megahybrid.config import limits
from megahybrid.config.base import Frozen
from megahybrid.config.model import ModelConfig, divisors, either
from megahybrid.config.stages import Length

Degree = Annotated[int, Field(ge=1), limits.CONTEXT]


def _context_form(value: Any) -> str:
    return "by_length" if isinstance(value, dict) else "one"


class ExchangeConfig(Frozen):
    """What context ranks send one another for attention. auto takes, for each scheme, the one of
    the fewest bytes among those that its heads allow."""

    full: Literal["auto", "heads", "keys"] = Field(
        default="auto",
        description="layers without a window (or with one as long as the row): heads, the whole "
        "row for a part of the heads; keys, all keys and values for a part of the queries",
    )
    windowed: Literal["auto", "halo", "heads", "keys"] = Field(
        default="auto",
        description="layers with a window: halo, the window - 1 keys and values before each "
        "segment; heads or keys as for full",
    )
    layout: Literal["auto", "contiguous", "zigzag"] = Field(
        default="auto",
        description="what a rank holds of a row: one segment, or two that mirror one another, "
        "which balances full attention over keys; auto: zigzag where a full layer exchanges keys",
    )


class ParallelConfig(Frozen):
    """Degrees of parallelism."""

    tensor: int = Field(default=1, ge=1, description="ranks that share each layer's matrices")
    context: Annotated[
        Annotated[Degree, Tag("one")]
        | Annotated[dict[Length, Degree], limits.LENGTHS, Tag("by_length")],
        Discriminator(_context_form),
    ] = Field(
        default=1,
        description="ranks that share each row of tokens, for all lengths or by length; others "
        "take the degree of the next longer length named",
    )
    exchange: ExchangeConfig = Field(
        default=ExchangeConfig(), description="how attention crosses the context ranks"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="what the data ranks share: 0 nothing, 1 optimizer states, 2 and gradients, "
        "3 and weights",
    )
    offload: Literal["none", "moments"] = Field(
        default="none",
        description="what waits in host memory between updates: AdamW's moments, 8 bytes a "
        "parameter, which visit the device in pieces; every bit of a run is the same",
    )

    @model_validator(mode="after")
    def _check_context(self) -> "ParallelConfig":
        if self.context == {}:
            raise ValueError("context={} names no length. Use one degree, or {length: degree}.")
        for degree in self.context_degrees:
            if self.context_axis % degree:
                raise ValueError(
                    f"context names a degree of {degree}, which does not divide the context axis "
                    f"of {self.context_axis} ranks (the largest degree). "
                    f"Use {either(divisors(self.context_axis))}."
                )
        return self

    @property
    def context_axis(self) -> int:
        """Ranks of the context axis: the largest degree of any length."""
        return self.context_degrees[-1]

    @property
    def context_degrees(self) -> tuple[int, ...]:
        """The degrees that some length has, each once, smallest first."""
        if isinstance(self.context, int):
            return (self.context,)
        return tuple(sorted(set(self.context.values()))) or (1,)

    def context_degree(self, length: int) -> int:
        """Ranks that share a row of `length` tokens: as named, else the degree of the next longer
        length named, else (longer than all) that of the longest."""
        if isinstance(self.context, int):
            return self.context
        named = sorted(self.context)
        return self.context[named[min(bisect.bisect_left(named, length), len(named) - 1)]]

    @property
    def model_ranks(self) -> int:
        """Ranks of one data rank: tensor times the context axis."""
        return self.tensor * self.context_axis

    def data_degree(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size` ranks."""
        return world_size // self.model_ranks

    def problems(self, model: ModelConfig, world_size: int | None) -> list[str]:
        """Return what does not fit the model or the number of ranks, one line each."""
        lines = []
        tensor, legal = self.tensor, legal_tensor_degrees(model)
        use = f"Use {either(legal)}"
        if model.num_heads % tensor:
            lines.append(
                f"parallel.tensor={tensor} does not divide model.num_heads={model.num_heads}. "
                f"{use}, or change model.num_heads."
            )
        elif model.num_kv_heads % tensor and tensor % model.num_kv_heads:
            lines.append(
                f"parallel.tensor={tensor} and model.num_kv_heads={model.num_kv_heads} do not "
                f"divide one another. {use}, or change model.num_kv_heads."
            )
        if model.intermediate_size % tensor:
            lines.append(
                f"parallel.tensor={tensor} does not divide "
                f"model.intermediate_size={model.intermediate_size}. "
                f"{use}, or change model.intermediate_size."
            )
        if world_size is not None and world_size % tensor == 0:
            lines += self._context_problems(world_size)
        if world_size is not None and world_size % tensor:
            fitting = [n for n in legal if world_size % n == 0]
            lines.append(
                f"parallel.tensor={tensor} does not divide the world size of {world_size} ranks. "
                f"Use {either(fitting)}, or start a multiple of {tensor} ranks."
            )
        return lines

    def _context_problems(self, world_size: int) -> list[str]:
        if world_size % self.model_ranks == 0:
            return []
        there = world_size // self.tensor
        fitting = [n for n in range(1, self.context_axis) if there % n == 0]
        return [
            f"parallel.tensor={self.tensor} times {self.context_axis} context ranks "
            f"(parallel.context) does not divide the world size of {world_size} ranks. Use "
            f"{either(fitting)} context rank{'s' * (fitting != [1])}, or start a multiple of "
            f"{self.model_ranks} ranks."
        ]


def legal_tensor_degrees(model: ModelConfig) -> list[int]:
    """Tensor degrees that divide the query heads and the MLP, and divide or are divided by the KV
    heads (then key and value weights are replicated and sliced)."""
    return [n for n in divisors(model.num_heads) if is_legal_tensor_degree(model, n)]


def is_legal_tensor_degree(model: ModelConfig, degree: int) -> bool:
    """Return whether `degree` tensor ranks can share each layer's heads and MLP."""
    return (
        model.num_heads % degree == 0
        and model.intermediate_size % degree == 0
        and (model.num_kv_heads % degree == 0 or degree % model.num_kv_heads == 0)
    )
