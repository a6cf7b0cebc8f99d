"""`BatchLoader`: the steps of a run, planned by arithmetic and read ahead on a thread."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from megahybrid.data.batches import Batch, Documents, make_batch, rank_rows
from megahybrid.data.mixture import Mixture, RowPlan, State, cursor_crc
from megahybrid.data.order import Span
from megahybrid.errors import DataError

LOG = logging.getLogger(__name__)
MOST_REPLACED = 3
CLOSE_SECONDS = 2.0  # a small read takes less


@dataclass(frozen=True)
class StepShape:
    """One step over all replicas: `rows` rows of `length` tokens. Each group of `context` of them
    reads the same rows, `micro_rows` at a time."""

    length: int
    rows: int
    micro_rows: int
    context: int = 1


@dataclass(frozen=True)
class StepData:
    """The data of one step for one rank.

    plans: every row of the step, all ranks. state: the mixture's state AFTER this step, to be saved
    with it. source_tokens, epochs: served up to and including this step; source_targets: those
    that counted. exhausted: epochs of the sources that ended one in this step. wait_seconds: how
    long the step was waited for.
    """

    shape: StepShape
    micro_batches: tuple[Batch, ...]
    plans: tuple[RowPlan, ...]
    state: State
    source_tokens: dict[str, int]
    epochs: dict[str, float]
    cursor_crc: int
    exhausted: dict[str, float] = field(default_factory=dict)
    wait_seconds: float = 0.0
    source_targets: dict[str, int] = field(default_factory=dict)


def read_step(
    mixture: Mixture,
    state: State,
    shape: StepShape,
    *,
    rank: int = 0,
    world_size: int = 1,
    documents: Documents = "masked",
) -> StepData:
    """Plans one step for all ranks and reads this rank's rows of it: those of its group."""
    group, groups = rank // shape.context, world_size // shape.context
    parts = rank_rows(shape.rows, group, groups, shape.micro_rows)
    plans, after = mixture.plan_step(state, shape.length, shape.rows)
    _check_unchanged(mixture, [plans[row] for part in parts for row in part])
    return StepData(
        shape=shape,
        micro_batches=tuple(
            make_batch(mixture.datasets, [plans[row] for row in part], shape.length, documents)
            for part in parts
        ),
        plans=tuple(plans),
        state=after,
        source_tokens=mixture.source_tokens(after),
        epochs=mixture.epochs(after),
        exhausted=mixture.exhaustions(state, after),
        cursor_crc=cursor_crc(after),
        source_targets=mixture.source_targets(after),
    )


def _check_unchanged(mixture: Mixture, plans: Iterable[RowPlan]) -> None:
    spans: dict[str, list[Span]] = {}
    for plan in plans:
        spans.setdefault(plan.source, []).extend(plan.spans)
    for name, found in spans.items():
        mixture.datasets[name].check_unchanged(found)


class BatchLoader:
    """Iterates over `shapes` from `state`, `prefetch` steps ahead on a background thread.

    What is read ahead is nobody's progress: each StepData carries the state after itself. An error
    while reading is raised at the step it belongs to. A thread that ends without a word is replaced
    by one that goes on after the last step delivered: the rows stay the same. A step that is waited
    for longer than `stall_seconds` is told once to the log, with what is being read. `close` (or
    leaving the context) ends the thread. prefetch=0 reads in the caller's thread; the rows are the
    same.
    """

    def __init__(
        self,
        mixture: Mixture,
        state: State,
        shapes: Iterable[StepShape],
        *,
        rank: int = 0,
        world_size: int = 1,
        documents: Documents = "masked",
        prefetch: int = 2,
        stall_seconds: float = 60.0,
    ) -> None:
        self._mixture, self._state, self._shapes = mixture, state, iter(shapes)
        self._rank, self._world_size, self._documents = rank, world_size, documents
        self._stall_seconds = stall_seconds
        self._stop = threading.Event()
        self._prefetch = prefetch
        self._ahead: deque[StepShape] = deque()  # shapes taken whose steps are not delivered
        self._replaced = 0
        self._held: list[StepData | BaseException | None] = []  # taken from the queue by `ready`
        self._waits_since: float | None = None
        self._warned = False
        self._thread: threading.Thread | None = None
        if prefetch:
            self._start()

    def _start(self) -> None:
        self._queue: queue.Queue[StepData | BaseException | None] = queue.Queue(self._prefetch)
        self._thread = threading.Thread(
            target=self._fill, args=(self._queue,), name="read-ahead", daemon=True
        )
        self._thread.start()

    def _read(self, state: State, shape: StepShape) -> StepData:
        return read_step(
            self._mixture,
            state,
            shape,
            rank=self._rank,
            world_size=self._world_size,
            documents=self._documents,
        )

    def _fill(self, steps: "queue.Queue[StepData | BaseException | None]") -> None:
        state = self._state
        try:
            for shape in chain(list(self._ahead), self._new_shapes()):
                step = self._read(state, shape)
                state = step.state
                if not self._put(steps, step):
                    return
            self._put(steps, None)
        except SystemExit:
            return  # ended from outside; whoever waits for the step replaces the thread
        except Exception as error:
            self._put(steps, error)

    def _new_shapes(self) -> Iterator[StepShape]:
        for shape in self._shapes:
            self._ahead.append(shape)
            yield shape

    def _put(
        self,
        steps: "queue.Queue[StepData | BaseException | None]",
        item: StepData | BaseException | None,
    ) -> bool:
        while not self._stop.is_set():
            try:
                steps.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        began = self._waits_since or time.perf_counter()
        item = self._next()
        self._waits_since, self._warned = None, False
        if isinstance(item, StepData):
            self._state = item.state
            self._ahead.popleft()
            return replace(item, wait_seconds=time.perf_counter() - began)
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def _next(self) -> StepData | BaseException | None:
        if self._stop.is_set():
            return None
        if self._thread is None:
            shape = next(self._new_shapes(), None)
            return None if shape is None else self._read(self._state, shape)
        while not self.ready(min(1.0, self._stall_seconds)):
            pass
        return self._held.pop()

    def ready(self, seconds: float) -> bool:
        """Wait at most `seconds` and return whether the next step, an error or the end is there.

        What is not read ahead counts as there.
        """
        if self._thread is None or self._held or self._stop.is_set():
            return True
        self._waits_since = self._waits_since or time.perf_counter()
        try:
            self._held.append(self._queue.get(timeout=seconds))
            return True
        except queue.Empty:
            pass
        if not self._thread.is_alive() and self._queue.empty():
            self._replace()
        if not self._warned and time.perf_counter() - self._waits_since >= self._stall_seconds:
            self._warned = True
            self._warn_of_stall()
        return False

    def _warn_of_stall(self) -> None:
        assert self._waits_since is not None
        shape = self._ahead[0] if self._ahead else None
        sources = ", ".join(
            f"{name} ({self._mixture.datasets[name].path})" for name in self._mixture.weights
        )
        LOG.warning(
            "data: the next step (%s) has been waited for %.0f s. Slow or stalled storage under "
            "one of %s?",
            f"{shape.rows} rows of {shape.length}" if shape else "its shape is not known",
            time.perf_counter() - self._waits_since,
            sources,
        )

    def _replace(self) -> None:
        """Start another thread after what was delivered.

        A thread killed from outside leaves nothing behind.
        """
        self._replaced += 1
        if self._replaced > MOST_REPLACED:
            raise DataError(
                f"data: the reading thread was killed {self._replaced} times. Look for what kills "
                "it (the system's log), then resume."
            )
        LOG.warning("data: the reading thread was killed; another one goes on where it was")
        self._start()

    def close(self) -> None:
        """End the reading thread; what it had read ahead is dropped.

        One that waits for a disk is left behind: it ends with the process.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
