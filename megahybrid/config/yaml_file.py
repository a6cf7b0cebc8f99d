"""YAML files read safely (1.2, no duplicate keys, no tags), `include:`, and dotted overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahybrid.errors import ConfigError

# Aliases are shared when read but walked one by one when checked: a few lines can stand for
# billions of values.
MAX_VALUES = 100_000


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping a file says, its `include:` files deep-merged in order under it."""
    return _read_tree(path, ())


def _read_tree(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in including:
        chain = " -> ".join(p.name for p in (*including, path))
        raise ConfigError(f"{path}: include goes in a circle ({chain}). Remove one of them.")
    tree = parse_yaml(_read_text(path, including), str(path))
    if tree is None:
        raise ConfigError(f"{path} is empty. A run file is a mapping of fields to values.")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {_kind(tree)}, not a mapping of fields to values. "
            "Write `field: value` lines."
        )
    includes = tree.pop("include", None) or []
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(i, str) for i in includes):
        raise ConfigError(
            f"{path}: include={includes} is not a list of files. Use [a.yaml, b.yaml]."
        )
    merged: dict[str, Any] = {}
    for name in includes:
        merged = merge(merged, _read_tree(path.parent / name, (*including, path.resolve())))
    return merge(merged, tree)


def _read_text(path: Path, including: tuple[Path, ...]) -> str:
    by = f" (included by {including[-1].name})" if including else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist{by}. Check the path.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a YAML file{by}. Name a file in it.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}){by}. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}{by}.") from None


def parse_yaml(text: str, source: str) -> Any:
    """Plain dicts, lists and scalars. `source` begins the message of a ConfigError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if any(line.startswith("%") for line in text.splitlines()):
        # "%YAML 1.1" would turn `off` into false.
        raise ConfigError(f"{source}: YAML directives (%) are not read. Remove the line.")
    try:
        plain = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        raise ConfigError(_marked(error, source)) from None
    except YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{source}: not YAML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply. Flatten it.") from None
    _count(plain, source, {}, set())
    return plain


def _marked(error: Any, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    at = f" line {mark.line + 1}" if mark is not None else ""
    problem = str(error.problem or error.context)
    if "duplicate key" in problem:
        key = problem.split('"')[1]
        return f"{source}{at}: the key '{key}' is written twice in one mapping. Keep one."
    if "could not determine a constructor" in problem:
        tag = problem.rsplit("tag", 1)[1].strip().strip("'")
        return f"{source}{at}: the YAML tag {tag} is not read. Write plain values."
    if "document" in problem:
        return f"{source}{at}: a second YAML document begins (---). Keep one document per file."
    return f"{source}{at}: not YAML: {problem}."


def _count(plain: Any, source: str, sizes: dict[int, int], open_: set[int]) -> int:
    """How many values `plain` stands for, every alias counted where it is used."""
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
    return "a list" if isinstance(plain, list) else f"the single value {plain!r}"


def merge(under: Any, over: Any) -> Any:
    """`over` laid on `under`: mappings key by key, everything else replaced.

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


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with each `key.sub=value` set; the value is YAML and replaces what was there."""
    for override in overrides:
        dotted, sign, text = override.partition("=")
        dotted = dotted.strip()
        if not sign or not dotted or not all(dotted.split(".")):
            raise ConfigError(
                f"'{override}' is not an override. Write key.sub=value, "
                "for example parallel.tensor=2."
            )
        tree = _with(tree, dotted.split("."), parse_yaml(text, dotted), dotted)
    return tree


def _with(tree: Any, parts: list[str], value: Any, dotted: str) -> Any:
    """A copy of `tree` whose item at the path `parts` is `value`."""
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
