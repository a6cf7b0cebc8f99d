"""A field that was written in another place is found, and what a mapping looks like is shown."""

import types
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter

from megahybrid.config.examples import EXAMPLES, example
from megahybrid.config.misplaced_fields import OTHERS_NAMES, places, right_place
from megahybrid.config.reference import _classes
from megahybrid.config.run import RunConfig
from megahybrid.config.suite import Suite
from megahybrid.config.yaml_file import parse_yaml


def models(annotation: Any) -> list[type[BaseModel]]:
    """The classes that a value may be of, not those inside a list or a mapping."""
    if get_origin(annotation) is Annotated:
        return models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for member in get_args(annotation) for model in models(member)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []


def is_plain(annotation: Any) -> bool:
    """Whether a value may be a plain mapping."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(map(is_plain, get_args(annotation)))
    return get_origin(annotation) is dict


MAPPINGS = [
    (owner, name, [f"{owner.__name__}.{name}", *(m.__name__ for m in models(field.annotation))])
    for owner in _classes(RunConfig)
    for name, field in owner.model_fields.items()
    if models(field.annotation) or is_plain(field.annotation)
]


@pytest.mark.parametrize("owner, name, names", MAPPINGS, ids=lambda value: str(value))
def test_every_mapping_has_an_example_that_its_field_takes(
    owner: type[BaseModel], name: str, names: list[str]
) -> None:
    text = example(names)
    assert text is not None
    annotation = Annotated[owner.model_fields[name].annotation, owner.model_fields[name]]
    TypeAdapter(annotation).validate_python(parse_yaml(text, name))


def test_no_example_is_of_something_that_is_gone() -> None:
    classes = {model.__name__: model for model in _classes(RunConfig)}
    for name in EXAMPLES:
        owner, _, field = name.partition(".")
        assert owner in classes and (not field or field in classes[owner].model_fields), name


def test_what_others_call_it_is_a_field_of_ours() -> None:
    known = places(RunConfig)
    for name, place in OTHERS_NAMES.items():
        assert place in known[place.rpartition(".")[2]], place
        assert name not in known, name
        assert right_place(RunConfig, [name]) == place


def test_a_name_that_many_have_is_not_guessed_and_another_file_has_other_fields() -> None:
    assert right_place(RunConfig, ["kind"]) is None
    assert right_place(RunConfig, ["nothing_like_it"]) is None
    assert right_place(Suite, ["num_hidden_layers"]) is None
