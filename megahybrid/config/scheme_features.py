"""What a scheme's parts go with: one table of pairs, with one another and with what a run does.

docs/architecture.md holds it (a test says how to write it there), and tests walk all of its pairs:
what is served is asked for, and what is not is refused in the line that the table gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NEAR = {"position": {"kind": "rope", "theta": 10000.0}, "window": 5}
# Fields of a scheme without a window, as an example of each part.
PARTS: Mapping[str, Mapping[str, Any]] = {
    "gate": {"gate": "head"},
    "sink": {"sink": True},
    "chunk": {"chunk": 7},
    "fuse": {"near": _NEAR, "fuse": {"gate": "token"}},
    "split": {"near": _NEAR, "split": {"near": 1, "of": 2}},
}


@dataclass(frozen=True)
class Beside:
    """What a part may stand beside. `asked` are fields of a run file as key=value, none where tests
    ask the code itself: a cache, an analysis."""

    name: str
    asked: tuple[str, ...] = ()


ANNEAL = Beside(
    "a window that anneals",
    ("stages.2.anneal={steps: 2, schemes: {global: {window: 256}}}",),
)
BESIDE = (
    Beside("context ranks", ("parallel.context=2",)),
    Beside("tensor ranks", ("parallel.tensor=2",)),
    Beside("ZeRO 3", ("parallel.zero_stage=3",)),
    Beside("joined documents", ("data.documents=joined",)),
    ANNEAL,
    Beside("parallel block", ("model.block=parallel",)),
    Beside("MLP in chunks", ("stages.0.recompute=chunked",)),
    Beside("offload", ("stages.0.recompute=offload", "parallel.offload=moments")),
    Beside("compiled layers", ("kernels.blocks=compiled",)),
    Beside("SDPA on a CPU", ("kernels.full=sdpa",)),
    Beside("cuDNN", ("device=cuda", "kernels.full=cudnn")),
    Beside("flex", ("device=cuda", "kernels.full=flex")),
    Beside("documents, packed"),
    Beside("KV cache"),
    Beside("attention analysis"),
    Beside("surgery of a plan"),
)

_VIEWS = "two views go without a chunk and without a sink"
_NEW_PARAMETERS = "it would add parameters"
# (a part, what it does not go with): why, and a part of the line that says so.
REFUSED: Mapping[tuple[str, str], tuple[str, str]] = {
    ("sink", "fuse"): (_VIEWS, "near does not go with sink: true"),
    ("sink", "split"): (_VIEWS, "near does not go with sink: true"),
    ("chunk", "fuse"): (_VIEWS, "near does not go with chunk=7"),
    ("chunk", "split"): (_VIEWS, "near does not go with chunk=7"),
    ("fuse", "split"): ("a head has both views or one", "near has fuse and split"),
    ("chunk", ANNEAL.name): ("a chunk is no window", "has no window to begin from (chunk=7"),
    ("sink", "cuDNN"): ("it gives no sums of its scores", "has no learned sinks"),
    ("sink", "flex"): ("it gives no sums of its scores", "has no learned sinks"),
    ("gate", "surgery of a plan"): (_NEW_PARAMETERS, "Surgery changes positions, windows and"),
    ("sink", "surgery of a plan"): (_NEW_PARAMETERS, "Surgery changes positions, windows and"),
    ("fuse", "surgery of a plan"): (
        "it would add parameters; `checkpoint fuse` does",
        "Surgery changes positions, windows and",
    ),
}


def refusal(part: str, other: str) -> tuple[str, str] | None:
    """Return why a part does not go with another or with what stands beside, and a part of the line
    that says so; None where it is served."""
    return REFUSED.get((part, other)) or REFUSED.get((other, part))


def table() -> str:
    """The table in Markdown."""
    lines = [f"| | {' | '.join(f'`{part}`' for part in PARTS)} |", "|---" * (len(PARTS) + 1) + "|"]
    for other in (*PARTS, *(beside.name for beside in BESIDE)):
        cells = []
        for part in PARTS:
            why = refusal(part, other)
            served = "" if part == other else "served"
            cells.append(served if why is None else f"**refused**: {why[0]}")
        name = f"`{other}`" if other in PARTS else other
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
