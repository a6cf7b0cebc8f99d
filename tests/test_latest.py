"""`make test-latest` lifts our bounds, says what moved and broke, and decides nothing."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

PATH = Path(__file__).parent.parent / ".ci/latest"


@pytest.fixture(scope="module")
def latest() -> ModuleType:
    loader = SourceFileLoader("latest", str(PATH))
    module = module_from_spec(spec_from_loader("latest", loader))  # type: ignore[arg-type]
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


@pytest.mark.parametrize(
    ("said", "lifted"),
    [
        ("torch>=2.11,<2.14", "torch>=2.11"),
        ("deepspeed==0.19.8", "deepspeed>=0.19.8"),
        ("a[x,y]>=1,<2,!=1.5; python_version < '3.12'", "a[x,y]>=1,!=1.5; python_version < '3.12'"),
        ("ruamel.yaml>=0.18,<0.20", "ruamel.yaml>=0.18"),
        ("rich", "rich"),
    ],
)
def test_only_upper_bounds_are_lifted(said: str, lifted: str, latest: ModuleType) -> None:
    assert latest.lifted(said) == lifted


def test_nothing_that_we_ask_for_is_bounded_from_above_or_left_out(latest: ModuleType) -> None:
    lines = latest.needs(["dev", "data", "oracle"])
    assert lines[0].startswith("torch")
    needs = {need.name: need for need in map(Requirement, lines)}
    assert {"torch", "transformers", "deepspeed", "pytest", "pyarrow"} <= set(needs)
    assert all(b.operator in (">=", "!=") for need in needs.values() for b in need.specifier)


def test_what_moved_is_told_with_both_versions(tmp_path: Path, latest: ModuleType) -> None:
    (tmp_path / "tested.txt").write_text("# written\nruamel-yaml==0.19.1\nrich==15.0.0\n")
    lines = ["ruamel.yaml==0.20", "rich==15.0.0", "new_one==1", "torch==9", "nvidia-nccl-cu13==1"]
    assert latest.moved(lines, tmp_path / "tested.txt") == [
        "| new-one | – | 1 |",
        "| ruamel-yaml | 0.19.1 | 0.20 |",
    ]


def test_what_broke_is_named(tmp_path: Path, latest: ModuleType) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="1">'
        '<testcase classname="tests.a" name="fine"/>'
        '<testcase classname="tests.a" name="wrong"><failure message="1 is\nnot 2">x</failure>'
        '</testcase><testcase classname="tests.b" name="gone"><error message="no"/></testcase>'
        "</testsuite></testsuites>"
    )
    summary, lines = latest.broken(junit)
    assert summary == "3 tests, 1 failures, 1 errors"
    assert lines == ["- tests.a::wrong: 1 is not 2", "- tests.b::gone: no"]
    assert latest.broken(tmp_path / "none.xml") == ("the suite did not come to its end", [])


def test_a_broken_suite_and_versions_that_do_not_fit_both_end_well(
    tmp_path: Path, latest: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latest, "install", lambda *given: "ERROR: ResolutionImpossible")
    latest.main(tmp_path / "latest", ["dev"], "", [])
    assert "ResolutionImpossible" in (tmp_path / "latest/report.md").read_text()


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("def test_it():\n    assert 1 == 2\n", "What broke (1)"),
        ("def test_it():\n    assert 1 == 1\n", "What broke (0)"),
        (None, "pytest itself ended with 4"),
    ],
)
def test_the_suite_that_ran_is_the_one_reported(
    test: str | None,
    words: str,
    tmp_path: Path,
    latest: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bin_folder = tmp_path / "latest/venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_folder / "python").chmod(0o755)
    monkeypatch.setattr(latest, "install", lambda *given: "")
    if test is not None:
        (tmp_path / "test_one.py").write_text(test)
    options = ["--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path / "test_one.py")]
    latest.main(tmp_path / "latest", ["dev"], "", options)
    assert words in (tmp_path / "latest/report.md").read_text()
