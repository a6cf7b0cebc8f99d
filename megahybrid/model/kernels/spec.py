"""The request to a kernel beside queries, keys and values, and the place where it is to run."""

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from megahybrid.model.kernels.documents import Documents


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionSpec:
    """The keys that each query sees, and how scores are made: the one argument of a kernel after
    q, k and v.

    Every field but the scale is a feature: None where it is not asked for. A kernel lists those
    that it serves, so that a field added here is refused by all kernels until one of them has it.
    """

    scale: float  # multiplies q·k
    # Keys visible to a query, its own included; None: all earlier ones.
    window: int | None = field(default=None, metadata={"words": "window"})
    # Hides other documents of the row; None: a row is one document.
    documents: Documents | None = field(default=None, metadata={"words": "documents within a row"})
    # The whole rule, for keys in any order and number, in place of window and documents.
    visible: Bool[Tensor, "batch queries keys"] | None = field(
        default=None, metadata={"words": "keys given one by one"}
    )
    # Keys ahead of the first query's own: the queries are the last of the tokens that the keys, and
    # documents, are of. None: as many queries as keys.
    before: int | None = field(default=None, metadata={"words": "keys before the first query"})
    # Per query head, the score of a key that has no value.
    sinks: Tensor | None = field(default=None, metadata={"words": "learned sinks"})
    # Added to the scores.
    bias: Tensor | None = field(default=None, metadata={"words": "bias of the scores"})

    def features(self) -> dict[str, str]:
        """Return what is asked for beside the scale, by field, in the words of a message."""
        found = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and "words" in each.metadata:
                number = f" ({each.name}={value})" if isinstance(value, int) else ""
                found[each.name] = each.metadata["words"] + number
        return found

    def within(self, length: int) -> "AttentionSpec":
        """Return the same for rows of `length` keys, with no more than they ask: a window as long
        as they are hides nothing, no keys before the first query are none, and then every kernel
        without these serves."""
        window = self.window if self.window is not None and self.window < length else None
        before = self.before or None
        if (window, before) == (self.window, self.before):
            return self
        return replace(self, window=window, before=before)


class Place(NamedTuple):
    """The device and values that a kernel is to run on, and whether with a backward."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    gradients: bool = True
