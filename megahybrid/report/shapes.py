"""The shapes of what a run's `evaluations` hold, as far as the report reads them."""

from typing import Annotated, Any, Literal

from megahybrid.config.shape import (
    AT_LEAST_ONE,
    DEEPEST,
    Count,
    Digits,
    Finite,
    NotRequired,
    Positive,
    Share,
    TypedDict,
    checker,
    too_deep,
)
from megahybrid.printable import printable

Number = float | None  # None, NaN and infinities are gaps
Segment = Literal["begin", "needle", "context", "end", "learned_sink"]


class NeedleRow(TypedDict):
    length: Positive
    depth: Share
    exact: float
    trials: NotRequired[Positive]
    exact_low: NotRequired[float]
    exact_high: NotRequired[float]
    token_accuracy: NotRequired[float]
    log_likelihood_per_token: NotRequired[float]


class RulerRow(TypedDict):
    task: str
    length: Positive
    score: float
    standard_error: Number
    trials: NotRequired[Count]


class PuzzleRow(TypedDict):
    length: Positive
    token_accuracy: float


class NeedleTask(TypedDict):
    variant: str
    haystack: str
    trials: Positive
    rows: Annotated[list[NeedleRow], AT_LEAST_ONE]
    by_length: NotRequired[list[PuzzleRow]]


class RulerTask(TypedDict):
    trials: NotRequired[Count]
    rows: Annotated[list[RulerRow], AT_LEAST_ONE]


class PuzzleTask(TypedDict):
    trials: Count
    by_length: Annotated[list[PuzzleRow], AT_LEAST_ONE]


class Task(TypedDict):
    kind: str


class Suite(TypedDict):
    trained_length: NotRequired[Positive | None]
    tokens: NotRequired[Count]
    tasks: dict[str, Task]


class Score(TypedDict):
    loss: Number
    perplexity: Number
    tokens: Count


class Reach(TypedDict):
    trained_length: Positive
    rows: dict[Digits, dict[str, Score]]
    sliding: dict[str, Score]


class Harness(TypedDict):
    results: dict[str, dict[str, Any]]


class Mass(TypedDict):
    begin: float
    needle: float
    context: float
    end: float
    learned_sink: NotRequired[float]


class Head(TypedDict):
    head: Count
    entropy_bits: float
    distance: float
    sink: float
    retrieval: float
    near_share: NotRequired[Share]


class HeadSummary(TypedDict):
    """The figures of all heads together, of a kind of layer and of a layer."""

    mass: Mass
    entropy_nats: float
    entropy_bits: float
    max_logit: float
    distance: float
    sink: float
    retrieval: float
    near_share: NotRequired[Share]


class Mean(HeadSummary):
    by_position: list[Number]
    logit_by_lag: list[Number]
    near_by_lag: NotRequired[list[Number]]


class Layer(HeadSummary):
    layer: Count
    kind: str
    heads: Annotated[list[Head], AT_LEAST_ONE]


class RetrievalHead(TypedDict):
    layer: Count
    head: Count


class Statistics(TypedDict):
    segments: list[Segment]
    all: Mean
    by_kind: dict[str, Mean]
    layers: Annotated[list[Layer], AT_LEAST_ONE]
    retrieval_threshold: Finite
    retrieval_heads: list[RetrievalHead]
    position_edges: Annotated[list[Count], AT_LEAST_ONE]
    lag_edges: Annotated[list[Count], AT_LEAST_ONE]


class Analysis(TypedDict):
    task: str
    length: Positive
    depth: NotRequired[Share]
    trials: Count
    exact: float
    attention: Statistics


class Attention(TypedDict):
    trained_length: NotRequired[Positive]
    results: list[Analysis]


RESULTS: dict[str, Any] = {
    "suite": Suite, "loss": Reach, "lm_eval": Harness, "attention": Attention,
}  # fmt: skip


def wrong_result(kind: str, result: Any) -> str | None:
    """Return what is wrong with a file of `evaluations`, in words; None where nothing is."""
    if too_deep(result):
        return f"lists within one another, more than {DEEPEST} deep"
    wrong = checker(RESULTS[kind])(result)
    if wrong is not None:
        return wrong
    if kind == "suite":
        return _wrong_task(result["tasks"])
    if kind == "attention":
        found = (_disagreement(one["attention"]) for one in result["results"])
        return next((wrong for wrong in found if wrong), None)
    return None


def _wrong_task(tasks: dict[str, Any]) -> str | None:
    shapes = {"needle": NeedleTask, "ruler": RulerTask, "chat": RulerTask}
    for name, task in tasks.items():
        wrong = checker(shapes.get(task["kind"], PuzzleTask))(task)
        if wrong is not None:
            return f"tasks.{printable(name)}.{wrong}"
    return None


def _disagreement(figures: Any) -> str | None:
    """Return which parts do not fit together, which no shape tells; None where all do."""
    layers = figures["layers"]
    if list(dict.fromkeys(layer["kind"] for layer in layers)) != list(figures["by_kind"]):
        return "by_kind: other kinds than the layers have"
    if len({len(layer["heads"]) for layer in layers}) > 1:
        return "layers: not all have as many heads"
    if any(head["layer"] >= len(layers) for head in figures["retrieval_heads"]):
        return "retrieval_heads: a layer that is not there"
    for layer in layers:
        if any(("near_share" in layer) != ("near_share" in head) for head in layer["heads"]):
            return "layers: a near_share that not all heads of a layer have"
    lags = len(figures["lag_edges"]) - 1
    if any(len(p.get("near_by_lag", ())) not in (0, lags) for p in figures["by_kind"].values()):
        return "by_kind: not one near_by_lag between two of lag_edges"
    for name in ("position", "lag"):
        edges = figures[f"{name}_edges"]
        field = "by_position" if name == "position" else "logit_by_lag"
        if edges != sorted(set(edges)):
            return f"{name}_edges: they do not rise"
        if any(len(part[field]) != len(edges) - 1 for part in figures["by_kind"].values()):
            return f"by_kind: not one value between two of {name}_edges"
    return None
