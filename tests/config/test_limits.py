"""What is too large is refused at once, with the limit and its reason."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megahybrid.cli import main
from megahybrid.config import RunConfig, check_run, load, memory_estimate
from megahybrid.config.base import dump
from megahybrid.config.describe import describe
from megahybrid.config.parsing import parse
from megahybrid.config.site import Site
from megahybrid.config.study import Study
from megahybrid.config.suite import Suite
from megahybrid.config.summary import summary
from megahybrid.errors import ConfigError, MegahybridError

DEMO = Path(__file__).parents[2] / "configs/runs/demo.yaml"
SECONDS = 10.0  # of processor time; a shared machine is slow at times

REFUSED = {
    "model.layer_plan.num_layers=1_000_000_000": "model.layer_plan.num_layers=1000000000 is more "
    "than 10,000 (each layer is listed and counted). Use less.",
    "model.num_kv_heads=1_000_000_000": "model.num_kv_heads=1000000000 is more than 65,536 (every "
    "degree that divides them is tried). Use less.",
    "model.hidden_size=100_000_000": "model.hidden_size=100000000 is more than 16,777,216 (one "
    "matrix of that width fills a device). Use less.",
    "model.vocab_size=3_000_000_000": "model.vocab_size=3000000000 is more than 2,147,483,647 "
    "(token files hold ids of 32 bits). Use less.",
    "stages.0.tokens=1_000_000_000_000_000_001": "stages.0.tokens=1000000000000000001 is more than "
    "1,000,000,000,000,000,000 (tokens are counted in 64 bits). Use less.",
    "stages.0.lengths={3_000_000_000: 1}": "stages.0.lengths has the key '3000000000', which is "
    "more than 2,147,483,647 (kernels count positions in 32 bits). Use less.",
    "stages.0.batch_tokens={start: 1, end: 1_000_000_001, increment: 1, over_tokens: 9}": "stages."
    "0.batch_tokens.increment=1 makes 1,000,000,000 levels, more than 10,000 (each is kept and "
    "searched). Raise it.",
    "stages.0.micro_batch_tokens=3_000_000_000": "stages.0.micro_batch_tokens=3000000000 is more "
    "than 2,147,483,647 (kernels count the tokens of a pass in 32 bits). Use less.",
    "data.lanes=1_000_000_000": "data.lanes=1000000000 is more than 1,000,000 (checkpoints hold a "
    "cursor for each). Use less.",
    f"checkpoint.every_steps={9**40}": "checkpoint.every_steps=147808829414345923316083210206383297"
    "601 has more than 64 bits (127). Write a smaller number.",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_size_beyond_its_limit_is_refused_with_the_reason(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(DEMO, [override])
    assert str(refused.value).splitlines()[0] == REFUSED[override]


def test_a_plan_with_too_many_stages_names_their_number(tmp_path: Path) -> None:
    stage = dump(load(DEMO))["stages"][0]
    plain = dump(load(DEMO)) | {"stages": [stage] * 201}
    with pytest.raises(ConfigError, match="stages has 201 entries, more than 200"):
        parse(RunConfig, plain)


def _numbers(plain: Any, path: str = "") -> list[tuple[str, type]]:
    """The dotted path and the type of every number."""
    if isinstance(plain, dict | list):
        items = plain.items() if isinstance(plain, dict) else enumerate(plain)
        return [found for key, item in items for found in _numbers(item, f"{path}.{key}")]
    return [(path[1:], type(plain))] if type(plain) in (int, float) else []


HUGE = {int: ("1_000_000_000", str(2**63)), float: ("1.0e308", "1.0e-308")}


def test_every_number_of_a_run_file_may_be_anything() -> None:
    """Refused in one line or computed, and in seconds: nothing is walked through or overflows."""
    for dotted, kind in _numbers(dump(load(DEMO))):
        for value in HUGE[kind]:
            began = time.process_time()
            try:
                run = load(DEMO, [f"{dotted}={value}"])
                check_run(run, 8 * run.parallel.tensor)
                summary(run, 8 * run.parallel.tensor)
                describe(run, 8 * run.parallel.tensor)
            except MegahybridError as error:
                assert all(len(line) < 2000 for line in str(error).splitlines())
            except Exception as error:
                pytest.fail(f"{dotted}={value}: {error!r}")
            assert time.process_time() - began < SECONDS, f"{dotted}={value}"


def test_ten_thousand_layers_are_described_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    assert main(["describe", str(DEMO), "--json", "model.layer_plan.num_layers=10_000"]) == 0
    assert time.process_time() - began < SECONDS
    assert capsys.readouterr().out.count('"layer":') == 10_000


def test_a_budget_is_solved_for_a_thousand_layers_and_refused_for_more() -> None:
    began = time.process_time()
    overrides = ["model.layer_plan.num_layers=1_000", "stages.0.recompute={budget_gib: 3}"]
    describe(load(DEMO, overrides))
    assert time.process_time() - began < SECONDS
    with pytest.raises(ConfigError, match="solved for 1,000 layers at most"):
        check_run(load(DEMO, [*overrides, "model.layer_plan.num_layers=1_004"]), 2)


def test_memory_of_many_layers_is_that_of_a_plain_sum() -> None:
    """Layer by layer, as the formulas are written; those themselves are held by measurements."""
    run, draw = load(DEMO, ["model.layer_plan.num_layers=12"]), random.Random(1)
    tokens = run.stages[0].micro_batch_tokens
    # Without a loss that would hide the layers.
    model = run.model.model_copy(update={"vocab_size": 8})
    for device in ("cpu", "cuda"):
        for _ in range(50):
            policies = [draw.choice(memory_estimate.POLICIES) for _ in range(12)]
            kept = [
                memory_estimate.activation_bytes_per_token(model, one, 2, device) * tokens
                for one in policies
            ]
            most = max(
                memory_estimate._one_backward(model, one, tokens, 1, 2, device)
                - sum(kept[layer + 1 :])
                for layer, one in enumerate(policies)
            )
            batch = memory_estimate.MicroBatch(model, tokens, 1, "bf16", device)
            head = 2 * model.vocab_size * model.hidden_size * model.tie_embeddings
            assert batch.activations(policies) == sum(kept)
            assert batch.working(policies) == max(batch._loss, head + most)


OTHERS: list[tuple[type[BaseModel], str, str]] = [
    (
        Suite,
        "tasks: {a: {kind: needle, lengths: [64, 128], trials: 1_000_000}}",
        "tasks.a.trials=1000000 asks 10,000,000 questions over all lengths, more than 1,000,000 "
        "(each is drawn and answered). Lower it, or name fewer lengths.",
    ),
    (
        Suite,
        "tasks: {a: {kind: recall, lengths: [64], trials: 1, pairs: 10_000_000_000}}",
        "tasks.a.pairs=10000000000 is more than 2,147,483,647 (kernels count positions in 32 "
        "bits). Use less.",
    ),
    (
        Suite,
        "tasks: {a: {kind: needle, lengths: [64], needles: 1_000_000}}",
        "tasks.a.needles=1000000 is more than 100,000 (each is a sentence that is drawn). Use "
        "less.",
    ),
    (
        Site,
        "{name: a, time_limit: '1', gpus_per_node: 1_000_000}",
        "gpus_per_node=1000000 is more than 4,096 (each rank of a node is a process). Use less.",
    ),
    (
        Site,
        f"{{name: a, time_limit: '{'9' * 5000}', gpus_per_node: 0}}",
        f"time_limit={'9' * 57}... is not a time limit (minutes, H:MM:SS or D-HH:MM:SS). Change "
        "it.",
    ),
    (
        Study,
        "{hypothesis: a, pass_rule: a, run: a, suite: a, variants: {a: [], b: []}, "
        f"seeds: {[*range(6000)]}}}",
        "the file.seeds has 6,000 entries for 2 variants: 12,000 runs, more than 10,000 (each is "
        "trained). Name fewer.",
    ),
    (
        Study,
        "{hypothesis: a, pass_rule: a, run: a, suite: a, variants: {a: []}, seeds: [1], "
        "data: {a: {kind: recall, length: 99, rows: 10_000_000_000}}}",
        "data.a.rows=10000000000 is more than 1,000,000,000 (each is drawn and written). Use less.",
    ),
]


@pytest.mark.parametrize(("kind", "text", "line"), OTHERS)
def test_suites_studies_and_sites_have_limits_too(
    kind: type[BaseModel], text: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / "given.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "given.yaml", type=kind)
    assert str(refused.value) == line.removeprefix("the file.")


def test_more_overrides_than_anybody_types_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="10,000 overrides are more than the 1,000"):
        load(DEMO, [f"seed={n}" for n in range(10_000)])


def test_a_number_of_ranks_beyond_counting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(DEMO), "--world-size", "9" * 400]) == 2
    assert "is no number of ranks. Use 10,000,000 or fewer." in capsys.readouterr().err


def _unread(tmp_path: Path, name: str) -> Path:
    """One of the files that are no run file."""
    path = tmp_path / name
    match name:
        case "large.yaml":
            with open(path, "w") as file:
                file.truncate(100_000_000)
        case "pipe.yaml":
            os.mkfifo(path)
        case "doubling.yaml":
            for level in range(30):
                below = f"{level + 1}.yaml" if level < 29 else "end.yaml"
                (tmp_path / f"{level}.yaml").write_text(f"include: [{below}, {below}]\nseed: 1\n")
            (tmp_path / "end.yaml").write_text("seed: 1\n")
            path.write_text("include: 0.yaml\n")
        case "chain.yaml":
            for level in range(200):
                (tmp_path / f"c{level}.yaml").write_text(f"include: c{level + 1}.yaml\n")
            path.write_text("include: c0.yaml\n")
        case "merging.yaml":
            lines = ["a0: &a0 {x: 1}"]
            lines += [f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
            path.write_text("\n".join(lines))
        case "many.yaml":
            path.write_text("".join(f"secret{n}: 1\n" for n in range(4000)))
        case _:
            return Path(f"/dev/{name}")
    return path


UNREAD = {
    "zero": "/dev/zero is a device, not a plain file. Name a file.",
    "null": "/dev/null is a device, not a plain file. Name a file.",
    "large.yaml": "large.yaml has 100,000,000 bytes, more than the 131,072 that are read of such a "
    "file. Name another, or shorten it.",
    "pipe.yaml": "pipe.yaml is a pipe, not a plain file. Name a file.",
    "doubling.yaml": "doubling.yaml includes more than 100 files, each counted where it is "
    "included. Include fewer.",
    "chain.yaml": "chain.yaml includes more than 100 files, each counted where it is included. "
    "Include fewer.",
    "merging.yaml": "merging.yaml line 28: merge keys (<<) stand for more than 20000 values. Write "
    "the values out.",
    "many.yaml": "and 3,995 more keys are not fields. Remove them.",
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_file_without_an_end_is_not_read(name: str, tmp_path: Path) -> None:
    path = _unread(tmp_path, name)
    began = time.process_time()
    with pytest.raises(ConfigError) as refused:
        load(path)
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(refused.value).splitlines()]
    assert UNREAD[name] in lines
    assert time.process_time() - began < SECONDS


SECRET = "root:x:0:0:root:/root:/bin/bash " * 20


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"- {SECRET}",
        f"'{SECRET}': 1",
        f"seed: '{SECRET}'",
        f"include: {{'{SECRET}': 1}}",
        f"'{SECRET}': 1\n'{SECRET}': 2",
        f"a: !<{SECRET.replace(' ', '')}> 1",
        f"model: {{layer_plan: {{pattern: ['{SECRET}']}}}}",
        f"stages: [{{name: '{SECRET}'}}]",
        "\n".join(f"user{n}: '{SECRET}'" for n in range(40)),
    ],
)
def test_little_of_a_file_that_is_not_ours_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text(text)
    (tmp_path / "run.yaml").write_text("include: [passwd]\n")
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "run.yaml")
    for line in str(refused.value).splitlines():
        assert len(line.replace(str(tmp_path), "")) < 300, line
        assert SECRET[:90] not in line
    assert len(str(refused.value).splitlines()) < 30


def test_text_of_a_file_steers_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text('"\\e]0;owned\\a\\u202e": 1\nseed: "\\e[2J"\n')
    assert main(["check", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07\\u202e is not a field." in told
    assert "seed=\\x1b[2J is not an integer" in told
    assert all(line.isprintable() for line in told.splitlines())
