"""The JSON schema of the files that users write: editors complete and check them by it.

A file may be a part that others include, so nothing is required in it; what is missing is told by
`megahybrid check`. YAML's `800_000` is a number here and text to many editors: both are taken.
`python -m megahybrid.config.schema` writes configs/schema/, and a test keeps the files equal.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megahybrid.config.run import RunConfig
from megahybrid.config.site import Site
from megahybrid.config.study import Study
from megahybrid.config.suite import Suite
from megahybrid.errors import ConfigError

FOLDER = Path("configs/schema")
FILES: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "suite": Suite,
    "site": Site,
    "study": Study,
}
INCLUDE = {
    "description": "files that are merged under this one, in order: relative to it, or pkg:…",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
# Without what is required several kinds may fit; and bounds that pydantic leaves in its own words.
_WORDS = {
    "oneOf": "anyOf",
    "ge": "minimum",
    "le": "maximum",
    "gt": "exclusiveMinimum",
    "lt": "exclusiveMaximum",
}
_WHOLE = "^[-+]?[0-9][0-9_]*$"


def schema(kind: str) -> dict[str, Any]:
    """Return the schema of a kind of file. Raises ConfigError for a kind that there is not."""
    if kind not in FILES:
        raise ConfigError(f"{kind[:60]} is no kind of file. Use {', '.join(FILES)}.")
    found: dict[str, Any] = _loosened(FILES[kind].model_json_schema(mode="validation"))
    properties = {"include": INCLUDE} | found.pop("properties")
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": f"megahybrid {kind}"}
    return (
        head
        | {key: value for key, value in found.items() if key != "title"}
        | {"properties": properties}
    )


def schema_text(kind: str) -> str:
    """The schema as the text of a file."""
    return json.dumps(schema(kind), indent=1, ensure_ascii=False) + "\n"


def _loosened(value: Any, *, names: bool = False) -> Any:
    """A schema as an editor needs it; `names`: these keys are names of fields, not the schema's."""
    if isinstance(value, list):
        return [_loosened(item) for item in value]
    if not isinstance(value, dict):
        return value
    if names:
        return {name: _loosened(item) for name, item in value.items()}
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key in ("required", "discriminator", "default_factory") or (
            key == "title" and isinstance(item, str)
        ):
            continue
        name = str(_WORDS.get(key, key))
        is_names = key in ("properties", "$defs", "patternProperties")
        found[name] = (
            item if key in ("default", "enum", "const") else _loosened(item, names=is_names)
        )
    if found.get("type") in ("integer", "number") and "pattern" not in found:
        found["type"], found["pattern"] = [found["type"], "string"], _WHOLE
    return found


def write_all(folder: Path = FOLDER) -> None:
    """Write the schema of every kind of file."""
    folder.mkdir(exist_ok=True)
    for kind in FILES:
        (folder / f"{kind}.json").write_text(schema_text(kind), encoding="utf-8")


if __name__ == "__main__":
    write_all()
