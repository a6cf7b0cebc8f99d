"""A Python that has what a lent GPU machine and `make gpu-call` have, and nothing else."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.metadata import Distribution, distributions
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LISTS = [ROOT / "benchmarks/gpu_call" / name for name in ("machine.txt", "left_out.txt")]
# As `make gpu-call` asks for them.
EXTRAS = ("dev", "gpu", "oracle", "peers")


def wheelhouse() -> ModuleType:
    """`.ci/wheelhouse` as a module."""
    loader = SourceFileLoader("wheelhouse", str(ROOT / ".ci/wheelhouse"))
    module = module_from_spec(spec_from_loader("wheelhouse", loader))  # type: ignore[arg-type]
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules["wheelhouse"] = module  # where its dataclass looks for itself
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def names_there() -> set[str]:
    """Every distribution that such a machine has in a call: what its list names, with what those
    need in the versions that are here, and what is collected for it."""
    tool = wheelhouse()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    listed = {name for name, _ in tool.entries(LISTS[0])}
    there = tool.Collection(version, frozenset(name for name, _ in tool.entries(LISTS[1])))
    for name in listed:
        there.add(name, "")
    return listed | set(there.found) | set(tool.collection(version, EXTRAS, LISTS).found)


def make_python(folder: Path) -> Path:
    """A virtual environment in `folder` with links to these alone; its Python."""
    links, allowed = folder / "site", names_there()
    links.mkdir()
    for found in distributions():
        if canonicalize_name(found.metadata["Name"]) in allowed:
            link(found, links)
    made = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
    subprocess.run(made, check=True)
    site = next((folder / "venv/lib").glob("python3.*/site-packages"))
    (site / "lent.pth").write_text(f"{links}\n")
    return folder / "venv/bin/python"


def link(found: Distribution, links: Path) -> None:
    """Link a distribution's own folders and modules."""
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        target = links / top
        if not target.exists():
            target.symlink_to(str(found.locate_file(top)))
