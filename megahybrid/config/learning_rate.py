"""Learning-rate segments: functions of the tokens counted in a stage.

`rate(tokens, stage_tokens)` takes the tokens counted through the END of a step, so the first step
already moves and the last one has `end`. Tokens beyond the stage's own (the surplus of its last
step) count as its last one.
"""

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from megahybrid.config.base import Frozen


class _Segment(Frozen):
    start: float = Field(ge=0, description="rate after the warm-up")
    end: float = Field(ge=0, description="rate of the stage's last step")
    warmup_tokens: int = Field(
        default=0, ge=0, description="tokens over which the rate rises from 0"
    )

    def rate(self, tokens: int, stage_tokens: int) -> float:
        """The learning rate of the step that ends with `tokens` of the stage counted."""
        tokens = min(tokens, stage_tokens)
        if tokens < self.warmup_tokens:
            return self.start * tokens / self.warmup_tokens
        return self.after_warmup(tokens - self.warmup_tokens, stage_tokens - self.warmup_tokens)

    @abstractmethod
    def after_warmup(self, tokens: int, of: int) -> float:
        """The rate `tokens` after the warm-up of a stage with `of` tokens after it."""

    def shortest_stage(self) -> int:
        """The fewest tokens of a stage that has room for the segment's parts."""
        return self.warmup_tokens + 1


class LinearRate(_Segment):
    """A straight line from start to end."""

    kind: Literal["linear"]

    def after_warmup(self, tokens: int, of: int) -> float:
        """The rate `tokens` after the warm-up of a stage with `of` tokens after it."""
        return self.start + (self.end - self.start) * (tokens / of)


class CosineRate(_Segment):
    """Half a cosine from start to end."""

    kind: Literal["cosine"]

    def after_warmup(self, tokens: int, of: int) -> float:
        """The rate `tokens` after the warm-up of a stage with `of` tokens after it."""
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * tokens / of))


class WsdRate(_Segment):
    """Warm-up, stable at start, then a straight decay to end over the last decay_tokens."""

    kind: Literal["wsd"]
    decay_tokens: int = Field(gt=0, description="tokens of the final decay")

    def after_warmup(self, tokens: int, of: int) -> float:
        """The rate `tokens` after the warm-up of a stage with `of` tokens after it."""
        into = tokens - (of - self.decay_tokens)
        if into <= 0:
            return self.start
        return self.start + (self.end - self.start) * (into / self.decay_tokens)

    def shortest_stage(self) -> int:
        """The fewest tokens of a stage that has room for the segment's parts."""
        return self.warmup_tokens + self.decay_tokens


LearningRate = Annotated[LinearRate | CosineRate | WsdRate, Field(discriminator="kind")]
