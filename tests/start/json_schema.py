"""As much of JSON Schema (draft 7) as our schemas use, said plainly: an editor's view of a file."""

import re
from collections.abc import Iterator
from typing import Any

KNOWN = {
    "$schema", "$defs", "$ref", "additionalProperties", "anyOf", "const", "default", "description",
    "enum", "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maxLength", "maximum",
    "minItems", "minLength", "minProperties", "minimum", "pattern", "patternProperties",
    "prefixItems", "properties", "propertyNames", "title", "type",
}  # fmt: skip
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,),
    "number": (int, float), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def faults(schema: dict[str, Any], value: Any, root: dict[str, Any], at: str = "") -> Iterator[str]:
    """Yield what a schema finds wrong with a value, by its dotted path."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        yield from faults(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root, at)
    if "anyOf" in schema and all(list(faults(s, value, root, at)) for s in schema["anyOf"]):
        yield f"{at} fits none of {len(schema['anyOf'])}"
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(
        isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")
        for kind in kinds
    ):
        yield f"{at} is not {kinds}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{at} is not {schema['const']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{at} is not like {schema['pattern']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            yield f"{at} is out of bounds"
        if value <= schema.get("exclusiveMinimum", value - 1):
            yield f"{at} is too small"
        if value >= schema.get("exclusiveMaximum", value + 1):
            yield f"{at} is too large"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at} has {len(value)} entries"
        firsts = schema.get("prefixItems", [])
        for index, item in enumerate(value):
            inner = firsts[index] if index < len(firsts) else schema.get("items", {})
            yield from faults(inner, item, root, f"{at}.{index}")
    if isinstance(value, dict):
        yield from _of_mapping(schema, value, root, at)


def _of_mapping(
    schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any], at: str
) -> Iterator[str]:
    if len(value) < schema.get("minProperties", 0):
        yield f"{at} is empty"
    rest = schema.get("additionalProperties", True)
    for key, item in value.items():
        yield from faults(schema.get("propertyNames", {}), key, root, f"{at}.{key}")
        inner = [schema["properties"][key]] if key in schema.get("properties", {}) else []
        patterns = schema.get("patternProperties", {})
        inner += [found for pattern, found in patterns.items() if re.search(pattern, key)]
        if not inner and rest is False:
            yield f"{at}.{key} is no field"
        if not inner and isinstance(rest, dict):
            inner = [rest]
        for found in inner:
            yield from faults(found, item, root, f"{at}.{key}")
