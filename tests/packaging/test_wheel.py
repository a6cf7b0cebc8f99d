"""What users install: one import name with all that it needs, from a wheel, an editable install, a
source distribution and a checkout on PYTHONPATH."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megahybrid import __version__

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
# What a user does with it, from an empty folder.
USE = """
import sys
import megahybrid.data_prep, megahybrid.launch.submit
from megahybrid.config import load
from megahybrid.config.packaged import located, names
run = load("pkg:runs/demo.yaml", ["seed=3"])
print(located("pkg:models/rnope_swa_150m.yaml"))
assert run.seed == 3 and len(names()) > 60
assert "torch" not in sys.modules and "launch" not in sys.modules
"""

# A folder of packages before those of the environment, which may have a megahybrid of its own.
FIRST = """
import site, sys
before = set(sys.path)
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]  # the other install's, of the same version, has the same name
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path.insert(0, {0!r})  # where its own is looked for first
site.addsitedir({0!r})
sys.path.sort(key=lambda path: path in before)
"""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files of this checkout, links as links."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    folder.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout: what belongs to it is not known")
    with tarfile.open(folder.parent / "source.tar", "w") as archive:
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_symlink() or (ROOT / name).exists():
                archive.add(ROOT / name, name, recursive=False)
    with tarfile.open(folder.parent / "source.tar") as archive:
        archive.extractall(folder, filter="tar")
    assert (folder / "megahybrid/launch").is_symlink()
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    """The wheel that pip builds of it, without a network."""
    return _pip_wheel(source, source.parent / "wheel")


@pytest.fixture(scope="session")
def unpacked(wheel: Path) -> Path:
    """What an installer puts into site-packages."""
    folder = wheel.parents[1] / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_one_import_name_and_every_file_of_the_package(
    source: Path, unpacked: Path
) -> None:
    info = f"megahybrid-{__version__}.dist-info"
    assert {path.name for path in unpacked.iterdir()} == {"megahybrid", info}
    assert (unpacked / info / "top_level.txt").read_text().split() == ["megahybrid"]
    assert _files(unpacked / "megahybrid") == _files(source / "megahybrid")
    known = _files(unpacked / "megahybrid")
    assert {"launch/supervise.py", "data_prep/tokenize.py", "py.typed"} <= known
    assert {"configs/sites/cpu.yaml", "configs/suites/questions_one.json"} <= known
    assert {"report/page.css", "report/page.js", "report/templates/page.html"} <= known
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]


def test_a_source_distribution_makes_the_same_wheel(source: Path, wheel: Path) -> None:
    out = source.parent / "sdist"
    out.mkdir()
    made = _run(sys.executable, "-c", BUILD.format("sdist", str(out)), cwd=source)
    archive = out / made.splitlines()[-1]
    with tarfile.open(archive) as packed:
        packed.extractall(out, filter="data")
    again = archive.with_name(archive.name.removesuffix(".tar.gz"))
    assert not (again / "tests").exists()
    name = _run(sys.executable, "-c", BUILD.format("wheel", str(out)), cwd=again).splitlines()[-1]
    assert _contents(out / name) == _contents(wheel)


def test_a_wheel_works_alone_from_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    assert _use(tmp_path, unpacked) == unpacked / "megahybrid/configs/models/rnope_swa_150m.yaml"


def test_a_checkout_on_pythonpath_works_from_an_empty_folder(source: Path, tmp_path: Path) -> None:
    assert _use(tmp_path, source) == source / "megahybrid/configs/models/rnope_swa_150m.yaml"


def test_an_editable_install_works_from_an_empty_folder(source: Path, tmp_path: Path) -> None:
    """As pip makes one: a .pth file in site-packages that names the checkout."""
    out = source.parent / "editable"
    out.mkdir()
    made = _run(sys.executable, "-c", BUILD.format("editable", str(out)), cwd=source)
    site = tmp_path / "site"
    with zipfile.ZipFile(out / made.splitlines()[-1]) as archive:
        archive.extractall(site)
    assert not (site / "launch").exists() and not (site / "data_prep").exists()
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = FIRST.format(str(site)) + USE
    found = _run(sys.executable, "-P", "-c", code, cwd=tmp_path / "empty", env=environment)
    assert Path(found.strip()) == source / "megahybrid/configs/models/rnope_swa_150m.yaml"


def _use(empty: Path, path: Path) -> Path:
    """Import, check and describe with `path` alone on PYTHONPATH; return where a file was found."""
    environment = os.environ | {"PYTHONPATH": str(path)}

    def run(*words: str) -> str:
        return _run(sys.executable, *words, cwd=empty, env=environment)

    check = ("check", "pkg:runs/demo.yaml", "--world-size", "2", "--no-files")
    told = run("-m", "megahybrid", *check)
    assert told.startswith("2,099,328 parameters, 8 layers")
    assert "2,099,328" in run("-m", "megahybrid", "describe", "pkg:runs/demo.yaml")
    return Path(run("-c", USE).strip())


def _run(*words: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _pip_wheel(source: Path, out: Path) -> Path:
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", str(out), str(source)]
    _run(*command, cwd=source.parent)
    (made,) = out.glob("*.whl")
    return made


def _files(folder: Path) -> set[str]:
    """Every file under a folder, links followed, by its path within."""
    found = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {str(Path(place, name).relative_to(folder)) for name in names}
    return found


def _contents(wheel: Path) -> dict[str, int]:
    """Path and checksum of each file in it, but for what is about the wheel itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            one.filename: one.CRC for one in archive.infolist() if "dist-info" not in one.filename
        }
