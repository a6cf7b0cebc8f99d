"""How annotations are checked in tests: an int is a float, as for every type checker (PEP 484).

`patch_jaxtyped` makes a check cheap. jaxtyping binds the arguments of each call, and has them
checked before the call and again with what it returns: half of what a small model costs, at every
function of the package. beartype's own wrapper checks both in one pass, in the same memo of
dimensions, so that a name means the same size in arguments and result.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping._config import config
from jaxtyping._storage import pop_shape_memo, push_shape_memo, shape_str

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped


def patch_jaxtyped() -> None:
    """Have the import hook of jaxtyping 0.3 decorate with `checked`: it finds it by this name."""
    jaxtyping.jaxtyped = _decorator  # type: ignore[assignment]


def _decorator(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(what: Any) -> Any:
        if inspect.isfunction(what) and not _runs_later(what):
            return checked(what)
        if inspect.isclass(what) and dataclasses.is_dataclass(what):
            if not hasattr(what.__init__, "unchecked"):
                what.__init__ = checked(what.__init__)  # type: ignore[misc]
            return what
        return jaxtyped(what, typechecker=typechecker)

    return decorate


def _runs_later(function: Any) -> bool:
    """Whether the body runs after the call: its memo is gone by then."""
    kinds = (inspect.isgeneratorfunction, inspect.isasyncgenfunction, inspect.iscoroutinefunction)
    return any(kind(function) for kind in kinds)


def checked(function: Any) -> Any:
    """The function with its arguments and what it returns checked at each call."""
    _forget_what_is_not_imported(function)
    inner = check(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **named: Any) -> Any:
        if config.jaxtyping_disable:
            return function(*args, **named)
        memos = push_shape_memo({})
        try:
            return inner(*args, **named)
        except BeartypeCallHintViolation as error:  # a TypeError, as jaxtyping itself raises
            said = jaxtyping.TypeCheckError(str(error))
            said.add_note(shape_str(memos))
            raise said from error
        finally:
            pop_shape_memo()

    wrapper.unchecked = function  # type: ignore[attr-defined]
    return wrapper


def _forget_what_is_not_imported(function: Any) -> None:
    """An annotation by a name that only a type checker imports says nothing here."""
    for name, hint in function.__annotations__.items():
        if isinstance(hint, str):
            try:
                eval(hint, function.__globals__)
            except NameError as error:
                if error.name not in function.__qualname__.split("."):  # its own class comes to be
                    function.__annotations__[name] = Any
