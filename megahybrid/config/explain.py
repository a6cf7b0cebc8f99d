"""Pydantic's errors in our words: `<dotted name>=<value> <what is wrong>. <What to do>.`"""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megahybrid.config import refused
from megahybrid.config.base import JOB_NAME, LINE, NAME, TIME_LIMIT, did_you_mean
from megahybrid.config.examples import example
from megahybrid.config.limits import BEYOND
from megahybrid.config.misplaced_fields import right_place
from megahybrid.printable import printable, shortened

# A file that is not ours, named by mistake, is not printed: so many lines tell of it, and so many
# of its keys.
MOST_LINES = 20
MOST_UNKNOWN = 5
# Text is read as a number for Python's integers have no end; all that computes has 64 bits.
MOST_WHOLE = 2**63

_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "finite_number": "a finite number",
}
# Of these an example says more than their name.
_SHOWN = ("list_type", "tuple_type", "dict_type", "model_type", "model_attributes_type")
_BOUND = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def explain(
    error: ValidationError, type_: type[BaseModel], plain: Any, where: str = ""
) -> list[str]:
    """One line per mistake, in the order of the fields; `where` is the dotted path of `plain`."""
    lines: dict[str, None] = {}
    unknown = 0
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":
            continue  # follows from another mistake, which has its own line
        unknown += item["type"] == "extra_forbidden"
        if item["type"] == "extra_forbidden" and unknown > MOST_UNKNOWN:
            continue
        lines.setdefault(_line(dict(item), type_, plain, where))
        if len(lines) == MOST_LINES:
            break
    told = list(lines)
    if unknown > MOST_UNKNOWN:
        told.append(f"and {unknown - MOST_UNKNOWN:,} more keys are not fields. Remove them.")
    if len(lines) == MOST_LINES:
        told.append("More may be wrong; these are the first lines. Correct them and try again.")
    return told


def too_large(plain: Any, where: str = "") -> str | None:
    """One line about a whole number beyond 64 bits anywhere in `plain`, or None."""
    if isinstance(plain, dict | list):
        items = plain.items() if isinstance(plain, dict) else enumerate(plain)
        lines = (too_large(item, _join(where, [str(key)])) for key, item in items)
        return next((line for line in lines if line is not None), None)
    if type(plain) is int and abs(plain) > MOST_WHOLE:
        return (
            f"{where or 'the file'}={show(plain)} has more than 64 bits ({plain.bit_length():,}). "
            "Write a smaller number."
        )
    return None


def _line(item: dict[str, Any], type_: type[BaseModel], plain: Any, where: str) -> str:
    kind, context = item["type"], item.get("ctx", {})
    is_key = bool(item["loc"]) and item["loc"][-1] == "[key]"
    parts = _real_path(item["loc"], plain, kind)
    path = _join(where, parts)
    value = show(item["input"])
    if kind == "extra_forbidden":
        fields = fields_at(type_, parts[:-1], plain)
        owners = _kinds_with(type_, parts, plain)
        if owners:
            written = _item_at(plain, parts[:-1])["kind"]
            return (
                f"{path} is a field of kind: {' or '.join(owners)}, not of kind: {written}. "
                "Remove it, or change the kind."
            )
        if why := refused.reason([*where.split("."), *parts[:-1]], parts[-1]):
            return f"{path} is not supported: {why}. Remove it."
        if place := right_place(type_, parts):
            return f"{path} is not a field. It is {_join(where, [place])}."
        near = did_you_mean(parts[-1], fields)
        return f"{path} is not a field.{near or ' The fields here are ' + _list(fields) + '.'}"
    if kind == "missing":
        return f"{path} is missing. Give it a value."
    if kind in ("value_error", "assertion_error"):
        return _join(where, parts, str(context.get("error", item["msg"])))
    if kind == BEYOND and is_key:
        return f"{_join(where, parts[:-1])} has the key '{value}', which {item['msg']}. Use less."
    if kind == BEYOND:
        value = "" if isinstance(item["input"], dict | list) else f"={value}"
        return f"{path}{value} {item['msg']}. Use less."
    if is_key:
        return f"{_join(where, parts[:-1])} has the key '{value}', which {_says(kind, context)}."
    if kind == "union_tag_not_found":
        kinds = ", ".join(_kinds_at(type_, parts, plain))
        return f"{path}={value} does not say its kind. Add kind: with one of {kinds}."
    if kind == "union_tag_invalid":
        tags = [t.strip().strip("'") for t in context["expected_tags"].split(", ")]
        tag = context["tag"]
        if why := refused.reason([*where.split("."), *parts], tag):
            return f"{path}.kind={tag} is not supported: {why}. Use {' or '.join(tags)}."
        return f"{path}.kind={tag} is not one of {', '.join(tags)}.{did_you_mean(tag, tags)}"
    if kind == "literal_error":
        options = [
            o.strip().strip("'") for o in context["expected"].replace(" or ", ", ").split(", ")
        ]
        if why := refused.reason([*where.split("."), *parts], item["input"]):
            return f"{path}={value} is not supported: {why}. Use {' or '.join(options)}."
        return f"{path}={value} is not one of {', '.join(options)}.{did_you_mean(value, options)}"
    if kind in _WANTED:
        wanted = _WANTED[kind].removesuffix(" (key: value)")
        shown = example(_names_at(type_, parts, plain)) if kind in _SHOWN else None
        hint = _hint(kind, item["input"]) if shown is None else f". Write {wanted}: {shown}"
        return f"{path}={value} is not {wanted}{hint}."
    return f"{path}={value} {_says(kind, context)}. Change it."


_PATTERNS = {
    NAME: "is not a name (letters, digits, _ and - only, at most 100)",
    LINE: "is empty or more than one line",
    JOB_NAME: "is not one line of at most 200 characters",
    TIME_LIMIT: "is not a time limit (minutes, H:MM:SS or D-HH:MM:SS)",
}


def _says(kind: str, context: dict[str, Any]) -> str:
    if kind in _BOUND:
        name, words = _BOUND[kind]
        return f"must be {words} {context[name]:g}"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], _PATTERNS[NAME])
    if kind == "too_short":
        return f"has {context['actual_length']} entries and needs {context['min_length']}"
    if kind == "too_long":
        return f"has {context['actual_length']} entries and takes {context['max_length']}"
    if kind in _WANTED:
        return f"is not {_WANTED[kind]}"
    return f"is refused ({kind.replace('_', ' ')})"


def _hint(kind: str, value: Any) -> str:
    """Return the end of "is not an integer": the reason, and what to write."""
    wanted = _WANTED[kind]
    if value is None:
        return " (it is empty). Give it a value"
    if kind == "string_type":
        return ". Put it in quotes"
    if isinstance(value, bool):
        return f" (it is a boolean). Write {wanted}"
    if isinstance(value, float) and kind.startswith("int_") and value.is_integer():
        return f" (it has a fraction or an exponent). Write {int(value):_}"
    if isinstance(value, str) and kind in ("int_type", "int_from_float", "float_type", "bool_type"):
        quotes = " without quotes" if _is_number(value) else ""
        return f" (it is text). Write {wanted}{quotes}"
    return f". Write {wanted}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show(value: Any) -> str:
    """A value as one would write it in YAML, on one line and short."""
    text = printable(" ".join(_flow(value).split()))
    return text if len(text) <= 60 else text[:57] + "..."


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python writes out no more digits
        return f"a number of {value.bit_length():,} bits"
    return str(value)


def _join(where: str, parts: list[str], last: str = "") -> str:
    named = [shortened(p) for p in parts]
    return ".".join(p for p in (where, *named, last) if p) or "the file"


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _real_path(loc: tuple[Any, ...], plain: Any, kind: str) -> list[str]:
    """The dotted path in the file: pydantic puts union tags into its own, which nobody wrote."""
    parts: list[str] = []
    here = plain
    for index, part in enumerate(loc):
        if part == "[key]":
            continue
        is_last = index == len(loc) - 1
        if isinstance(here, dict):
            key = part if part in here else _same_text(part, here)
            if key in here:
                here = here[key]
            elif not (is_last and kind == "missing"):
                continue
        elif isinstance(here, list | tuple) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        else:
            continue
        parts.append(str(part))
    return parts


def _same_text(part: Any, mapping: dict[Any, Any]) -> Any:
    """The key that prints as `part` does: pydantic turns some keys of a path into text."""
    return next((key for key in mapping if str(key) == str(part)), part)


def fields_at(type_: Any, parts: list[str], plain: Any) -> list[str]:
    """The fields that the value at dotted path `parts` may have."""
    models = [m for a, here in _annotations_at(type_, parts, plain) for m in _models(a, here)]
    return list(dict.fromkeys(name for m in models if _is_model(m) for name in m.model_fields))


def _kinds_at(type_: Any, parts: list[str], plain: Any) -> list[str]:
    """The values that `kind` may have at dotted path `parts`."""
    models = [m for a, _ in _annotations_at(type_, parts, plain) for m in _models(a, None)]
    return list(dict.fromkeys(kind for model in models for kind in _kinds(model)))


def _kinds_with(type_: Any, parts: list[str], plain: Any) -> list[str]:
    """The other kinds of the value holding `parts` that do have the field `parts` names."""
    holders = [m for a, _ in _annotations_at(type_, parts[:-1], plain) for m in _models(a, None)]
    owners = [m for m in holders if _kinds(m) and parts[-1] in m.model_fields]
    return list(dict.fromkeys(kind for model in owners for kind in _kinds(model)))


def _names_at(type_: Any, parts: list[str], plain: Any) -> list[str]:
    """The value at dotted path `parts` by its field's name, and by the classes it may be of."""
    owners = [m for a, here in _annotations_at(type_, parts[:-1], plain) for m in _models(a, here)]
    fields = [f"{m.__name__}.{part}" for m in owners if _is_model(m) for part in parts[-1:]]
    models = [m for a, _ in _annotations_at(type_, parts, plain) for m in _models(a, None)]
    return [*fields, *(m.__name__ for m in models if _is_model(m))]


def _item_at(plain: Any, parts: list[str]) -> Any:
    for part in parts:
        plain = _item(plain, part)
    return plain


def _annotations_at(type_: Any, parts: list[str], plain: Any) -> list[tuple[Any, Any]]:
    """The annotations of the value at dotted path `parts`, each with what the file has there."""
    found = [(type_, plain)]
    for part in parts:
        inner = []
        for annotation, here in found:
            for model in _models(annotation, here):
                if not _is_model(model):
                    inner.append((get_args(model)[-1], _item(here, part)))
                elif part in model.model_fields:
                    inner.append((model.model_fields[part].annotation, _item(here, part)))
        found = inner
    return found


def _item(plain: Any, part: str) -> Any:
    if isinstance(plain, dict):
        return plain.get(_same_text(part, plain))
    if isinstance(plain, list | tuple) and part.isdigit() and int(part) < len(plain):
        return plain[int(part)]
    return None


def _models(annotation: Any, plain: Any) -> list[Any]:
    """The models and containers an annotation allows, narrowed by the `kind` that was written."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0], plain)
    if origin in (Union, types.UnionType):
        found = [m for member in get_args(annotation) for m in _models(member, plain)]
        written = plain.get("kind") if isinstance(plain, dict) else None
        return [m for m in found if written in _kinds(m)] or found
    if origin in (dict, list, tuple):
        return [annotation]
    return [annotation] if _is_model(annotation) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kinds(model: Any) -> tuple[str, ...]:
    if not _is_model(model):
        return ()
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return get_args(field.annotation)
