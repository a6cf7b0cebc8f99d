"""evaluate and analyse with each text shared among ranks, against one process."""

import json
from pathlib import Path

import pytest

from tests.train.forked import Nursery, Ranks
from tests.train.test_tensor_ranks import COMMANDS, alike, words
from tests.train.text_run import Trained, call, refused

__all__ = ["words"]  # a fixture

DEGREES = {"context3": (3, ["--context", "3"]), "both": (4, ["--context", "2", "--tensor", "2"])}
LOOKS = {name: command for name, command in COMMANDS.items() if name != "sample"} | {
    "beyond": ["evaluate", "--beyond", "--max-tokens", "600", "--json"]
}


@pytest.mark.parametrize("layout", DEGREES)
@pytest.mark.parametrize("name", LOOKS)
def test_ranks_tell_once_what_one_process_tells(
    nursery: Nursery,
    trained: Trained,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    layout: str,
) -> None:
    monkeypatch.chdir(words)
    command, *rest = LOOKS[name]
    single = call(capsys, command, trained.run, *rest)
    world_size, options = DEGREES[layout]
    ranks = Ranks(nursery, [command, str(trained.run), *rest, *options], world_size, words)
    assert ranks.wait() == [0] * world_size, ranks.text()
    first, *others = (path.read_text() for path in ranks.outputs)
    assert others == [""] * (world_size - 1)
    alike(json.loads(first), json.loads(single))


def test_the_number_of_ranks_is_that_of_both_options(
    nursery: Nursery, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(trained.run), "--context", "2", "--tensor", "2"]
    ranks = Ranks(nursery, command, 2, tmp_path)
    assert ranks.wait() == [2, 2]
    assert (
        "--tensor=2 times --context=2 is not the number of ranks that torchrun has started (2). "
        "Use degrees of which the product is 2, or start 4." in ranks.text()
    )
    wrong = refused(capsys, "analyse", trained.run, "--context", "0")
    assert "--context=0 is no number of ranks. Use 1 or more." in wrong
