"""Annotations are checked at each call: types, and sizes by their names up to the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import tests
from megahybrid.model.norm import RMSNorm
from megahybrid.parallel.mesh import ParallelMesh

if tests.ANNOTATIONS != "checked":
    pytest.skip(f"annotations are {tests.ANNOTATIONS}", allow_module_level=True)

import jaxtyping

VECTOR, LONGER = torch.zeros(3), torch.zeros(4)


def decorated(what: Any) -> Any:
    """Decorate a function or class as the import hook does with what it finds in the package."""
    return jaxtyping.jaxtyped(typechecker=tests.annotations.check)(what)


@decorated
def added(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return torch.cat([a, b])[: 3 + (a[0] > 0).int()]


@decorated
def inner(a: Float[Tensor, "n"]) -> float:
    return a.sum().item()


@decorated
def outer(a: Float[Tensor, "n"], b: Float[Tensor, "m"]) -> Float[Tensor, "n"]:
    """The same name in a function that is called means nothing here."""
    inner(b)
    return a


def test_a_size_by_one_name_is_the_same_in_all_arguments_and_the_result() -> None:
    assert added(VECTOR, VECTOR).shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError):
        added(VECTOR, LONGER)
    with pytest.raises(jaxtyping.TypeCheckError, match="return") as told:
        added(VECTOR + 1, VECTOR)
    assert "n=3" in "".join(told.value.__notes__)
    assert outer(VECTOR, LONGER) is VECTOR


def test_other_types_are_refused_and_an_int_is_a_float() -> None:
    @decorated
    def halved(x: float) -> float:
        return x / 2

    assert halved(1) == 0.5
    with pytest.raises(jaxtyping.TypeCheckError):
        halved("1")
    with pytest.raises(jaxtyping.TypeCheckError):
        added(VECTOR, VECTOR.long())


def test_the_package_is_checked() -> None:
    norm = RMSNorm(4, "norm", ParallelMesh.single(), 1e-5)
    assert norm(LONGER).shape == (4,)
    with pytest.raises(jaxtyping.TypeCheckError):
        norm(LONGER.long())
    with pytest.raises(jaxtyping.TypeCheckError):
        RMSNorm("4", "norm", ParallelMesh.single(), 1e-5)  # type: ignore[arg-type]


def test_methods_properties_dataclasses_and_generators_are_checked() -> None:
    @decorated
    @dataclass
    class Held:
        size: int

        @classmethod
        @decorated
        def made(cls, size: int) -> Any:
            return cls(size)

        @property
        @decorated
        def text(self) -> str:
            return self.size  # type: ignore[return-value]

    @decorated
    def counted(size: int) -> Iterator[int]:
        yield from range(size)

    assert Held.made(1) == Held(1) and list(counted(2)) == [0, 1]
    for wrong in (lambda: Held("1"), lambda: Held.made("1"), lambda: Held(1).text):  # type: ignore[arg-type]
        with pytest.raises(jaxtyping.TypeCheckError):
            wrong()
    with pytest.raises(jaxtyping.TypeCheckError):
        list(counted("2"))  # type: ignore[arg-type]
