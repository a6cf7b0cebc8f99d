"""Every message a run file can cause, once, word for word."""

import pytest

from megahybrid.config import check_run
from megahybrid.errors import ConfigError
from tests.config.example import example
from tests.config.words import CHECKING, READING


@pytest.mark.parametrize(("override", "line"), READING, ids=[o[:50] for o, _ in READING])
def test_a_value_that_cannot_be_read_is_named_in_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        example(override)
    assert str(error.value).splitlines() == [line]


@pytest.mark.parametrize(("overrides", "line"), CHECKING, ids=[o[0][:50] for o, _ in CHECKING])
def test_parts_that_disagree_are_named_in_one_line(overrides: list[str], line: str) -> None:
    run = example(*overrides)
    with pytest.raises(ConfigError) as error:
        check_run(run, 4)
    lines = str(error.value).splitlines()
    assert line in lines
    assert len(lines) == 1 or overrides[0] in SEVERAL


# These disagree with several other values at once.
SEVERAL = (
    "parallel.tensor=3",
    "stages.1.batch_tokens=10240",
    "stages.0.lengths={257: 1}",
    "stages.1.micro_batch_tokens=5120",
)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        example("parallel.tensr=6", "model.eps=-1", "stages.1.tokens=x")
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(ConfigError) as error:
        check_run(example("model.intermediate_size=385", "data.block_tokens=2048"), 4)
    assert len(str(error.value).splitlines()) == 2


def test_the_example_itself_is_right() -> None:
    check_run(example())
    check_run(example(), 4)


def test_more_tensor_ranks_than_kv_heads_are_legal_when_heads_divide() -> None:
    check_run(example("parallel.tensor=8"), 8)
