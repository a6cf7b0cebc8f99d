from pathlib import Path

import pytest

from megahybrid.config import load
from megahybrid.config.suite import RULER_TASKS, RulerTask, Suite

FOLDER = Path(__file__).parents[2] / "configs" / "suites"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_suite_can_be_read(file: Path) -> None:
    assert load(file, type=Suite).tasks


def test_ruler_ships_all_tasks_that_need_no_passages() -> None:
    task = load(FOLDER / "ruler.yaml", type=Suite).tasks["ruler"]
    assert isinstance(task, RulerTask)
    assert tuple(task.tasks) == RULER_TASKS[:11]
