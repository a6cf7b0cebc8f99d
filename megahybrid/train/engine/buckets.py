"""Parameter groups cut into buckets that are complete one after the other in a backward pass."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

BUCKET = 2**26  # elements that travel at a time: large enough for a network's best


def in_buckets(groups: Iterable[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of at least BUCKET elements with the settings of those they were cut from, in
    the order in which the gradients of `model` are complete: its last parameters' come first."""
    place = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    cut = [{**group, "params": bucket} for group in groups for bucket in _cut(group["params"])]
    return sorted(cut, key=lambda group: -min(place[id(each)] for each in group["params"]))


def _cut(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    last = len(parameters)
    while last:
        first, elements = last, 0
        while first and elements < BUCKET:
            first -= 1
            elements += parameters[first].numel()
        yield parameters[first:last]
        last = first
