"""`pkg:` paths mean megahybrid's own configs, from whatever folder a command is given."""

from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.config import load
from megahybrid.config.packaged import beside, located, names
from megahybrid.config.site import load_site
from megahybrid.config.suite import load_suite
from megahybrid.errors import MegahybridError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("megahybrid: ").rstrip("\n")


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs/runs").glob("*.yaml")])
def test_a_packaged_run_file_says_what_the_file_of_the_checkout_says(name: str) -> None:
    assert load(f"pkg:runs/{name}.yaml") == load(ROOT / f"configs/runs/{name}.yaml")


def test_a_run_file_anywhere_includes_packaged_files_beside_its_own(empty: Path) -> None:
    (empty / "own.yaml").write_text("seed: 4\n")
    (empty / "run.yaml").write_text(
        "include: [pkg:models/rnope_swa_tiny.yaml, pkg:data/demo.yaml, pkg:stages/demo.yaml,"
        " own.yaml]\n"
    )
    run = load("run.yaml", ["precision=fp32"])
    assert run.seed == 4 and run.model == load("pkg:runs/demo.yaml").model


def test_what_a_packaged_file_names_lies_beside_it() -> None:
    assert str(beside(Path("pkg:runs/demo.yaml"), "../data/x.yaml")) == "pkg:data/x.yaml"
    assert str(beside(Path("pkg:runs/demo.yaml"), "pkg:data/x.yaml")) == "pkg:data/x.yaml"
    assert str(beside(Path("pkg:runs/demo.yaml"), "/data/x.yaml")) == "/data/x.yaml"
    assert str(beside(Path("mine/run.yaml"), "pkg:data/x.yaml")) == "pkg:data/x.yaml"
    assert str(beside(Path("mine/run.yaml"), "../x.yaml")) == "mine/../x.yaml"
    with pytest.raises(MegahybridError, match="leaves megahybrid's own configs"):
        located(beside(Path("pkg:runs/demo.yaml"), "../../megahybrid/errors.py"))


@pytest.mark.parametrize(
    "path", ["pkg:../pyproject.toml", "pkg:runs/../../LICENSE", "pkg:/etc/hosts", "pkg://x"]
)
def test_a_packaged_path_does_not_leave_the_configs(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal("check", path, capsys=capsys)
    assert "leaves megahybrid's own configs" in said and "pkg:runs/demo.yaml" in said


def test_a_missing_packaged_file_is_answered_with_the_nearest_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal("check", "pkg:models/rnope_swa_150.yaml", capsys=capsys)
    assert said.startswith(
        "pkg:models/rnope_swa_150.yaml is none of megahybrid's own configs. "
        "Did you mean pkg:models/rnope_swa_150m.yaml"
    )
    said = refusal("check", "pkg:demo.yaml", capsys=capsys)
    assert "pkg:runs/demo.yaml" in said
    said = refusal("check", "pkg:" + "x" * 5000, capsys=capsys)
    assert "There is pkg:runs/demo.yaml" in said and len(said) < 500
    assert "is a folder" in refusal("check", "pkg:runs", capsys=capsys)
    (Path.cwd() / "run.yaml").write_text("include: [pkg:models/nope.yaml]\n")
    said = refusal("check", "run.yaml", capsys=capsys)
    assert said.endswith("(included by run.yaml)")
    said = refusal("study", "pkg:studies/none", capsys=capsys)
    assert said.startswith("pkg:studies/none/study.yaml is none of megahybrid's own configs")


def test_a_config_that_is_not_here_is_answered_with_the_packaged_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal("check", "configs/runs/demo.yaml", capsys=capsys)
    assert said == (
        "configs/runs/demo.yaml does not exist. Check the path, or use megahybrid's own: "
        "pkg:runs/demo.yaml."
    )


def test_a_site_is_that_of_the_working_directory_or_else_ours(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_site("cpu") == load_site("pkg:sites/cpu.yaml")
    assert load_site("cpu").ranks_per_node == 2
    sites = empty / "configs/sites"
    sites.mkdir(parents=True)
    (sites / "cpu.yaml").write_text('{name: mine, time_limit: "1:00:00", gpus_per_node: 4}\n')
    (sites / "other.yaml").write_text((sites / "cpu.yaml").read_text())
    assert load_site("cpu").name == "mine"
    assert load_site("example").name == "example"
    with pytest.raises(MegahybridError, match=r"there are: cpu, example, other\).*'cpu'"):
        load_site("cpuu")
    with pytest.raises(MegahybridError, match="no file of configs/sites"):
        load_site("../runs/demo")
    assert "no file of configs/sites" in refusal(
        *("check", "pkg:runs/demo.yaml", "--site", "nowhere", "--nodes", "1"), capsys=capsys
    )


def test_a_suite_is_that_of_the_working_directory_or_else_ours(empty: Path) -> None:
    own = load_suite("pkg:suites/needles.yaml")
    assert load_suite("needles") == load_suite("configs/suites/needles.yaml") == own
    suites = empty / "configs/suites"
    suites.mkdir(parents=True)
    (suites / "needles.yaml").write_text("tasks: {copy: {kind: copy, lengths: [16]}}\n")
    assert load_suite("needles") == load_suite("configs/suites/needles.yaml") != own
    assert load_suite("configs/suites/ruler.yaml") == load_suite("pkg:suites/ruler.yaml")
    with pytest.raises(MegahybridError, match="mine does not exist"):
        load_suite("mine")


def test_a_study_names_packaged_run_files_and_suites(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "study.yaml").write_text(
        "{hypothesis: h, pass_rule: p, run: 'pkg:runs/demo.yml', suite: 'pkg:suites/puzzles.yaml',"
        " variants: {one: []}, seeds: [1]}\n"
    )
    said = refusal("study", ".", "--out", "out", capsys=capsys)
    assert "pkg:runs/demo.yml is none of megahybrid's own" in said and "pkg:runs/demo.yaml" in said


def test_the_questions_of_a_packaged_suite_are_found() -> None:
    from megahybrid.config.suite import RulerTask
    from megahybrid.evaluate.ruler import _read_questions

    task = load_suite("pkg:suites/ruler.yaml").tasks["ruler"]
    assert isinstance(task, RulerTask)
    for name, file in task.passages.items():
        assert _read_questions(Path(file), name)


def test_every_config_of_the_checkout_is_packaged() -> None:
    files = (ROOT / "configs").rglob("*")
    known = {str(path.relative_to(ROOT / "configs")) for path in files if path.suffix != ".py"}
    assert {name for name in known if name.endswith((".yaml", ".json"))} == set(names())
