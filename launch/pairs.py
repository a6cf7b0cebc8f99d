"""The search for a node that cannot talk to the others: pairs around a ring, and their results.

On every node megahybrid/parallel/pair_check.py takes part in its pairs, one round after another.
Each node has two pairs, so a bad one is the node both of whose pairs fail.
"""

import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEAST_FOR_SPEED = 4  # nodes: of fewer pairs the median itself may be slow


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs that can talk at the same time, round by round: neighbours on a ring."""
    count = len(nodes)
    if count == 2:
        return [[(nodes[0], nodes[1])]]
    ring = [(nodes[n], nodes[(n + 1) % count]) for n in range(count)]
    # Of an odd ring the last pair shares a node with a pair of either round.
    last = [ring.pop()] if count % 2 else []
    return [part for part in (ring[0::2], ring[1::2], last) if part]


@dataclass(frozen=True)
class PairResult:
    """The result that one node gives of one pair. `gib_per_second` is None where it failed."""

    pair: tuple[str, str]
    gib_per_second: float | None
    error: str


def read_answers(folder: Path) -> list[PairResult]:
    """Return the results of all nodes that answered."""
    found = []
    for path in sorted(folder.glob("node-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for one in json.loads(path.read_text()):
                first, second = one["pair"]
                found.append(PairResult((first, second), one["gib_per_second"], one["error"]))
    return found


@dataclass(frozen=True)
class PairVerdict:
    """The verdict on all pairs.

    `bad`: node and reason. `summary`: a line for the batch log. `no_pair_error`: an error, where no
    pair worked at all and the nodes are hardly to blame for it.
    """

    bad: dict[str, str]
    summary: str
    no_pair_error: str | None = None


def find_bad_nodes(
    nodes: Sequence[str], answers: Sequence[PairResult], ratio: float
) -> PairVerdict:
    """Return the bad nodes: none of their pairs worked, or all of them were slow.

    Slow is `ratio` times slower than the median. Of two that fail with each other alone, the later
    one is bad.
    """
    pairs = [pair for part in rounds(nodes) for pair in part]
    speeds: dict[tuple[str, str], float] = {}
    errors: dict[tuple[str, str], str] = {}
    for pair in pairs:
        said = [answer for answer in answers if answer.pair == pair]
        worked = [a.gib_per_second for a in said if a.gib_per_second is not None]
        if len(worked) == 2:
            speeds[pair] = min(worked)
        else:
            errors[pair] = next((a.error for a in said if a.error), "no answer")
    alive = {node for pair in speeds for node in pair}
    bad: dict[str, str] = {}
    # A peer that works with somebody says which of the two it is; what that explains is no news.
    for (first, second), error in errors.items():
        if (first in alive) != (second in alive):
            node, other = (second, first) if first in alive else (first, second)
            bad.setdefault(node, f"does not reach {other} ({error})")
    for (first, second), error in errors.items():
        if first in bad or second in bad:
            continue
        doubt = "" if first in alive else ", or that one is at fault"
        bad[second] = f"does not reach {first}{doubt} ({error})"
        if first not in alive:
            bad[first] = f"does not reach {second}{doubt} ({error})"
    if len(nodes) >= LEAST_FOR_SPEED and speeds:
        usual = statistics.median(speeds.values())
        for node in nodes:
            own = [speed for pair, speed in speeds.items() if node in pair]
            if len(own) == 2 and max(own) * ratio < usual:
                bad[node] = f"all-reduce at {max(own):.3g} GiB/s ({usual:.3g} between others)"
    summary = f"pairs: {len(speeds)} of {len(pairs)} reach each other"
    if speeds:
        summary += f", at {min(speeds.values()):.3g} to {max(speeds.values()):.3g} GiB/s"
    common = next(iter(errors.values()), "")
    no_node = not speeds and (len(nodes) > 2 or "ModuleNotFoundError" in common)
    return PairVerdict(bad, summary, common if no_node else None)
