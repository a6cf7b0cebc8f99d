"""A kernel's record: its function, and what it can do."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.model.kernels.spec import AttentionSpec, Place

Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor]


class Measured(Enum):
    """The cases in which a kernel is measured for a kind of layer."""

    ALWAYS = "wherever it serves"
    FUSED = "wherever it serves, beside the other fused kernels"
    COMPILED = "where no fused kernel serves"
    LAST = "where nothing else serves"
    NEVER = "only where the run file names it"


class Halves(NamedTuple):
    """A kernel's forward and backward apart, with no autograd inside: for keys and values that are
    not kept in between but gathered again.

    `forward(q, k, v, spec)` returns the output and the tensors that its backward needs beside these
    and the output; `backward(grad_output, q, k, v, out, kept, spec)` returns the gradients of q, k
    and v. Shapes are those of `attend`.
    """

    forward: Callable[[Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...], AttentionSpec],
        tuple[Tensor, Tensor, Tensor],
    ]


def _anywhere(spec: AttentionSpec, place: Place) -> str | None:
    return None


def _no_halves(spec: AttentionSpec, place: Place) -> Halves | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    `serves` names the fields of an AttentionSpec that it computes with; it refuses all others by
    itself. `unavailable` says why it cannot run at a place, or None. `needs` names fields without
    which it is no kernel at all. `rank` orders the choice without a measurement, the lowest first;
    None: it is not chosen so. `unchosen` has the dtypes in which it runs only where it is named.
    `halves` gives its forward and backward apart, for what it serves, where it has them. `sums`
    gives two that keep the logarithm of each query's sum, [batch, heads, seq], and nothing else, in
    a tensor of their own as is the output: learned sinks are put around them, whether `serves`
    names these or not.
    """

    name: str
    attend: Attend
    serves: frozenset[str]
    unavailable: Callable[[AttentionSpec, Place], str | None] = _anywhere
    needs: frozenset[str] = frozenset()
    rank: Callable[[AttentionSpec], int] | None = None
    measured: Measured = Measured.NEVER
    unchosen: frozenset[torch.dtype] = frozenset()
    halves: Callable[[AttentionSpec, Place], Halves | None] = _no_halves
    sums: Callable[[AttentionSpec, Place], Halves | None] = _no_halves
    quadratic: bool = False  # holds all scores at once: for tests, never a way out of a refusal

    def refusal(self, spec: AttentionSpec, place: Place) -> str | None:
        """Return why this kernel cannot compute `spec` there, in words that follow its name; None
        if it can."""
        asked = spec.features()
        for name, words in asked.items():
            if name not in self.serves and name != "sinks":
                return f"has no {words}"
        if not self.needs <= asked.keys():
            return f"serves nothing without {' and '.join(sorted(self.needs))}"
        why_not = self.unavailable(spec, place)
        if why_not is not None or "sinks" not in asked.keys() - self.serves:
            return why_not
        return f"has no {asked['sinks']}" if self.sums(spec, place) is None else None
