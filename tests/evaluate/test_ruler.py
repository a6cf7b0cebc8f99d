"""RULER's tasks: prompts hold what is asked, fit the length, and are scored by what is written."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.config import parse
from megahybrid.config.suite import RULER_TASKS, RulerTask, Suite
from megahybrid.errors import ConfigError, DataError
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.ruler import RulerMaker, generated_tokens, matches
from megahybrid.evaluate.suite import example_draw, run_suite
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.evaluate.characters import VOCAB, Characters, material
from tests.parity import cases

TEXT = Characters().decode


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    items = [
        {
            "question": f"Who made lamp {n}?",
            "answers": [f"Maker{n}"],
            "passages": [f"Maker{n} made lamp {n}."],
        }
        for n in range(30)
    ]
    path = tmp_path / "passages.json"
    path.write_text(json.dumps(items))
    return path


def maker(passages: Path, **fields: Any) -> RulerMaker:
    names = {"qa_1": str(passages), "qa_2": str(passages)}
    plain = {"kind": "ruler", "tasks": list(RULER_TASKS), "lengths": [8], "passages": names}
    return RulerMaker(parse(RulerTask, plain | fields), material())


@pytest.mark.parametrize("name", RULER_TASKS)
@pytest.mark.parametrize("length", [1000, 3000])
def test_prompt_and_generation_fit_the_length_and_fill_it(
    name: str, length: int, passages: Path
) -> None:
    made = maker(passages)
    for trial in range(2):
        one = made.make(name, length, example_draw(1, name, trial))
        used = len(one.prompt) + generated_tokens(name, length)
        assert used <= length
        if name.startswith("niah"):
            assert used == length
        else:
            assert used > 0.85 * length
        prompt = TEXT(one.prompt)
        references = one.references
        assert all(reference.lower() in prompt.lower() for reference in references)
        assert matches(name, references, TEXT(one.expected)) == 1


def text(made: RulerMaker, name: str, length: int = 2500) -> tuple[str, Example]:
    one = made.make(name, length, example_draw(3, name))
    return TEXT(one.prompt), one


def test_variables_are_a_chain_in_order(passages: Path) -> None:
    prompt, one = text(maker(passages), "vt")
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
        values[name] = values.get(value, value)
    asked = re.search(r"whose value is (\d+)", prompt)
    assert asked and set(one.references) == {n for n, v in values.items() if v == asked[1]}
    assert len(one.references) == 5


def test_common_and_frequent_words_are_the_most_common(passages: Path) -> None:
    made = maker(passages)
    prompt, one = text(made, "cwe")
    counted = Counter(re.findall(r"\d+\. (\S+)", prompt)).most_common(11)
    assert {word for word, _ in counted[:10]} == set(one.references)
    assert counted[9][1] > counted[10][1]
    prompt, one = text(made, "fwe")
    ranked = Counter(re.findall(r"\b[a-z]{6}\b", prompt.split("\n")[1])).most_common(4)
    assert tuple(word for word, _ in ranked[:3]) == one.references
    assert ranked[2][1] > ranked[3][1]


def test_needles_have_the_kinds_of_the_paper(passages: Path) -> None:
    made = maker(passages)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, text(made, "niah_single_3")[1].references[0])
    hidden = re.findall(rf"for {uuid} is: ({uuid})", text(made, "niah_multikey_3")[0])
    assert len(hidden) > 8 and len(set(hidden)) == len(hidden)
    assert len(text(made, "niah_multivalue")[1].references) == 4
    assert len(text(made, "niah_multiquery")[1].needles) == 4


def test_score_is_the_share_of_references_and_any_answer_for_questions() -> None:
    assert matches("niah_multivalue", ("12", "34"), "it is 12.") == 0.5
    assert matches("qa_1", ("Paris", "paris city"), "PARIS") == 1
    assert matches("qa_2", ("Rome",), "") == 0


def test_questions_need_their_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="passages names no file for qa_1"):
        parse(RulerTask, {"kind": "ruler", "tasks": ["qa_1"], "lengths": [500]})
    (tmp_path / "bad.json").write_text('[{"question": "Who?"}]')
    with pytest.raises(DataError, match="is not a list of question, answers, passages"):
        maker(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="lengths=100 is too short for RULER's cwe"):
        plain = {"kind": "ruler", "tasks": ["cwe"], "lengths": [100]}
        RulerMaker(parse(RulerTask, plain), material()).make("cwe", 100, example_draw(1, "x"))


def test_ruler_runs_on_a_model_and_says_how_sure_it_is(passages: Path) -> None:
    model = Transformer(cases.model("rnope_swa", vocab_size=VOCAB), ParallelMesh.single())
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = {
        "kind": "ruler",
        "tasks": ["niah_single_1", "qa_1"],
        "lengths": [300],
        "trials": 2,
        "passages": {"qa_1": str(passages)},
    }
    result = run_suite(model, parse(Suite, {"tasks": {"ruler": plain}}), material())
    rows = result["tasks"]["ruler"]["rows"]
    assert [(row["task"], row["length"], row["trials"]) for row in rows] == [
        ("niah_single_1", 300, 2),
        ("qa_1", 300, 2),
    ]
    assert all(row["score"] == 0 and row["standard_error"] == 0 for row in rows)
