"""A subpackage whose name is also a function of the package's front: `megahybrid.train(…)`."""

import importlib
import sys
from types import ModuleType
from typing import Any

API = "megahybrid.api"


class _CallableModule(ModuleType):
    """A module that does what the function of its name in `megahybrid.api` does."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(API), self.__name__.rpartition(".")[2])(
            *given, **named
        )


def callable_as_in_api(name: str) -> None:
    """Let the module of this name be called. Once it is imported, it stands where the function
    stood."""
    sys.modules[name].__class__ = _CallableModule
