"""Where SSMax's s begin when a run file leaves that out: the first stage's mean factor is 1."""

import math
from pathlib import Path

import pytest

from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.config import RunConfig, dump, dump_yaml, load, parse, parse_json
from megahybrid.config.score_scale import SsmaxScale
from tests.config.example import example

GLOBAL = "model.layer_plan.schemes.global"
SSMAX = f"{GLOBAL}.score_scale={{kind: ssmax}}"


def start(run: RunConfig, scheme: str = "global") -> float | None:
    scale = run.model.layer_plan.schemes[scheme].score_scale
    assert isinstance(scale, SsmaxScale)
    return scale.initial


@pytest.mark.parametrize(
    ("lengths", "window"),
    [({64: 1}, None), ({256: 3, 1024: 1}, None), ({256: 1}, 16), ({16: 1}, 256)],
)
def test_the_mean_factor_of_the_first_stage_is_one(
    lengths: dict[int, int], window: int | None
) -> None:
    run = example(
        SSMAX,
        f"{GLOBAL}.window={'null' if window is None else window}",
        f"stages.0.lengths={lengths}",
    )
    seen = [
        min(position + 1, window or length)
        for length, ratio in lengths.items()
        for position in list(range(length)) * ratio
    ]
    found = start(run)
    assert found is not None
    assert found * math.fsum(map(math.log, seen)) / len(seen) == pytest.approx(1, rel=1e-5)


def test_its_values_are_these_and_later_stages_have_no_part() -> None:
    assert start(example(SSMAX, "stages.0.lengths={1024: 1}")) == 0.168471
    assert start(example(SSMAX, "stages.0.lengths={8192: 1}")) == 0.124819
    run = example(SSMAX, "stages.0.lengths={1024: 1}", "stages.1.lengths={8192: 1}")
    assert start(run) == 0.168471


def test_a_query_that_sees_itself_alone_begins_at_one() -> None:
    assert start(example(SSMAX, f"{GLOBAL}.window=1")) == 1.0


def test_what_is_written_stays_and_what_was_written_out_is_read_again(tmp_path: Path) -> None:
    assert start(example(f"{GLOBAL}.score_scale={{kind: ssmax, initial: 0.43}}")) == 0.43
    run = example(SSMAX)
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    assert load(tmp_path / "config.yaml") == run == parse(RunConfig, dump(run))
    assert parse_json(RunConfig, run.model_dump_json()) == run
    longer = load(tmp_path / "config.yaml", ["stages.0.lengths={4096: 1}"])
    assert start(longer) == start(run)


def test_the_start_makes_no_other_model_and_a_run_without_ssmax_stays_as_it_is() -> None:
    other = example(f"{GLOBAL}.score_scale={{kind: ssmax, initial: 0.43}}")
    assert model_fingerprint(example(SSMAX).model) == model_fingerprint(other.model)
    assert "initial" not in str(dump(example())["model"]["layer_plan"])


@pytest.mark.parametrize("form", ["file", "field", "scheme"])
def test_under_its_old_word_it_begins_where_it_did(form: str, tmp_path: Path) -> None:
    """Who began a run with 0.1.0 goes on with the same file and the same command."""
    plan = dump(example())
    overrides = {
        "file": [],
        "field": [f"{GLOBAL}.logit_scale={{kind: ssmax}}"],
        "scheme": [f"{GLOBAL}={{position: {{kind: nope}}, logit_scale: {{kind: ssmax}}}}"],
    }[form]
    if form == "file":
        scheme = plan["model"]["layer_plan"]["schemes"]["global"]
        del scheme["score_scale"]
        scheme["logit_scale"] = {"kind": "ssmax"}
    (tmp_path / "run.yaml").write_text(
        str(plan).replace("None", "null").replace("True", "true").replace("False", "false")
    )
    run = load(tmp_path / "run.yaml", overrides, tell=lambda line: None)
    assert start(run) == 0.43
