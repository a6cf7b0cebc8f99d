"""The reference of every field of a run file, made from the classes themselves.

`python -m megahybrid.config.reference > docs/config.md` writes it; a test keeps the page equal.
"""

import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megahybrid.config.explain import show
from megahybrid.config.limits import AtMost
from megahybrid.config.run import RunConfig

HEAD = """# The run file, field by field

Made from the classes in `megahybrid/config` by `python -m megahybrid.config.reference`.

A run file is YAML 1.2: `off`, `no` and `on` are text, `3e-4` and `800_000` are numbers, a key
written twice is refused, an unknown key is refused with the nearest name.

`include: [a.yaml, b.yaml]` names files relative to the file, or megahybrid's own by
`pkg:models/rope_8b.yaml`. They are merged in order, then the file itself: mappings key by key,
except that a mapping of another `kind` replaces the old one whole; lists and values replace. Last,
each `key.sub=value` of the command line replaces what was there; `stages.0.tokens=1_000_000` counts
items from 0.

Paths of data and tokenizers are relative to where a command is given; one that exists only beside
the run file is found there, with a line that says so. An editor with a YAML language server checks
a file whose first line is `# yaml-language-server: $schema=…` (`megahybrid schema` prints it).

Only plain files are read, at most 128 KiB and 100 files with all that is included, and 20,000
values after aliases. Sizes have limits (`≤` below): larger ones are refused at once, with the
reason. What a message quotes of a file is short, because a wrong name may point at anything.

`directory` is new, empty or a run's: a folder that holds a dataset, a model, a study or other files
is refused. A run file, notes and logs of a job may lie there already.
"""


def reference() -> str:
    """The page as Markdown: one table per class, RunConfig first, each class where first used."""
    return HEAD + "".join(_section(model) for model in _classes(RunConfig))


def _classes(root: type[BaseModel]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []

    def visit(model: type[BaseModel]) -> None:
        if model in found:
            return
        found.append(model)
        for field in model.model_fields.values():
            for inner in _models_in(field.annotation):
                visit(inner)

    visit(root)
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in get_args(annotation) for m in _models_in(argument)]


def _section(model: type[BaseModel]) -> str:
    lines = [f"\n## {model.__name__}\n", inspect.cleandoc(model.__doc__ or "") + "\n"]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", _type(field), _default(field), field.description or _kind(field))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(field: FieldInfo) -> str:
    return "which of the kinds this is" if get_origin(field.annotation) is Literal else ""


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "see meaning"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`"
    return f"`{show(field.default)}`"


def _type(field: FieldInfo) -> str:
    if any(isinstance(item, StringConstraints) for item in field.metadata):
        return "name"
    name, null, _ = _name(field.annotation).partition(" or `null`")
    return name + _bounds(field.metadata) + null


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        names = [m for m in arguments[1:] if isinstance(m, StringConstraints)]
        return "name" if names else _name(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{show(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) if a is not types.NoneType else "`null`" for a in arguments)
    if origin is dict:
        return f"mapping of {_name(arguments[0])} to {_name(arguments[1])}"
    if origin is list:
        return f"list of {_name(arguments[0])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_name(a) for a in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names_of = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "value"}
    return names_of.get(annotation, str(annotation))


def _bounds(metadata: Any) -> str:
    words = []
    for item in metadata:
        if isinstance(item, AtMost):
            words.append(f"≤ {item.limit:,}")
        for kind, name, sign in (
            (annotated_types.Gt, "gt", ">"),
            (annotated_types.Ge, "ge", "≥"),
            (annotated_types.Lt, "lt", "<"),
            (annotated_types.Le, "le", "≤"),
            (annotated_types.MultipleOf, "multiple_of", "a multiple of"),
        ):
            if isinstance(item, kind):
                words.append(f"{sign} {getattr(item, name)}")
    return f" {', '.join(words)}" if words else ""


if __name__ == "__main__":
    print(reference(), end="")
