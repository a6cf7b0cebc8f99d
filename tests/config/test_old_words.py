"""The word that a scheme's score scale had: read wherever it was written, with one line that names
the new one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megahybrid.cli import main
from megahybrid.config import dump, dump_yaml, load, parse, parse_json
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.old_words import first_words, tell_once
from megahybrid.config.run import RunConfig
from megahybrid.config.score_scale import LogScale
from megahybrid.errors import ConfigError
from tests.config.example import EXAMPLE, example

LOG = {"kind": "log", "base": 8.0}
SCHEME = "model.layer_plan.schemes.global"
NEW = [f"{SCHEME}.score_scale={{kind: log, base: 8.0}}"]


@pytest.fixture(autouse=True)
def nothing_told_yet() -> Iterator[None]:
    """A line is told once in a process, and tests share one."""
    tell_once.cache_clear()
    yield
    tell_once.cache_clear()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(dump_yaml(example()))
    return tmp_path / "run.yaml"


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "override",
    [
        f"{SCHEME}.logit_scale={{kind: log, base: 8.0}}",
        f"{SCHEME}={{position: {{kind: nope}}, logit_scale: {{kind: log, base: 8.0}}}}",
        "stages.0.schemes.global.logit_scale={kind: log, base: 8.0}",
        "stages.0.schemes={global: {logit_scale: {kind: log, base: 8.0}}}",
    ],
    ids=["field", "scheme", "stage-field", "stage-schemes"],
)
def test_an_override_may_use_it(
    override: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = override.replace("logit_scale", "score_scale")
    assert load(run_file, [override]) == load(run_file, [new])
    (line,) = told(capsys)
    assert "logit_scale is called score_scale now" in line and "model.logit_scale" not in line


def test_files_may_use_it_beside_files_with_the_new_word(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older file goes on changing what a newer one says, and the other way about."""
    folder = run_file.parent
    change = "model: {layer_plan: {schemes: {global: {%s: {kind: llama4, %s}}}}}\n"
    old = written(folder / "old.yaml", f"include: run.yaml\n{change % ('logit_scale', 'floor: 9')}")
    both = written(
        folder / "both.yaml",
        f"include: old.yaml\n{change % ('score_scale', 'coefficient: 0.5')}",
    )
    scale = load(both).model.layer_plan.schemes["global"].score_scale
    assert dump(scale) == {"kind": "llama4", "floor": 9, "coefficient": 0.5, "offset": 1}
    load(old)
    (line,) = told(capsys)
    assert line.startswith(f"megahybrid: {old}: ") and "score_scale" in line
    changed = load(both, [f"{SCHEME}.logit_scale.floor=7"])
    assert dump(changed.model.layer_plan.schemes["global"].score_scale)["floor"] == 7
    assert len(told(capsys)) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{SCHEME}={{position: {{kind: nope}}, logit_scale: {LOG}, score_scale: {LOG}}}"],
        [f"{SCHEME}.logit_scale={LOG}", *NEW],
        [f"{SCHEME}.logit_scale.base=3.0", *NEW],
        ["stages.0.schemes.global.logit_scale={}", "stages.0.schemes.global.score_scale={}"],
        [f"stages.0.schemes={{global: {{score_scale: {LOG}, logit_scale: {LOG}}}}}"],
    ],
)
def test_both_words_are_refused(
    overrides: list[str], run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(run_file), *(o.replace("'", "") for o in overrides)]) == 2
    (line,) = told(capsys)
    assert "logit_scale" in line and "score_scale" in line and "Give" in line


def test_a_file_with_both_words_is_refused(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "stages: [{schemes: {local: {logit_scale: {kind: fixed}, score_scale: {kind: fixed}}}}]"
    assert main(["check", str(written(run_file.parent / "both.yaml", text))]) == 2
    (line,) = told(capsys)
    assert "stages.0.schemes.local.logit_scale stands beside score_scale" in line


def test_the_factor_on_a_models_logits_keeps_its_name(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(run_file, ["model.logit_scale=0.25"]).model.logit_scale == 0.25
    assert told(capsys) == []


def stored(word: str) -> dict[str, Any]:
    """What a manifest holds of a run: every field, and a stage's changes as they were written."""
    plain = dump(example(*NEW, "stages.1.schemes={global: {score_scale: {kind: sqrt_dim}}}"))
    return first_words(plain) if word == "logit_scale" else plain


def test_a_stored_config_is_read_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    old, new = stored("logit_scale"), stored("score_scale")
    assert "score_scale" not in json.dumps(old) and "logit_scale" in json.dumps(old["stages"])
    assert parse_json(RunConfig, json.dumps(old)) == parse(RunConfig, new)
    assert told(capsys) == []


def test_words_of_the_first_version_are_made_of_those_of_today() -> None:
    assert first_words(first_words(dump(example(*NEW)))) == first_words(dump(example(*NEW)))
    assert first_words(EXAMPLE) == EXAMPLE


def test_a_scheme_is_changed_by_either_word() -> None:
    scheme = AttentionScheme.model_validate({"position": {"kind": "nope"}, "logit_scale": LOG})
    assert scheme.score_scale == LogScale(kind="log", base=8.0)
    assert scheme.with_overrides({"logit_scale": {"base": 3.0}}, "x").score_scale == LogScale(
        kind="log", base=3.0
    )
    with pytest.raises(ConfigError, match=r"^x\.logit_scale stands beside score_scale"):
        scheme.with_overrides({"logit_scale": LOG, "score_scale": LOG}, "x")


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"SLURM_PROCID": "3"}])
def test_other_ranks_tell_nothing(environment: dict[str, str]) -> None:
    from megahybrid.commands.train import _teller

    assert _teller({}) is tell_once and _teller({"RANK": "0"}) is tell_once
    assert _teller(environment) is not tell_once
    assert _teller({"RANK": "0", "MEGAHYBRID_LOCAL_LAUNCH": "7"}) is not tell_once
