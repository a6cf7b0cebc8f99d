"""`Mixture`: the source of each row, and where in it, as a function of a small state."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megahybrid.data.counted import counted_targets
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.length_plans import LengthPlansOrder, Plans, open_plans
from megahybrid.data.order import SourceOrder, Span, checksum
from megahybrid.data.packing import PackedOrder
from megahybrid.data.read_files import Fingerprint, refuse_other_files, same_files
from megahybrid.errors import DataError, ExhaustedError

if TYPE_CHECKING:
    from megahybrid.config import RunConfig

State = dict[str, Any]
Order = SourceOrder | PackedOrder | LengthPlansOrder
Exhausted = Literal["repeat", "stop", "renormalise"]
STATE_VERSION = 1


class RowPlan(NamedTuple):
    """The spans of a source that the input tokens of one row come from.

    Between spans there is a join.
    """

    source: str
    spans: tuple[Span, ...]


class Mixture:
    """Rows from several sources, weighted by tokens.

    Over every prefix since the last reweighting each source's tokens differ from weight * tokens by
    less than the longest row served since then (Tijdeman's earliest-deadline rule). Everything is
    a function of (seed, datasets, block_tokens, lanes) and of the state, a JSON value:
    {version, seed, block_tokens, lanes, weights {name: w}, since {name: tokens since the last
    reweighting}, longest: longest row since then, sources {name: {cursor, tokens, fingerprint}}}.
    A source with `plans` has cursor and fingerprint by length; one with a mask has `targets`, those
    that counted, where it had them from its first row on.
    Sources that were dropped stay in it, so that they continue when they are named again.

    exhausted: what happens when a source has been served once. repeat: it begins again in another
    order. stop: ExhaustedError. renormalise: the others share its part from the next row on (this
    counts as a reweighting; `gone` in the state names it until the weights change).
    """

    def __init__(
        self,
        datasets: Mapping[str, TokenDataset],
        weights: Mapping[str, float],
        *,
        seed: int,
        block_tokens: int,
        lanes: int,
        exhausted: Exhausted = "repeat",
        plans: Mapping[str, Plans] | None = None,
    ) -> None:
        self.datasets, self.plans = dict(datasets), dict(plans or {})
        self.exhausted = exhausted
        self.weights = self._checked(weights)
        self.seed, self.block_tokens, self.lanes = seed, block_tokens, lanes
        self._orders: dict[str, Order] = {}

    def _checked(self, weights: Mapping[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in self.datasets:
                raise DataError(
                    f"weights names '{name}', which data.sources does not define "
                    f"({', '.join(sorted(self.datasets))}). Define it or correct the name."
                )
            if not 0 <= weight < float("inf"):
                raise DataError(f"weights.{name}={weight} is not 0 or more. Use a positive weight.")
        if not any(weights.values()):
            raise DataError("weights gives no source more than 0. Give one a positive weight.")
        return {name: float(weights[name]) for name in sorted(weights) if weights[name] > 0}

    def order(self, name: str) -> Order:
        """The order of one source."""
        if name not in self._orders:
            dataset = self.datasets[name]
            if name in self.plans:
                self._orders[name] = LengthPlansOrder(
                    self.plans[name], dataset.tokens, seed=self.seed, name=name
                )
            elif dataset.plan is not None:
                self._orders[name] = PackedOrder(
                    dataset.plan, dataset.tokens, seed=self.seed, name=name
                )
            else:
                self._orders[name] = SourceOrder(
                    dataset.tokens,
                    seed=self.seed,
                    name=name,
                    block_tokens=self.block_tokens,
                    lanes=self.lanes,
                )
        return self._orders[name]

    def fingerprint(self, name: str) -> Fingerprint:
        """Of the files of a source: its dataset's or plan's, or by length those of its plans."""
        order = self.order(name) if name in self.plans else None
        if isinstance(order, LengthPlansOrder):
            return order.fingerprints
        return self.datasets[name].fingerprint

    def start(self) -> State:
        """The state before the first row."""
        empty: State = {
            "version": STATE_VERSION,
            "seed": self.seed,
            "block_tokens": self.block_tokens,
            "lanes": self.lanes,
            "exhausted": self.exhausted,
            "weights": {},
            "since": {},
            "longest": 0,
            "sources": {},
        }
        return self.reweight(empty, self.weights)

    def reweight(self, state: State, weights: Mapping[str, float]) -> State:
        """The state from which rows follow new weights; every cursor goes on where it is.

        The same weights as before change nothing, so a stage boundary may always call it.
        """
        weights = self._checked(weights)
        if weights == state["weights"]:
            return state
        sources = dict(state["sources"])
        for name in weights:
            if name not in sources:
                sources[name] = {
                    "cursor": self.order(name).start(),
                    "tokens": 0,
                    "fingerprint": {} if name in self.plans else self.datasets[name].fingerprint,
                } | ({"targets": 0} if self.datasets[name].masked else {})
        since = dict.fromkeys(weights, 0)
        fresh = {"weights": weights, "since": since, "longest": 0, "gone": []}
        return state | fresh | {"sources": sources}

    def restore(self, state: Any) -> State:
        """A saved state, if it fits this mixture's datasets and order; else DataError.

        The weights in it stay those of the stage that wrote it until `reweight` is called.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise DataError("the saved data state is not one of this version. Start a new run.")
        state = {"exhausted": "repeat"} | state
        for name in ("seed", "block_tokens", "lanes", "exhausted"):
            found, expected = state.get(name), getattr(self, name)
            if found != expected:
                shown = "seed" if name == "seed" else f"data.{name}"
                raise DataError(
                    f"{shown}={expected} is not what the run's order was made with ({found}). "
                    f"Set {shown}={found}, or start a new run."
                )
        sources = {}
        for name, source in state["sources"].items():
            if name not in self.datasets:
                if name in state["weights"]:
                    raise DataError(
                        f"data.sources lacks '{name}', which the run is reading. Define it again."
                    )
                sources[name] = source
                continue
            found, path = self.fingerprint(name), self.datasets[name].path
            refuse_other_files(name, path, source["fingerprint"], found)
            sources[name] = source | {"cursor": self.order(name).check(source["cursor"])}
        return state | {"sources": sources}

    def carried(self, state: State) -> State:
        """The state to go on with from one that another plan saved (`carried_state`)."""
        numbers = {"seed": self.seed, "block_tokens": self.block_tokens, "lanes": self.lanes}
        files = {name: self.fingerprint(name) for name in self.datasets}
        kept = carried_state(state, numbers, files)
        return self.restore(kept) if kept else self.start()

    def plan_step(self, state: State, length: int, rows: int) -> tuple[list[RowPlan], State]:
        """The next `rows` rows of `length` tokens and the state after them; `state` is unchanged.

        Raises DataError when a row is longer than a block, and ExhaustedError when a source is
        exhausted that may not repeat.
        """
        if length > self.block_tokens:
            raise DataError(
                f"data.block_tokens={self.block_tokens} is smaller than the stage's length "
                f"({length}). Use at least the longest length of the plan."
            )
        plans: list[RowPlan] = []
        while len(plans) < rows:
            weights = self._open_weights(state)
            chosen, since, longest = choose_sources(state, weights, length, rows - len(plans))
            empty = None
            if self.exhausted != "repeat":
                count, empty = self._rows_before_exhaustion(state, chosen, length)
                if empty:
                    chosen, since, longest = choose_sources(state, weights, length, count)
            part, sources = self._take(state["sources"], chosen, length)
            plans += part
            state = state | {"since": since, "longest": longest, "sources": sources}
            if empty:
                state = self._without(state, empty, length)
        return plans, state

    def _open_weights(self, state: State) -> dict[str, float]:
        """The weights of the sources that are not exhausted."""
        gone = state.get("gone", ())
        return {name: weight for name, weight in state["weights"].items() if name not in gone}

    def _take(
        self, before: Mapping[str, Any], chosen: Sequence[str], length: int
    ) -> tuple[list[RowPlan], dict[str, Any]]:
        """Rows from the sources chosen, and the sources after them."""
        sources = dict(before)
        taken: dict[str, list[tuple[Span, ...]]] = {}
        for name in dict.fromkeys(chosen):
            count = chosen.count(name)
            source, order = sources[name], self.order(name)
            take = order.take if self.exhausted == "repeat" else order.take_once
            taken[name], cursor = take(source["cursor"], length, count)
            after: dict[str, Any] = {"cursor": cursor, "tokens": source["tokens"] + count * length}
            if isinstance(order, LengthPlansOrder):
                after["fingerprint"] = order.read_from(after["cursor"])
            if "targets" in source:
                counted = counted_targets(self.datasets[name], taken[name], length)
                after["targets"] = source["targets"] + counted
            taken[name].reverse()
            sources[name] = source | after
        return [RowPlan(name, taken[name].pop()) for name in chosen], sources

    def _rows_before_exhaustion(
        self, state: State, chosen: Sequence[str], length: int
    ) -> tuple[int, str | None]:
        """Return how many of the chosen rows there are, and the source that lacks the next one."""
        sources = state["sources"]
        left = {
            name: self.order(name).rows_left(
                sources[name]["cursor"], sources[name]["tokens"], length
            )
            for name in set(chosen)
        }
        for index, name in enumerate(chosen):
            if left[name] == 0:
                return index, name
            left[name] -= 1
        return len(chosen), None

    def _without(self, state: State, name: str, length: int) -> State:
        """The state in which the others share what `name` can no longer give."""
        gone = sorted([*state.get("gone", ()), name])
        served = self.order(name).served_in_words(state["sources"][name]["tokens"], length)
        if self.exhausted == "stop":
            raise ExhaustedError(
                f"data.sources.{name} is exhausted ({served}; data.exhausted=stop). Add data, "
                "change the stage's weights, or allow data.exhausted=repeat in a new run."
            )
        if set(gone) >= set(state["weights"]):
            raise ExhaustedError(
                f"every source of the stage is exhausted (last data.sources.{name}, {served}; "
                "data.exhausted=renormalise). Add data or shorten the stage."
            )
        since = {other: 0 for other in state["weights"] if other not in gone}
        return state | {"gone": gone, "since": since, "longest": 0}

    def exhaustions(self, before: State, after: State) -> dict[str, float]:
        """Sources that ended an epoch, or were dropped, between two states; epochs served."""
        epochs_before, epochs_after = self.epochs(before), self.epochs(after)
        dropped = set(after.get("gone", ())) - set(before.get("gone", ()))
        return {
            name: epochs
            for name, epochs in epochs_after.items()
            if name.partition(".")[0] in dropped or int(epochs) > int(epochs_before.get(name, 0))
        }

    def source_tokens(self, state: State) -> dict[str, int]:
        """Tokens served of each source since the run began."""
        return {name: source["tokens"] for name, source in state["sources"].items()}

    def source_targets(self, state: State) -> dict[str, int]:
        """Targets that counted since the run began, of each source whose mask was counted."""
        sources = state["sources"].items()
        return {name: source["targets"] for name, source in sources if "targets" in source}

    def epochs(self, state: State) -> dict[str, float]:
        """Return how many times over each source has been served; where it has plans by length,
        each plan of which a row was taken, as `NAME.plans.LENGTH`."""
        found: dict[str, float] = {}
        for name, source in state["sources"].items():
            if name in self.datasets:
                found |= self.order(name).epochs(source["cursor"], source["tokens"])
        return found


def cursor_crc(state: State) -> int:
    """CRC-32 of every source's cursor: equal exactly when two runs stand at the same place."""
    return checksum({name: source["cursor"] for name, source in state["sources"].items()})


def choose_sources(
    state: State, weights: Mapping[str, float], length: int, rows: int
) -> tuple[Sequence[str], dict[str, int], int]:
    """The source of each of `rows` rows; tokens since the reweighting, and the longest row, after.

    Tijdeman (1980): with k sources and c = 1 - 1/(2k - 2), among those that may take a row without
    getting c rows ahead, the one that would first be c rows behind. In whole numbers, so exact.
    """
    names = list(weights)
    since = dict(state["since"])
    longest = max(state["longest"], length)
    if len(names) == 1:
        since[names[0]] += length * rows
        return names * rows, since, longest
    shares = _whole_shares(weights)
    total_share = sum(shares)
    had = [since[name] for name in names]
    total = sum(had)
    twice = 2 * len(names) - 2
    slack = (twice - 1) * longest  # c * longest, times `twice`
    ahead = total_share * (twice * length - slack)
    chosen = []
    for _ in range(rows):
        total += length
        best, best_deadline = -1, 0
        for index, share in enumerate(shares):
            if twice * (share * total - total_share * had[index]) < ahead:
                continue
            deadline = twice * had[index] + slack
            if best < 0 or deadline * shares[best] < best_deadline * share:
                best, best_deadline = index, deadline
        if best < 0:  # rows of several lengths can leave none: then the one furthest behind
            best = max(range(len(shares)), key=lambda i: shares[i] * total - total_share * had[i])
        had[best] += length
        chosen.append(names[best])
    return chosen, dict(zip(names, had, strict=True)), longest


def _whole_shares(weights: Mapping[str, float]) -> list[int]:
    """Whole numbers in exactly the ratio of the (binary) weights."""
    fractions = [Fraction(weight) for weight in weights.values()]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def open_mixture(run: "RunConfig") -> Mixture:
    """The sources of a run, weighted as its first stage weights them."""
    datasets: dict[str, TokenDataset] = {}
    plans: dict[str, Plans] = {}
    for name, source in run.data.sources.items():
        if source.path is None:
            opened = open_plans(name, source.plans, run.model.vocab_size)
            datasets[name], plans[name] = opened
        else:
            datasets[name] = TokenDataset(source.path, vocab_size=run.model.vocab_size)
    return Mixture(
        datasets,
        run.stages[0].weights,
        seed=run.seed,
        block_tokens=run.data.block_tokens,
        lanes=run.data.lanes,
        exhausted=run.data.exhausted,
        plans=plans,
    )


def carried_state(
    state: State, numbers: Mapping[str, int], files: Mapping[str, Fingerprint]
) -> State:
    """Return the part of a mixture's `state` that another plan can go on from.

    All of it where the order is made from the same `numbers` (seed, block_tokens, lanes), source by
    source, and of one with plans length by length, where the fingerprints in `files` are the same;
    the rest begins anew. {} where nothing is left.
    """
    if not state or any(state[name] != value for name, value in numbers.items()):
        return {}
    sources = {}
    for name, source in state["sources"].items():
        kept = same_files(source["fingerprint"], files.get(name))
        if isinstance(kept, dict):
            cursors = {length: source["cursor"][length] for length in kept}
            sources[name] = source | {"cursor": cursors, "fingerprint": kept}
        elif kept is not None:
            sources[name] = source
    if sources == state["sources"]:
        return state
    return state | {"sources": sources, "weights": {}, "since": {}}
