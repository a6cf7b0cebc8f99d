"""YAML files read safely (1.2, no duplicate keys, no tags), `include:`, and dotted overrides."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megahybrid.config.old_words import (
    NEW,
    Tell,
    as_first_meant,
    current_overrides,
    current_tree,
    silent,
)
from megahybrid.config.packaged import beside, located, packaged_name
from megahybrid.errors import ConfigError, PathError
from megahybrid.plain_file import read_plain_file
from megahybrid.printable import shortened

# Aliases are shared when read but walked one by one when checked: a few lines can stand for
# billions of values.
MAX_VALUES = 20_000
# Of a file with all that it includes, and of one override: the reader takes some 30 kB a second at
# worst, and our longest run has 6 kB.
MAX_BYTES = 128 * 1024
MAX_FILES = 100
MAX_OVERRIDES = 1000
MAX_DOTTED = 500  # characters of a dotted name
# A file that is not ours may be somebody's secret: so much of it is quoted.
MOST_QUOTED = 60


def read_tree(path: Path, tell: Tell = silent) -> dict[str, Any]:
    """Return the mapping that a file says, its `include:` files deep-merged in order under it.
    `tell` is given a line about each file that uses an old word."""
    return _Reader(tell).tree(path, ())


class _Reader:
    """One file and all that it includes, which share one bound."""

    def __init__(self, tell: Tell) -> None:
        self._bytes = self._files = 0
        self._tell = tell

    def tree(self, path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
        text = self._text(path, including)
        identity = Path(os.path.realpath(located(path)))
        name = _name(path)
        if identity in including:
            chain = shortened(" -> ".join(p.name for p in (*including, path)), 200)
            raise ConfigError(f"{name}: include goes in a circle ({chain}). Remove one of them.")
        tree = parse_yaml(text, name)
        if tree is None:
            raise ConfigError(f"{name} is empty. A run file is a mapping of fields to values.")
        if not isinstance(tree, dict):
            raise ConfigError(
                f"{name} holds {_kind(tree)}, not a mapping of fields to values. "
                "Write `field: value` lines."
            )
        includes = tree.pop("include", None) or []
        if isinstance(includes, str):
            includes = [includes]
        if not isinstance(includes, list) or not all(isinstance(i, str) for i in includes):
            raise ConfigError(
                f"{name}: include={shortened(str(includes), MOST_QUOTED)} is not a list of files. "
                "Use [a.yaml, b.yaml]."
            )
        merged: dict[str, Any] = {}
        for file in includes:
            merged = merge(merged, self.tree(beside(path, file), (*including, identity)))
        # Each file in the words of today before it is merged with files that use others.
        return merge(merged, current_tree(tree, name, self._tell))

    def _text(self, path: Path, including: tuple[Path, ...]) -> str:
        """Return the file's text. Files that include one another twice double with each, so all
        are counted, not their depth alone."""
        self._files += 1
        if self._files > MAX_FILES:
            raise ConfigError(
                f"{_name(including[0])} includes more than {MAX_FILES} files, each counted where "
                "it is included. Include fewer."
            )
        text = _read_text(path, including, MAX_BYTES - self._bytes)
        self._bytes += len(text.encode())
        return text


def _name(path: Path) -> str:
    return shortened(str(path), 200)


def _read_text(path: Path, including: tuple[Path, ...], most_bytes: int) -> str:
    name = _name(path)
    by = f" (included by {shortened(including[-1].name)})" if including else ""
    try:
        return read_plain_file(located(path), most_bytes).decode("utf-8")
    except FileNotFoundError:
        ours = packaged_name(path)
        hint = f", or use megahybrid's own: {ours}" if ours is not None else ""
        raise ConfigError(f"{name} does not exist{by}. Check the path{hint}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a folder, not a YAML file{by}. Name a file in it.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text (byte {error.start}){by}. Save it as UTF-8."
        ) from None
    except PathError as error:
        raise ConfigError(f"{error}{by}") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}{by}.") from None
    except ValueError:
        raise ConfigError(f"{name} is not a path (it holds NUL){by}. Correct it.") from None


def parse_yaml(text: str, source: str) -> Any:
    """Return plain dicts, lists and scalars. `source` begins the message of a ConfigError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{source}: {len(text):,} characters of YAML are more than the {MAX_BYTES:,} that are "
            "read. Shorten it."
        )
    if any(line.startswith("%") for line in text.splitlines()):
        # "%YAML 1.1" would turn `off` into false.
        raise ConfigError(f"{source}: YAML directives (%) are not read. Remove the line.")
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.Constructor = _constructor()
        plain = yaml.load(text)
    except MarkedYAMLError as error:
        raise ConfigError(_marked(error, source)) from None
    except YAMLError as error:
        problem = shortened(" ".join(str(error).split()))
        raise ConfigError(f"{source}: not YAML: {problem}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{source}: not YAML: {shortened(str(error))}.") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply. Flatten it.") from None
    _count(plain, source, {}, set())
    return plain


def _marked(error: Any, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    at = f" line {mark.line + 1}" if mark is not None else ""
    problem = str(error.problem or error.context)
    if _MERGED in problem:
        return f"{source}{at}: {_MERGED}. Write the values out."
    if "duplicate key" in problem:
        key = shortened(problem.split('"')[1], MOST_QUOTED)
        return f"{source}{at}: the key '{key}' is written twice in one mapping. Keep one."
    if "could not determine a constructor" in problem:
        tag = shortened(problem.rsplit("tag", 1)[1].strip().strip("'"), MOST_QUOTED)
        return f"{source}{at}: the YAML tag {tag} is not read. Write plain values."
    if "document" in problem:
        return f"{source}{at}: a second YAML document begins (---). Keep one document per file."
    return f"{source}{at}: not YAML: {shortened(problem)}."


_MERGED = f"merge keys (<<) stand for more than {MAX_VALUES} values"


@cache
def _constructor() -> Any:
    """Return the class that makes values, with a bound on merge keys: each copies what it names, so
    that a few lines that name one another twice would stand for billions before any value exists.
    """
    from ruamel.yaml.constructor import ConstructorError, SafeConstructor

    class Constructor(SafeConstructor):
        merged = 0

        def flatten_mapping(self, node: Any) -> Any:
            written = len(node.value)
            flat = super().flatten_mapping(node)
            self.merged += max(0, len(node.value) - written)
            if self.merged > MAX_VALUES:
                raise ConstructorError(None, None, _MERGED, node.start_mark)
            return flat

    return Constructor


def _count(plain: Any, source: str, sizes: dict[int, int], open_: set[int]) -> int:
    """Count the values that `plain` stands for, every alias counted where it is used."""
    if not isinstance(plain, dict | list):
        return 1
    key = id(plain)
    if key in open_:
        raise ConfigError(f"{source}: a YAML alias contains itself. Write the value out.")
    if key not in sizes:
        open_.add(key)
        items = plain.values() if isinstance(plain, dict) else plain
        sizes[key] = 1 + sum(_count(item, source, sizes, open_) for item in items)
        open_.discard(key)
    if sizes[key] > MAX_VALUES:
        raise ConfigError(
            f"{source}: YAML aliases stand for more than {MAX_VALUES} values. Write the values out."
        )
    return sizes[key]


def _kind(plain: Any) -> str:
    if isinstance(plain, list):
        return "a list"
    return f"the single value {shortened(repr(plain), MOST_QUOTED)}"


def merge(under: Any, over: Any) -> Any:
    """Return `over` laid on `under`: mappings key by key, everything else replaced.

    A mapping whose `kind` differs replaces the other whole: the fields of one kind mean nothing
    to another.
    """
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != under.get("kind", over["kind"]):
        return over
    merged = dict(under)
    for key, value in over.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def apply_overrides(
    tree: dict[str, Any], overrides: Sequence[str], tell: Tell = silent
) -> dict[str, Any]:
    """Return `tree` with each `key.sub=value` set; the value is YAML and replaces what was there.
    `tell` is given a line where an old word is used."""
    if len(overrides) > MAX_OVERRIDES:
        raise ConfigError(
            f"{len(overrides):,} overrides are more than the {MAX_OVERRIDES:,} that are read. "
            "Write them into a file that includes the other."
        )
    names = current_overrides([override.partition("=")[0].strip() for override in overrides], tell)
    for override, dotted in zip(overrides, names, strict=True):
        _, sign, text = override.partition("=")
        if not sign or not dotted or not all(dotted.split(".")) or len(dotted) > MAX_DOTTED:
            raise ConfigError(
                f"'{shortened(override)}' is not an override. Write key.sub=value, "
                "for example parallel.tensor=2."
            )
        parts = dotted.split(".")
        value = current_tree(parse_yaml(text, dotted), dotted, tell, parts)
        old = dotted != override.partition("=")[0].strip()
        if old and parts[-4:-2] == ["layer_plan", "schemes"] and parts[-1] == NEW:
            value = as_first_meant(value)
        tree = _with(tree, parts, value, dotted)
    return tree


def _with(tree: Any, parts: list[str], value: Any, dotted: str) -> Any:
    """Return a copy of `tree` whose item at the path `parts` is `value`."""
    part, rest = parts[0], parts[1:]
    if isinstance(tree, list):
        if not part.isdigit() or int(part) >= len(tree):
            numbers = "0" if len(tree) == 1 else f"a number from 0 to {len(tree) - 1}"
            raise ConfigError(
                f"{dotted} names item '{part}' of a list (it has {len(tree)} items). "
                f"Use {numbers}, or set the whole list."
            )
        items = list(tree)
        items[int(part)] = _with(items[int(part)], rest, value, dotted) if rest else value
        return items
    mapping = dict(tree) if isinstance(tree, dict) else {}
    key: Any = part
    if part not in mapping and part.isdigit() and any(isinstance(k, int) for k in mapping):
        key = int(part)
    mapping[key] = _with(mapping.get(key), rest, value, dotted) if rest else value
    return mapping
