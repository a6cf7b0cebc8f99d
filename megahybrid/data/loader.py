"""`BatchLoader`: the steps of a run, planned by arithmetic and read ahead on a thread."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType

from megahybrid.data.batches import Batch, Documents, make_batch, rank_rows
from megahybrid.data.mixture import Mixture, RowPlan, State, cursor_crc


@dataclass(frozen=True)
class StepShape:
    """One step over all data ranks: `rows` rows of `length` tokens; `micro_rows` is per rank."""

    length: int
    rows: int
    micro_rows: int


@dataclass(frozen=True)
class StepData:
    """What one rank needs for one step.

    plans: every row of the step, all ranks. state: the mixture's state AFTER this step, to be saved
    with it. source_tokens, epochs: served up to and including this step. wait_seconds: how long the
    step was waited for.
    """

    shape: StepShape
    micro_batches: tuple[Batch, ...]
    plans: tuple[RowPlan, ...]
    state: State
    source_tokens: dict[str, int]
    epochs: dict[str, float]
    cursor_crc: int
    wait_seconds: float = 0.0


def read_step(
    mixture: Mixture,
    state: State,
    shape: StepShape,
    *,
    rank: int = 0,
    world_size: int = 1,
    documents: Documents = "masked",
) -> StepData:
    """Plans one step for all ranks and reads this rank's rows of it."""
    parts = rank_rows(shape.rows, rank, world_size, shape.micro_rows)
    plans, after = mixture.plan_step(state, shape.length, shape.rows)
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
        cursor_crc=cursor_crc(after),
    )


class BatchLoader:
    """Iterates over `shapes` from `state`, `prefetch` steps ahead on a background thread.

    What is read ahead is nobody's progress: each StepData carries the state after itself. An error
    while reading is raised at the step it belongs to. `close` (or leaving the context) ends the
    thread. prefetch=0 reads in the caller's thread; the rows are the same.
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
    ) -> None:
        self._mixture, self._state, self._shapes = mixture, state, iter(shapes)
        self._rank, self._world_size, self._documents = rank, world_size, documents
        self._stop = threading.Event()
        self._steps = self._read()
        self._queue: queue.Queue[StepData | BaseException | None] = queue.Queue(max(1, prefetch))
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = threading.Thread(target=self._fill, name="read-ahead", daemon=True)
            self._thread.start()

    def _read(self) -> Iterator[StepData]:
        state = self._state
        for shape in self._shapes:
            step = read_step(
                self._mixture,
                state,
                shape,
                rank=self._rank,
                world_size=self._world_size,
                documents=self._documents,
            )
            state = step.state
            yield step

    def _fill(self) -> None:
        try:
            for step in self._steps:
                if not self._put(step):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepData | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        began = time.perf_counter()
        item: StepData | BaseException | None
        if self._thread is None:
            item = next(self._steps, None)
        elif self._stop.is_set():
            item = None
        else:
            item = self._queue.get()
        if isinstance(item, StepData):
            return replace(item, wait_seconds=time.perf_counter() - began)
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the reading thread; what it had read ahead is dropped."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
