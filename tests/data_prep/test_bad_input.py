"""Data commands that were given what cannot be meant: one line, code 2, nothing written."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megahybrid.cli import main
from tests.data.corpus import write_corpus

ROOT = Path(__file__).parents[2]
LONG = "n" * 300


@pytest.fixture
def here(
    tmp_path: Path, model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Things that are no file, no folder, no dataset; and good ones: ds, rows.jsonl, m.model."""
    write_corpus(tmp_path / "ds", [9, 20, 30] * 10, vocab_size=400)
    shutil.copy(model, tmp_path / "m.model")
    shutil.copy(corpus, tmp_path / "rows.jsonl")
    (tmp_path / "plain").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    shutil.copytree(tmp_path / "ds", tmp_path / "fifo-manifest")
    (tmp_path / "fifo-manifest/manifest.json").unlink()
    os.mkfifo(tmp_path / "fifo-manifest/manifest.json")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
        yield tmp_path


def everything(folder: Path) -> list[tuple[str, int, int]]:
    found = sorted(folder.rglob("*"))
    return [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found]


def refused(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = everything(here)
    try:
        code = main(["data", *words])
    except SystemExit as error:  # argparse
        code = error.code
    told = capsys.readouterr()
    assert code == 2, (told.out, told.err)
    lines = told.err.splitlines()
    assert len(lines) == 1 or "error: argument" in lines[-1], told.err
    assert not told.out and "Traceback" not in told.err
    assert everything(here) == before
    return lines[-1]


READ = {
    "verify": ["verify", "{}"],
    "inspect": ["inspect", "{}"],
    "audit": ["audit", "{}"],
    "pack": ["pack", "{}", "--output", "new", "--length", "64"],
    "merge": ["merge", "ds", "{}", "--output", "new"],
    "shuffle": ["shuffle", "{}", "--output", "new"],
    "split": ["split", "{}", "--output", "new", "--held-out", "0.3"],
    "import": ["import", "{}", "--output", "new", "--vocab-size", "400", "--eod-id", "1"],
    "export": ["export", "{}", "new"],
    "tokenize": ["tokenize", "{}", "--tokenizer", "m.model", "--output", "new"],
    "tokenizer": ["tokenizer", "{}", "--output", "new.model", "--vocab-size", "300"],
    "of-tokenize": ["tokenize", "rows.jsonl", "--tokenizer", "{}", "--output", "new"],
    "report": ["tokenizer", "report", "{}", "rows.jsonl"],
    "adopt": ["tokenizer", "adopt", "{}", "--output", "new.model"],
    "of-inspect": ["inspect", "ds", "--tokenizer", "{}"],
}
NOWHERE = [
    "nowhere/x",
    LONG,
    "a\0b",
    "",
    "plain/x",
    "fifo",
    "sock",
    "/dev/zero",
    "loop",
    "dangling",
]


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: repr(path[:12]))
@pytest.mark.parametrize("command", READ)
def test_path_that_cannot_be_read(
    command: str, path: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([word.format(path) for word in READ[command]], here, capsys)
    assert line.startswith("megahybrid: ") and line.endswith(".")
    assert "\0" not in line


@pytest.mark.parametrize("command", ["verify", "inspect", "pack", "merge", "split", "export"])
def test_manifest_that_is_a_pipe_is_not_waited_for(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([word.format("fifo-manifest") for word in READ[command]], here, capsys)
    assert "fifo-manifest/manifest.json is a pipe, not a plain file" in line


WRITE = {
    "pack": ["pack", "ds", "--output", "{}", "--length", "64"],
    "merge": ["merge", "ds", "--output", "{}"],
    "split": ["split", "ds", "--output", "{}", "--held-out", "0.3"],
    "tokenize": ["tokenize", "rows.jsonl", "--tokenizer", "m.model", "--output", "{}"],
}
TAKEN = ["a\0b", "", LONG, "n" * 250, "plain", "plain/x", "fifo", "sock", "/dev/null", "loop", "ds"]


@pytest.mark.parametrize("path", TAKEN, ids=lambda path: repr(path[:12]))
@pytest.mark.parametrize("command", WRITE)
def test_place_that_cannot_be_written(
    command: str, path: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([word.format(path) for word in WRITE[command]], here, capsys)


@pytest.mark.parametrize("end", ["fifo", "sock", "folder"])
@pytest.mark.parametrize("command", ["tokenizer", "adopt", "gather"])
def test_file_is_not_written_over_what_is_no_file(
    command: str, end: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = ".jsonl" if command == "gather" else ".model"
    (here / "folder").mkdir()
    Path(end).rename(end + suffix)
    words = {
        "tokenizer": ["tokenizer", "rows.jsonl", "--vocab-size", "300", "--output"],
        "adopt": ["tokenizer", "adopt", "m.model", "--output"],
        "gather": ["gather-stdlib"],
    }[command]
    line = refused([*words, end + suffix], here, capsys)
    assert "is there already (a " in line


PACK = ["pack", "ds", "--output", "new"]
HUGE = {
    "--length": [*PACK, "--length"],
    "--vocab-size": ["tokenizer", "rows.jsonl", "--output", "new.model", "--vocab-size"],
    "--memory-mib": ["shuffle", "ds", "--output", "new", "--memory-mib"],
    "--shard-tokens": ["merge", "ds", "--output", "new", "--shard-tokens"],
    "--seed": ["shuffle", "ds", "--output", "new", "--seed"],
    "--min-document-tokens": [*PACK, "--length", "9", "--min-document-tokens"],
    "--workers": [*WRITE["tokenize"][:4], "--output", "new", "--workers"],
}


@pytest.mark.parametrize("number", ["1000000000000", "9" * 5000, "1e9", "nan", ""])
@pytest.mark.parametrize("option", HUGE)
def test_size_that_none_can_mean(
    option: str, number: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if option in ("--seed", "--min-document-tokens") and number.isdigit():
        number = "9" * 40
    line = refused([*HUGE[option], number], here, capsys)
    assert f"argument {option}" in line and len(line) < 200


TOKENIZE = ["tokenize", "rows.jsonl", "--tokenizer", "m.model"]


def test_longest_row_is_also_kept_by_the_function(here: Path) -> None:
    from megahybrid.data_prep.pack import pack
    from megahybrid.errors import DataError

    with pytest.raises(DataError, match="--length=1000000000 is not from 1 to 16777216"):
        pack("ds", "new", 10**9)
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["import", "ds/shard-00000", "--vocab-size", "5", "--eod-id", "7"], "eod_id=7 is beyond"),
        (
            ["tokenize", "rows.jsonl", "--tokenizer", "m.model", "--glob", "/etc/*"],
            "--glob='/etc/*'",
        ),
        (["tokenize", "rows.jsonl", "--tokenizer", "m.model", "--glob", ""], "--glob='' is no"),
        (["tokenize", "rows.jsonl", "--tokenizer", "m.model", "--glob", "**a"], "--glob='**a' is"),
        (["merge", "rows.jsonl"], "rows.jsonl is not a dataset"),
    ],
)
def test_options_that_disagree(
    words: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused([*words, "--output", "new"], here, capsys)


def test_folder_that_must_not_be_read_or_written_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root reads everything, so the command is started without that right."""
    tool = shutil.which("setpriv")
    if os.geteuid() == 0 and tool is None:
        pytest.skip("needs setpriv, or not to be root")
    shutil.copytree("ds", "secret/ds")
    Path("locked").mkdir()
    closed = {"secret": 0o000, "locked": 0o555, "m.model": 0o000, "rows.jsonl": 0o000}
    calls = [
        ("verify", "secret/ds", "secret/ds"),
        ("pack", "secret/ds", "secret/ds"),
        ("tokenize", "rows.jsonl", "rows.jsonl"),
        ("report", "m.model", "m.model"),
    ]
    commands = [([word.format(path) for word in READ[name]], told) for name, path, told in calls]
    commands.append((["merge", "ds", "--output", "locked/new"], "locked"))
    commands.append((["inspect", "ds", "--picture", "locked/a.svg"], "locked"))
    rights = "-dac_override,-dac_read_search"
    drop = [tool, f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    for name, mode in closed.items():
        os.chmod(name, mode)
    try:
        for words, told in commands:
            done = subprocess.run(
                [*map(str, drop), sys.executable, "-m", "megahybrid", "data", *words],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            line = (
                f"megahybrid: {told} cannot be used (Permission denied). Name a path that can be.\n"
            )
            found = done.stderr.replace(f"{here}/", "")
            assert (done.returncode, found, done.stdout) == (2, line, "")
            assert not Path("new").exists()
    finally:
        for name in closed:
            os.chmod(name, 0o700)
