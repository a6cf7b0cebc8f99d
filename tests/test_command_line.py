"""The command line itself: quick, light, and clear about what it does not understand."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.example import RUN

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "deepspeed", "wandb", "transformers", "numpy", "matplotlib", "sentencepiece")


def python(*arguments: str, folder: Path = ROOT) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a new Python says, and its CPU seconds."""
    return run(sys.executable, *arguments, folder=folder)


def run(*command: str, folder: Path = ROOT) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a command says, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(code: str, folder: Path = ROOT) -> set[str]:
    """Which heavy libraries are imported after `code`."""
    show = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done, _ = python("-c", f"{code}\n{show}", folder=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    seconds = []
    for _ in range(3):  # the first one may have to compile
        done, cpu = python("-m", "megahybrid", "--help")
        assert done.returncode == 0
        seconds.append(cpu)
    for command in ("train", "check", "describe", "compare", "evaluate", "sample", "report"):
        assert command in done.stdout
    assert min(seconds) < 0.3


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import megahybrid") == set()
    assert imported("import megahybrid.cli; megahybrid.cli._parser()") == set()
    assert imported("import megahybrid.config") == set()


@pytest.mark.parametrize("command", ["check", "describe"])
def test_without_torch_and_within_a_second(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    code = f"from megahybrid.cli import main\nassert main(['{command}', 'run.yaml']) == 0"
    assert imported(code, tmp_path) == set()
    seconds = []
    for _ in range(2):
        done, cpu = python("-m", "megahybrid", command, "run.yaml", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        seconds.append(cpu)
    assert min(seconds) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_installed_command_is_the_module() -> None:
    command = Path(sys.executable).with_name("megahybrid")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done, _ = run(str(command), "--help")
    assert done.stdout == python("-m", "megahybrid", "--help")[0].stdout


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    line = f"{sys.executable} -m megahybrid describe run.yaml | head -1; echo ${{PIPESTATUS[0]}}"
    done, _ = run("bash", "-c", line, folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr
