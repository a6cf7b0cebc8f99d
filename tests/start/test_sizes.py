"""Every size of `megahybrid init` on a machine that carries it, without a text of that size."""

from dataclasses import replace
from pathlib import Path

import pytest

from megahybrid.commands.init_file import run_file
from megahybrid.commands.init_machine import Machine
from megahybrid.commands.init_recipe import SIZES, recipe
from megahybrid.commands.init_texts import Texts
from megahybrid.config import RunConfig, check_run, parse
from megahybrid.config.counting import parameters
from megahybrid.config.memory_estimate import memory_per_rank
from megahybrid.config.yaml_file import parse_yaml
from megahybrid.errors import ConfigError

WEB = Texts(
    files=10_000,
    bytes=10**12,
    documents=2 * 10**8,
    characters=10**12,
    scripts={"Latin": 1.0},
    lengths=(100, 5000, 10**6),
    signs=200,
    words=10**6,
    whole=False,
    held_out=None,
)
NODE = Machine("cuda", 8, 80 * 2**30, 64)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_fits_by_the_formulas_of_describe_and_its_file_says_the_same(size: str) -> None:
    found = recipe("web", Path("mine"), WEB, NODE, size=size, plan="rnope_swa", lengths=None)
    run = parse(RunConfig, parse_yaml(run_file("web", "mine", WEB, NODE, found), "run.yaml"))
    assert run == found.run
    check_run(run, NODE.ranks)
    words = size.replace("tiny", "2m").replace("b", "000m").removesuffix("m")
    assert 0.9 < parameters(run.model) / (int(words) * 10**6) < 1.3
    assert found.tokens == pytest.approx(20 * found.parameters, rel=0.02)
    for stage in run.stages:
        memory = memory_per_rank(
            run.model,
            stage,
            tensor=1,
            data_degree=8,
            zero_stage=run.parallel.zero_stage,
            precision="bf16",
        )
        assert memory.total <= NODE.room


def test_without_a_size_the_largest_that_text_and_machine_carry() -> None:
    def chosen(texts: Texts, machine: Machine) -> str:
        return recipe(
            "web", Path("mine"), texts, machine, size=None, plan="rope", lengths=None
        ).size

    assert chosen(WEB, NODE) == "8b"
    assert chosen(replace(WEB, characters=10**9, documents=1), NODE) == "150m"
    assert chosen(WEB, Machine("cuda", 1, 48 * 2**30, 8)) == "1b"
    assert chosen(WEB, Machine("cuda", 1, 24 * 2**30, 8)) == "150m"
    assert chosen(WEB, Machine("cpu", 1, 24 * 2**30, 8)) == "tiny"


def test_a_large_model_on_a_laptop_is_refused_with_the_sizes_that_are_smaller() -> None:
    laptop = Machine("cpu", 1, 8 * 2**30, 4)
    with pytest.raises(ConfigError, match=r"^--size=1b takes .* GiB a rank .* \(80 % of 4 CPU"):
        recipe("web", Path("mine"), WEB, laptop, size="1b", plan="rope", lengths=None)
