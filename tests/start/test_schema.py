"""The schema of run files: what is shipped keeps to it, and what is wrong does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from megahybrid.cli import main
from megahybrid.config.schema import FILES, schema, schema_text
from megahybrid.config.yaml_file import parse_yaml
from tests.start.json_schema import faults

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
KINDS = {"suites": "suite", "sites": "site"}
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if "lm_eval" not in path.parts)
STUDIES = sorted((ROOT / "experiments").rglob("*.yaml"))


def kind_of(path: Path) -> str:
    if path in STUDIES:
        return {"study": "study", "run": "run"}.get(path.stem, "suite")
    return KINDS.get(path.relative_to(CONFIGS).parts[0], "run")


def as_an_editor(value: Any) -> Any:
    """A value as JSON has it: keys are text."""
    return json.loads(json.dumps(value))


def wrong(kind: str, value: Any) -> list[str]:
    root = schema(kind)
    return list(faults(root, value, root))


@pytest.mark.parametrize("kind", FILES)
def test_the_shipped_schema_is_what_the_classes_say(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m megahybrid.config.schema` writes them."""
    assert (CONFIGS / f"schema/{kind}.json").read_text(encoding="utf-8") == schema_text(kind)
    assert main(["schema", kind]) == 0
    assert capsys.readouterr().out == schema_text(kind)


@pytest.mark.parametrize("path", [*SHIPPED, *STUDIES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_names_its_schema_and_keeps_to_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head, _, named = text.splitlines()[0].partition("$schema=")
    assert head == "# yaml-language-server: "
    assert (path.parent / named).resolve() == CONFIGS / f"schema/{kind_of(path)}.json"
    assert wrong(kind_of(path), as_an_editor(parse_yaml(text, path.name))) == []


WRONG = (
    "modle: {}",
    "model: {num_layers: 8}",
    "model: {vocab_size: many}",
    "model: {layer_plan: {schemes: {a: {position: {kind: rop}}}}}",
    "stages: {name: a}",
    "stages: [{lengths: {256: many}}]",
    "stages: [{tokens: 8e5.1}]",
    "precision: fp16",
    "parallel: {tensor: 0}",
)


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_marked(text: str) -> None:
    assert wrong("run", as_an_editor(parse_yaml(text, "f.yaml")))


def test_a_number_may_have_underscores_that_an_editor_reads_as_text() -> None:
    value = {"stages": [{"tokens": "800_000", "lengths": {"256": 1}, "batch_tokens": 4096}]}
    assert wrong("run", value) == []
