"""Hostile paths in every place of every command: one line, an exit code that is never retried in
vain, nothing written, no waiting. `tests/hostile_commands.py` says which and runs them."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megahybrid.cli import _parser
from megahybrid.errors import (
    EXIT_STORAGE,
    EXIT_USER_MISTAKE,
    PathError,
    StorageError,
    from_exception,
    from_os_error,
)
from tests import hostile_commands as hostile

ROOT = Path(__file__).parents[1]
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """What came of every case, by its name. Cases after one that ended the process are missing."""
    # Not in pytest's own folder, which a user without root's rights may not enter.
    with tempfile.TemporaryDirectory(prefix="megahybrid-hostile-") as made:
        os.chmod(made, 0o755)
        folder, told = Path(made) / "material", Path(made) / "results.jsonl"
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        done = subprocess.run(
            # By its path: the package `tests` would have every annotation checked, and be slow.
            [sys.executable, hostile.__file__, str(folder), str(told)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        lines = told.read_text().splitlines() if told.exists() else []
        assert lines, done.stdout[-2000:] + done.stderr[-4000:]
        yield {result["name"]: result for result in map(json.loads, lines)}
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)


def problem(result: dict[str, Any] | None) -> str | None:
    """What is wrong with how a command refused a path, or None."""
    if result is None:
        return "not reached: a case before it ended the process"
    if result["fault"]:
        return str(result["fault"])
    if result["written"] or result["lost"]:
        return f"wrote {result['written'][:3]}, removed {result['lost'][:3]}"
    if result["code"] not in (EXIT_USER_MISTAKE, EXIT_STORAGE):
        return f"exit code {result['code']}: {result['out'][-200:]}{result['err'][-300:]}"
    lines = result["err"].split("\n")
    if lines[0].startswith("usage: "):
        return None
    if len(lines) != 2 or lines[1] or not lines[0].startswith("megahybrid: "):
        return f"not one line: {result['err'][-600:]!r}"
    if not lines[0].isprintable() or len(lines[0]) > 800:
        return f"not a line to read: {lines[0][:300]!r}"
    return None


GROUPS = [
    (command, number) for command, templates in hostile.TEMPLATES.items() for number in
    range(len(templates))
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("command", "number"), GROUPS, ids=[f"{c} {hostile.TEMPLATES[c][n]}" for c, n in GROUPS]
)
def test_a_hostile_path_is_refused_in_one_line_by(
    command: str, number: int, results: Results
) -> None:
    asked = [case for case in hostile.cases() if case[:2] == (command, number)]
    assert asked
    wrong = {case.name: problem(results.get(case.name)) for case in asked}
    assert {name: what for name, what in wrong.items() if what} == {}


def test_every_command_is_given_hostile_paths_in_every_place() -> None:
    """A new command, or a new option that takes text or a path, is named here until it is."""
    commands = dict(hostile.commands_of(_parser()))
    assert sorted(commands) == sorted(hostile.TEMPLATES)
    for command, parser in commands.items():
        given = _places(parser, hostile.TEMPLATES[command])
        for action in parser._actions:
            if action.nargs == 0 or action.choices or action.dest in hostile.NO_PATHS:
                continue
            if action.type not in (None, Path):
                continue  # a number
            assert action.dest in given, f"`{command}` takes {action.dest}: name it in TEMPLATES"


def _places(parser: argparse.ArgumentParser, templates: tuple[str, ...]) -> set[str]:
    """The arguments that some template gives a word in braces."""
    found: set[str] = set()
    for template in templates:
        parsed, _ = parser.parse_known_args(template.split())
        for name, value in vars(parsed).items():
            values = value if isinstance(value, list) else [value]
            if any(hostile.slots_of(str(one)) for one in values if one is not None):
                found.add(name)
    return found


def test_the_judge_sees_what_is_wrong() -> None:
    good = {"name": "", "code": 2, "fault": "", "out": "", "written": [], "lost": []}
    good["err"] = "megahybrid: x cannot be used. Name another.\n"
    assert problem(good) is None
    for change in (
        {"code": 0},
        {"code": 1},
        {"fault": "Traceback"},
        {"written": ["x"]},
        {"lost": ["x"]},
        {"err": ""},
        {"err": "megahybrid: a\nmegahybrid: b\n"},
        {"err": "megahybrid: \x1b[2J\n"},
        {"err": f"megahybrid: {'x' * 900}\n"},
        {"err": "Traceback (most recent call last):\n"},
    ):
        assert problem({**good, **change}), change
    assert problem(None)


@pytest.mark.parametrize("number", ["ENOENT", "EACCES", "EPERM", "ENAMETOOLONG", "ENOTDIR",
                                    "EISDIR", "ELOOP", "EINVAL", "EEXIST"])  # fmt: skip
def test_a_path_is_the_users_until_a_run_has_begun(number: str) -> None:
    import errno

    error = OSError(getattr(errno, number), "no", "x" * 5000)
    typed, later = from_os_error(error), from_os_error(error, began=True)
    assert isinstance(typed, PathError) and typed.exit_code == EXIT_USER_MISTAKE
    assert isinstance(later, StorageError) and later.exit_code == EXIT_STORAGE
    assert len(str(typed)) < 400


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE"])
def test_storage_that_fails_is_never_the_users_mistake(number: str) -> None:
    import errno

    for began in (False, True):
        error = from_os_error(OSError(getattr(errno, number), "no", b"x\xff\n"), began=began)
        assert isinstance(error, StorageError) and error.exit_code == EXIT_STORAGE
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "refused"),
        ValueError("a bug"),
        RecursionError("maximum recursion depth exceeded"),
        RuntimeError("a bug"),
        KeyError("x"),
    ],
)
def test_our_own_faults_keep_their_traceback(error: Exception) -> None:
    assert from_exception(error) is None
