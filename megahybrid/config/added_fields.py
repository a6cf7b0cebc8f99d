"""The fields that came after version 0.1, and how a digest that it wrote still holds.

A ledger holds digests of run files as 0.1 wrote them. A field that came later has no part in one
where it is at its default, because it does nothing there.
"""

from typing import Any

from megahybrid.config.base import Frozen

ADDED: dict[str, tuple[str, ...]] = {
    "ParallelConfig": ("context", "exchange"),
    "AttentionScheme": ("gate",),
}


def without_added(value: Any, dumped: Any) -> Any:
    """Return what `dump` made of a value without the fields that came later and are at their
    defaults, at any depth."""
    match value:
        case Frozen():
            fields = type(value).model_fields
            later = {
                name
                for name in ADDED.get(type(value).__name__, ())
                if getattr(value, name) == fields[name].get_default(call_default_factory=True)
            }
            return {
                name: without_added(getattr(value, name, None), inner)
                for name, inner in dumped.items()
                if name not in later
            }
        case dict():
            return {key: without_added(inner, dumped[key]) for key, inner in value.items()}
        case list() | tuple():
            return [without_added(one, inner) for one, inner in zip(value, dumped, strict=True)]
        case _:
            return dumped
