"""What `make gpu-call` collects is all that a call needs and little else, on any index."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.benchmarks.lent import EXTRAS, LISTS, ROOT, make_python, wheelhouse

COLLECT = [sys.executable, str(ROOT / ".ci/wheelhouse")]
ASKED = [",".join(EXTRAS), "--there", str(LISTS[0]), "--left-out", str(LISTS[1])]


def fake_wheel(index: Path, name: str, version: str, *needs: str) -> None:
    """A wheel that holds one module."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    said = "".join(f"Requires-Dist: {need}\n" for need in needs)
    index.mkdir(exist_ok=True)
    with ZipFile(index / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"fake_{name.replace('-', '_')}.py", "")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{said}"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of all that a call needs; one that is not installed here needs a newcomer."""
    tool = wheelhouse()
    made = tool.collection("3.12", EXTRAS, LISTS)
    if not made.elsewhere:
        pytest.skip("all that a call needs is installed here: no wheel need be asked what it needs")
    asked = min(made.elsewhere)
    for name, bound in made.found.items():
        version = bound.removeprefix("==") if bound.startswith("==") else "1.25"
        newcomer = ["newcomer>=2", "wandb"] if name == asked else []
        fake_wheel(tmp_path / "index", name, version, *newcomer)
    fake_wheel(tmp_path / "index", "newcomer", "2.1")
    return tmp_path / "index"


def run(command: list[str], index: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """A command whose pip knows that index alone."""
    environment = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "HOME": str(index.parent)}
    environment |= {"PIP_FIND_LINKS": str(index), "PATH": "/usr/bin:/bin", **options}
    return subprocess.run(
        command, env=environment, cwd=index.parent, capture_output=True, text=True, timeout=200
    )


def collect(index: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run([*COLLECT, "3.12", ".whl", *ASKED, *more], index)


def test_the_lists_and_what_is_collected_do_not_meet() -> None:
    tool = wheelhouse()
    made = tool.collection("3.12", EXTRAS, LISTS)
    there, left_out = ({name for name, _ in tool.entries(file)} for file in LISTS)
    assert not set(made.found) & (there | left_out) and not there & left_out
    wanted = {
        "typing-extensions",
        "pydantic",
        "pydantic-core",
        "ruamel-yaml",
        "deepspeed",
        "beartype",
        "hjson",
    }
    assert wanted | {"nvidia-cudnn-frontend", "megatron-core"} <= set(made.found)
    assert {"torch", "triton", "numpy", "megahybrid"}.isdisjoint(made.found)
    assert made.found["deepspeed"] == "==0.19.8"
    assert all("#" in line for line in LISTS[1].read_text().splitlines()), "each has its reason"


def test_the_line_that_is_printed_installs_all_of_it_offline(index: Path) -> None:
    place = index.parent
    fake_wheel(place / ".whl", "stale", "1.0")
    done = collect(index)
    assert done.returncode == 0, done.stderr
    names = {path.name.split("-")[0] for path in (place / ".whl").glob("*.whl")}
    # What is needed by what is not installed here came too, and nothing of an earlier collection.
    assert "newcomer" in names and not names & {"stale", "wandb"}
    line = done.stdout.splitlines()[-1].strip()
    install, then = line.split(" && ")
    assert then == ("PYTHONPATH=$PWD:$PWD/build/gpu-call/site python3 -u -m benchmarks.gpu_call")
    assert install.startswith("pip install --no-index --no-deps --find-links .whl ")
    # There is no index there, nor one of wheels.
    empty = place / "empty"
    empty.mkdir()
    there = [sys.executable, "-m", *install.split()]
    for _ in range(2):
        again = run(there, empty)
        assert again.returncode == 0, again.stderr
    modules = {path.stem for path in (place / "build/gpu-call/site").glob("fake_*.py")}
    assert modules == {f"fake_{name}" for name in names}
    (place / ".whl/newcomer-2.1-py3-none-any.whl").unlink()
    short = run(there, empty)
    assert short.returncode != 0 and "newcomer==2.1" in short.stderr


def test_what_no_index_has_and_what_is_too_large_is_one_line(index: Path) -> None:
    (index / "newcomer-2.1-py3-none-any.whl").unlink()
    short = collect(index)
    assert short.returncode == 1 and short.stderr.count("\n") == 1, short.stderr
    assert short.stderr.startswith(".whl is not complete: ERROR: ") and "newcomer" in short.stderr
    fake_wheel(index, "newcomer", "2.1")
    large = collect(index, "--most-mib", "0.001")
    assert large.returncode == 1 and large.stderr.count("\n") == 1
    assert "(--most-mib=0.001), most of it" in large.stderr
    for wheel in index.glob("*.whl"):
        wheel.unlink()
    for wheel in (index.parent / ".whl").glob("*.whl"):
        wheel.unlink()
    none = collect(index)
    assert none.returncode == 1 and none.stderr.count("\n") == 1, none.stderr
    assert none.stderr.startswith("deepspeed==0.19.8 could not be built: ERROR: ")


@pytest.mark.slow
def test_what_is_marked_gpu_is_collected_with_what_such_a_machine_has(tmp_path: Path) -> None:
    python = make_python(tmp_path)
    absent = "import importlib.util as u; print(u.find_spec('wandb'), u.find_spec('plotly'))"
    found = subprocess.run([python, "-c", absent], capture_output=True, text=True, check=True)
    assert found.stdout == "None None\n"
    command = [str(python), "-m", "benchmarks.gpu_call", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "tests"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    said = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + said
    assert said.count("needs a CUDA device") >= 3 and "error" not in said.lower(), said
