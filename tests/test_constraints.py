"""An install takes the versions of constraints/, and another one is seen."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "constraints").glob("*.txt"))
OF_THE_MACHINE = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]


def pins(text: str) -> dict[str, str]:
    """The version of each distribution that a file of constraints names."""
    lines = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    return {canonicalize_name(line.name): str(line.specifier)[2:] for line in lines}


def test_there_is_a_file_for_each_python_that_is_promised() -> None:
    promised = {
        line.rsplit(" ", 1)[1]
        for line in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    }
    assert {path.stem for path in FILES} == {f"python{version}" for version in promised}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_names_versions_and_markers_only(path: Path) -> None:
    text = path.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    named = []
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( ; [^#/@]+)?", line), line
        requirement = Requirement(line)
        assert requirement.url is None and not requirement.extras
        assert not Version(str(requirement.specifier)[2:]).local, line
        assert not OF_THE_MACHINE.fullmatch(canonicalize_name(requirement.name)), line
        named.append(line)
    assert "://" not in text and "--" not in text
    assert len(named) == len(set(named)) > 50


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_whatever_pyproject_asks_for_within_its_bounds(path: Path) -> None:
    held = pins(path.read_text())
    for need in NEEDS:
        name = canonicalize_name(need.name)
        if not OF_THE_MACHINE.fullmatch(name):
            assert need.specifier.contains(held[name]), f"{need}, {path.stem} has {held[name]}"


def test_every_requirement_has_an_upper_bound() -> None:
    unbounded = [
        str(need)
        for need in NEEDS
        if not any(bound.operator in ("<", "<=", "==", "~=") for bound in need.specifier)
    ]
    assert unbounded == []


def own_distributions() -> dict[str, Distribution]:
    """What this environment holds itself, without those of a system below it."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=places)}


def needed(held: dict[str, Distribution], name: str, extras: set[str], seen: set[str]) -> set[str]:
    """The names of all that `name` needs and that is there."""
    for line in held[name].requires or ():
        need = Requirement(line)
        other = canonicalize_name(need.name)
        places = [{"extra": extra} for extra in extras or {""}]
        if need.marker is not None and not any(need.marker.evaluate(place) for place in places):
            continue
        if other in held and other not in seen:
            seen.add(other)
            needed(held, other, set(need.extras), seen)
    return seen


def differences(held: dict[str, str], wanted: dict[str, str], names: set[str]) -> list[str]:
    """One line for each distribution that is not the one that constraints/ names."""
    lines = []
    for name in sorted(names):
        if OF_THE_MACHINE.fullmatch(name) or name == "megahybrid":
            continue
        if name not in wanted:
            lines.append(f"{name} {held[name]} is needed and has no version in constraints/")
        elif Version(held[name]) != Version(wanted[name]):
            lines.append(f"{name} is {held[name]}, constraints/ has {wanted[name]}")
    return lines


def test_this_environment_holds_the_versions_of_its_constraints() -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    file = ROOT / f"constraints/python{python}.txt"
    if not file.exists():
        pytest.skip(f"there are no constraints for Python {python}")
    used = Path(sys.prefix) / "constraints.txt"
    if not used.exists():
        pytest.skip(f"{sys.prefix} was not made by `make install`")
    taken = pins(used.read_text())
    if set(taken) <= {"torch"}:
        pytest.skip("installed without constraints (CONSTRAINTS=none)")
    wanted = pins(file.read_text())
    held = own_distributions()
    names = needed(held, "megahybrid", set(PROJECT["optional-dependencies"]), set())
    assert len(names) > 50
    # What the machine's own PIP_CONSTRAINT names was left to it.
    left = {name for name in wanted if name not in taken}
    versions = {name: found.version for name, found in held.items()}
    found = differences(versions, wanted, names - left)
    assert not found, "; ".join([*found, "run `make install-dev`, or `make constraints` to move"])


def test_a_version_that_moved_and_one_that_came_along_are_named() -> None:
    held = {"plotly": "7.2.0", "rich": "15.0", "newcomer": "1.0", "torch": "2.13.0+cpu"}
    found = differences(held, {"plotly": "7.1.0", "rich": "15.0.0"}, set(held))
    assert found == [
        "newcomer 1.0 is needed and has no version in constraints/",
        "plotly is 7.2.0, constraints/ has 7.1.0",
    ]


def test_every_install_is_held_to_the_constraints() -> None:
    """But for torch, which comes first, and for what test-latest lifts on purpose."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    plain = [line for line in makefile.splitlines() if re.match(r"\s.*pip install|PIP :=", line)]
    assert len(plain) > 2
    assert [
        line for line in plain if not re.search(r"PIP_CONSTRAINT|\$\(TORCH\)|build/uv", line)
    ] == []
    ci = (ROOT / ".ci/run").read_text().replace("\\\n", " ")
    installs = [line for line in ci.splitlines() if "pip install" in line]
    assert installs and all("-c .venv/constraints.txt" in line for line in installs)


def pinned(tmp_path: Path, folder: str, machine: str = "") -> tuple[list[str], str]:
    """What `.ci/pin` writes here, and what it says."""
    out = tmp_path / "constraints.txt"
    (tmp_path / "machine.txt").write_text(machine)
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/pin"), str(out), folder],
        env={"PIP_CONSTRAINT": f"{tmp_path}/machine.txt {tmp_path}/missing.txt", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return out.read_text().splitlines(), done.stdout


def test_the_machines_torch_and_its_own_pins_go_first(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "versions"
    folder.mkdir()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    said = "# a comment\nnumpy==2.4.6\nruamel-yaml==0.19.1\nrich==15.0.0\n"
    (folder / f"python{python}.txt").write_text(said)
    lines, words = pinned(tmp_path, str(folder), "Ruamel.YAML==0.18  # ours\nscipy<2\n")
    assert lines == [f"torch=={torch.__version__}", "numpy==2.4.6", "rich==15.0.0"]
    assert words == "Left to this machine's PIP_CONSTRAINT: ruamel-yaml\n"


def test_without_a_file_for_this_python_a_line_says_so(tmp_path: Path) -> None:
    lines, words = pinned(tmp_path, str(tmp_path))
    assert len(lines) == 1 and lines[0].startswith("torch==")
    assert re.fullmatch(r"Python 3\.\d+: there is no .*, so pip takes the newest .*\n", words)
    lines, words = pinned(tmp_path, "none")
    assert len(lines) == 1 and "CONSTRAINTS=none" in words
