"""The kernels that a stage computes with, as one value: training, a checkpoint and the ledger hold
the same."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megahybrid.config.attention import AttentionScheme


@dataclass(frozen=True, kw_only=True)
class ChosenKernels:
    """Names of kernels, alike on every rank: ranks with different ones would not be replicas."""

    device: str  # the kind of device that they were chosen on: cpu or cuda
    full: str  # of layers that see all earlier keys
    windowed: str
    blocks: str = "plain"  # or compiled
    products: str | None = None  # the routine of matrix products; a CPU alone has a choice
    length: int | None = None  # the tokens of a row at which they were measured
    exchange: str | None = None  # what context ranks send one another, where they share rows

    def of(self, scheme: AttentionScheme) -> str:
        """Return the attention kernel of a layer with this scheme; of one with two views both,
        as `kernels_of_views` reads them."""
        names = [self.full if v.reach is None else self.windowed for v in scheme.views()]
        return "+".join(dict.fromkeys(names))

    @property
    def compiler(self) -> str | None:
        """The backend of torch.compile that blocks are compiled by."""
        return "inductor" if self.blocks == "compiled" else None

    def to_json(self) -> dict[str, str]:
        """Return what manifests and ledgers hold: text alone, and only what was chosen."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) for name, value in held.items() if value is not None}

    @classmethod
    def from_json(cls, held: Mapping[str, Any] | None) -> "ChosenKernels | None":
        """Return what `to_json` or a manifest of version 0.1.0 says; None where it lacks a name
        that every run chooses. Names that only later versions know are left out."""
        known = {name: value for name, value in (held or {}).items() if name in _NAMES}
        if not {"device", "full", "windowed"} <= known.keys():
            return None
        length = known.pop("length", None)
        measured = int(length) if length is not None and str(length).isdecimal() else None
        return cls(**known, length=measured)


def kernels_of_views(kernel: str) -> tuple[str, str]:
    """Return the kernels of the near and the far view that `blocked+sdpa` names, or the one of both
    that a single name is."""
    near, _, far = kernel.partition("+")
    return near, far or near


_NAMES = frozenset(field.name for field in fields(ChosenKernels))
