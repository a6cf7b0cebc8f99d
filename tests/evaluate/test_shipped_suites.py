"""Suites that are shipped can be read, and hold what they say."""

import json
from pathlib import Path

import pytest

from megahybrid.config import load
from megahybrid.config.suite import RULER_TASKS, RulerTask, Suite, load_suite
from megahybrid.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "configs" / "suites"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_suite_can_be_read(file: Path) -> None:
    assert load(file, type=Suite).tasks


def test_a_misspelt_suite_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"chta does not exist.*Did you mean 'chat'\?"):
        load_suite("chta")


def test_ruler_ships_all_thirteen_tasks_with_questions_that_their_passages_answer() -> None:
    task = load(FOLDER / "ruler.yaml", type=Suite).tasks["ruler"]
    assert isinstance(task, RulerTask)
    assert tuple(task.tasks) == RULER_TASKS
    for name, needed in (("one", 1), ("two", 2)):
        assert f"configs/suites/questions_{name}.json" in task.passages.values()
        items = json.loads((FOLDER / f"questions_{name}.json").read_text())
        passages = [text for item in items for text in item["passages"]]
        assert len(set(passages)) == len(passages) >= 24
        for item in items:
            (answer,) = item["answers"]
            assert len(item["passages"]) == needed
            # Only the question's own passages hold its answer together with what it asks about.
            assert answer in item["passages"][-1]
            asked = item["question"].split(" of ")[-1].rstrip("?")
            assert asked in item["passages"][0]
