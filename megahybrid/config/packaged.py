"""`pkg:` paths: the files of megahybrid's own configs/ folder, wherever megahybrid is installed.

`pkg:runs/demo.yaml` is the same file from a wheel, an editable install and a checkout on
PYTHONPATH. Messages, ledgers and the files that a run keeps say `pkg:…`, never where it lies.
"""

import difflib
import os
import posixpath
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath

from megahybrid.errors import PathError
from megahybrid.printable import shortened

PREFIX = "pkg:"
FOLDER = "configs"
LONGEST_NAME = 100  # comparing names takes the product of their lengths


def is_packaged(path: str | Path) -> bool:
    """Say whether `path` names one of megahybrid's own files."""
    return str(path).startswith(PREFIX)


def located(path: str | Path) -> Path:
    """Return where `path` lies on this machine: a `pkg:` path in megahybrid's own configs, any
    other where it says. Raises PathError for a `pkg:` path that leaves that folder or names nothing
    in it."""
    if not is_packaged(path):
        return Path(path)
    said, name = shortened(str(path), 200), str(path).removeprefix(PREFIX)
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\0" in name:
        raise PathError(
            f"{said} leaves megahybrid's own configs. Name a file in them, such as "
            f"{PREFIX}runs/demo.yaml."
        )
    found = configs() / inside
    if not os.path.exists(found):
        near = _nearest(name)
        hint = f"Did you mean {near}?" if near else f"There is {PREFIX}runs/demo.yaml, for example."
        raise PathError(f"{said} is none of megahybrid's own configs. {hint}")
    return found


def beside(path: Path, file: str) -> Path:
    """Return the path that `file` means where the file at `path` names it: relative to the folder
    of `path`, unless it is absolute or a `pkg:` path itself."""
    if is_packaged(file):
        return Path(file)
    if not is_packaged(path) or posixpath.isabs(file):
        return path.parent / file
    folder = posixpath.dirname(str(path).removeprefix(PREFIX))
    return Path(PREFIX + posixpath.normpath(posixpath.join(folder, file)))


def or_packaged(path: str | Path) -> Path:
    """Return `path`, or megahybrid's own file of that name where the working directory has no such
    file under configs/."""
    return packaged_name(path) or Path(path)


def packaged_name(path: str | Path) -> Path | None:
    """Return the `pkg:` path of the file of ours that configs/… means, where the working directory
    has none and we have one."""
    parts = Path(path).parts
    if len(parts) < 2 or parts[0] != FOLDER or ".." in parts or os.path.lexists(path):
        return None
    name = "/".join(parts[1:])
    return Path(PREFIX + name) if name in names() else None


def named(name: str, folder: Path) -> Path | None:
    """Return the path of NAME.yaml in `folder`, a folder of configs/, or of ours of that name where
    the working directory has none; None where neither is there."""
    file = folder / f"{name}.yaml"
    return file if file.exists() else packaged_name(file)


def known_names(folder: Path) -> list[str]:
    """Return the names that `named` finds in `folder`, sorted."""
    known = {found.stem for found in folder.glob("*.yaml")}
    if folder.parts[0] == FOLDER:
        files = (PurePosixPath(FOLDER, name) for name in names())
        known |= {file.stem for file in files if file.match(f"{folder}/*.yaml")}
    return sorted(known)


@cache
def names() -> tuple[str, ...]:
    """Return the YAML and JSON files of megahybrid's own configs, by their paths within them."""
    found = (path for path in configs().rglob("*") if path.suffix in (".yaml", ".json"))
    return tuple(sorted(path.relative_to(configs()).as_posix() for path in found))


@cache
def configs() -> Path:
    """Return the folder of megahybrid's own configs: in a checkout it is a link to configs/."""
    return Path(str(resources.files("megahybrid") / FOLDER))


def _nearest(name: str) -> str:
    """Return up to three of our files whose names are like `name`: those of the same file name in
    another folder first."""
    if len(name) > LONGEST_NAME:
        return ""
    same = [known for known in names() if posixpath.basename(known) == posixpath.basename(name)]
    like = difflib.get_close_matches(name, names(), n=3, cutoff=0.6)
    return " or ".join(PREFIX + known for known in list(dict.fromkeys([*same, *like]))[:3])
