"""What goes through process groups, counted and timed at their own methods.

torch.distributed's functions end there, whoever called them and by whatever name, so nothing that
computes a number of bytes is asked for it.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# Each by its names in torch 2.11 and 2.13, and where its output and its input stand.
_METHODS = {
    "all_to_all": ("alltoall_base", "all_to_all_single"),
    "all_gather": ("_allgather_base", "all_gather_single"),
    "reduce_scatter": ("_reduce_scatter_base", "reduce_scatter_single"),
}
# What leaves the same on every rank: how often each byte comes from others at least.
_ALIKE = {
    "allreduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce": lambda ranks: 1.0,
    "broadcast": lambda ranks: 1.0,
}


@dataclass
class GroupCalls:
    """Bytes that this rank received from others, by (group, collective), and the seconds that the
    thread which called spent in calls and in waiting for them: by the clock and of its CPU."""

    received: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    alike: float = 0.0  # bytes of all groups, of sums and copies that every rank is given
    wall: float = 0.0
    cpu: float = 0.0

    def of(self, group: Any) -> int:
        """Return the bytes of all collectives of one group."""
        return sum(size for (name, _), size in self.received.items() if name == group.group_name)

    def clear(self) -> None:
        """Forget all that was counted."""
        self.received.clear()
        self.alike = self.wall = self.cpu = 0.0


@contextmanager
def counted() -> Iterator[GroupCalls]:
    """Count what this process's groups do meanwhile."""
    calls = GroupCalls()
    with ExitStack() as stack:
        for collective, names in _METHODS.items():
            for name in names:
                if hasattr(dist.ProcessGroup, name):
                    wrapped = _counting(getattr(dist.ProcessGroup, name), collective, calls)
                    stack.enter_context(mock.patch.object(dist.ProcessGroup, name, wrapped))
        for name, times in _ALIKE.items():
            wrapped = _counting_alike(getattr(dist.ProcessGroup, name), times, calls)
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, wrapped))
        timed = _timing(dist.ProcessGroup.allgather, calls)
        stack.enter_context(mock.patch.object(dist.ProcessGroup, "allgather", timed))
        stack.enter_context(mock.patch.object(dist.Work, "wait", _timing(dist.Work.wait, calls)))
        yield calls


def _counting(method: Callable[..., Any], collective: str, calls: GroupCalls) -> Callable[..., Any]:
    timed = _timing(method, calls)

    def call(group: Any, output: torch.Tensor, source: torch.Tensor, *args: Any) -> Any:
        key = (group.group_name, collective)
        calls.received[key] += _from_others(collective, group, output, source, args)
        return timed(group, output, source, *args)

    return call


def _counting_alike(
    method: Callable[..., Any], times: Callable[[int], float], calls: GroupCalls
) -> Callable[..., Any]:
    timed = _timing(method, calls)

    def call(group: Any, given: Any, *args: Any, **options: Any) -> Any:
        tensors = given if isinstance(given, list | tuple) else [given]
        calls.alike += times(group.size()) * sum(tensor.nbytes for tensor in tensors)
        return timed(group, given, *args, **options)

    return call


def _from_others(
    collective: str, group: Any, output: torch.Tensor, source: torch.Tensor, args: tuple[Any, ...]
) -> int:
    """Return the bytes that come from other ranks, each sending what is for this one, once."""
    if collective == "all_to_all":
        rows, own = len(output), len(output) // group.size()
        if args and args[0]:  # output splits
            own = args[0][group.rank()]
        return (rows - own) * (output[:1].numel() if rows else 0) * output.element_size()
    if collective == "all_gather":
        return (output.numel() - source.numel()) * output.element_size()
    return (source.numel() - output.numel()) * source.element_size()


def _timing(method: Callable[..., Any], calls: GroupCalls) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return method(*args, **options)
        finally:
            calls.wall += time.perf_counter() - wall
            calls.cpu += time.thread_time() - cpu

    return call


def threads_cpu() -> dict[str, float]:
    """CPU-seconds of this process's threads by the names that they have, all of one name summed."""
    seconds: dict[str, float] = defaultdict(float)
    tick = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc/self/task").glob("*/stat"):
        name, _, rest = stat.read_text().partition("(")[2].rpartition(") ")
        user, system = rest.split()[11:13]
        seconds[name] += (int(user) + int(system)) / tick
    return seconds
