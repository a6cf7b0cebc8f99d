"""Fields that had another name: what users and files of version 0.1.0 wrote is read as meant.

A scheme's `score_scale` was `logit_scale`, which is also the name of the model's factor on its
logits; that one stays. SSMax's start had a default of its own then, which goes with the old word.
What a user wrote is read with one line that names the new word; what a checkpoint or a run's folder
holds is read in silence.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from megahybrid.errors import ConfigError
from megahybrid.printable import printable, shortened

OLD, NEW = "logit_scale", "score_scale"
# Fields of a scheme lie two below it: schemes.local.logit_scale.
SCHEMES = "schemes"

FIRST_SSMAX_START = 0.43

Tell = Callable[[str], None]


@cache
def tell_once(line: str) -> None:
    """Write a line to stderr, once in this process: a run file is read more than once."""
    print(f"megahybrid: {printable(line)}", file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Tell nothing."""


def current_tree(tree: Any, source: str, tell: Tell = silent, at: Sequence[str] = ()) -> Any:
    """`tree`, which `source` says at the dotted path `at`, in the words of today. Raises
    ConfigError where a scheme has both words."""
    found: list[str] = []
    current = _renamed(tree, OLD, NEW, tuple(at), found)
    if found:
        tell(f"{source}: {shortened(found[0], 200)} is called {NEW} now. {_ADVICE}")
    return current


_ADVICE = "It is read as that; please write the new word."


def current_path(dotted: str) -> str:
    """A dotted name in the words of today."""
    parts = dotted.split(".")
    for index, part in enumerate(parts[2:], start=2):
        if part == OLD and parts[index - 2] == SCHEMES:
            parts[index] = NEW
    return ".".join(parts)


def current_overrides(names: Sequence[str], tell: Tell = silent) -> list[str]:
    """The dotted names of `key.sub=value` in the words of today. Raises ConfigError where both
    words are used of one scheme."""
    current = [current_path(name) for name in names]
    changed = [(old, new) for old, new in zip(names, current, strict=True) if old != new]
    for old, new in changed:
        field = _field(new)
        for name in names:
            if _field(name) == field:
                raise ConfigError(
                    f"{shortened(old, 200)} and {shortened(name, 200)} name the same field, "
                    f"{NEW}. Give one of them."
                )
    if changed:
        tell(f"{shortened(changed[0][0], 200)}: {OLD} is called {NEW} now. {_ADVICE}")
    return current


def _field(dotted: str) -> str | None:
    """The part of a dotted name that ends with a scheme's field of the new name."""
    parts = dotted.split(".")
    for index, part in enumerate(parts[2:], start=2):
        if part == NEW and parts[index - 2] == SCHEMES:
            return ".".join(parts[: index + 1])
    return None


def current_scheme(fields: Any, *, whole: bool = False) -> Any:
    """The fields of one scheme, the `whole` of it or what a stage changes, in the words of today.
    Raises ValueError where it has both."""
    if not isinstance(fields, dict) or OLD not in fields:
        return fields
    if NEW in fields:
        raise ValueError(_both(OLD))
    scale = as_first_meant(fields[OLD]) if whole else fields[OLD]
    return {NEW if name == OLD else name: scale if name == OLD else v for name, v in fields.items()}


def as_first_meant(scale: Any) -> Any:
    """Return a scheme's old `logit_scale` with the default that it had then."""
    if isinstance(scale, dict) and scale.get("kind") == "ssmax":
        return {"initial": FIRST_SSMAX_START} | scale
    return scale


def first_words(tree: Any) -> Any:
    """`tree` in the words of version 0.1.0: of what digests and exported configs are made."""
    return _renamed(tree, NEW, OLD, (), [])


def _both(path: str) -> str:
    return f"{path} stands beside {NEW}, which is the new word for it. Give {NEW} alone."


def _renamed(tree: Any, old: str, new: str, at: tuple[Any, ...], found: list[str]) -> Any:
    """`tree` with the field of schemes renamed; `found` is given the dotted path of each."""
    if isinstance(tree, list):
        return [
            _renamed(item, old, new, (*at, str(index)), found) for index, item in enumerate(tree)
        ]
    if not isinstance(tree, dict):
        return tree
    is_scheme = len(at) >= 2 and at[-2] == SCHEMES
    renamed: dict[Any, Any] = {}
    for key, item in tree.items():
        here = (*at, key)
        if is_scheme and key == old:
            if new in tree:
                raise ConfigError(_both(_dotted(here)))
            found.append(_dotted(here))
            # A stage's fields are laid over the model's scheme, which has a start.
            whole = old == OLD and at[-3:-2] == ("layer_plan",)
            renamed[new] = as_first_meant(item) if whole else item
        else:
            renamed[key] = _renamed(item, old, new, here, found)
    return renamed


def _dotted(parts: Sequence[Any]) -> str:
    """The parts of a path as one name. What is no text is no name, and may be a number that Python
    refuses to write out."""
    return shortened(".".join(part if isinstance(part, str) else "?" for part in parts), 200)
