"""What inputs name: each text once, however it is named, and nothing passed over in silence."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zstandard

from megahybrid.cli import main
from megahybrid.data_prep.documents import Document, read_unit
from megahybrid.data_prep.inputs import cut_units, named_entries
from megahybrid.data_prep.survey import Survey, survey
from megahybrid.errors import DataError
from tests.data_prep.reading import files_of
from tests.data_prep.test_survey import kind

PROSE = "It was the best of times.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts, one of them in a folder within, and what is hidden."""
    for name in ("corpus/a.txt", "corpus/en/b.txt", "corpus/en/deep/c.txt", "corpus/.git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name} {PROSE}")
    return tmp_path / "corpus"


def names(found: Survey) -> list[str]:
    items = [item for unit in cut_units(found.files) for item in read_unit(unit)]
    assert all(isinstance(item, Document) for item in items)
    return sorted(item.text.split()[0] for item in items if isinstance(item, Document))


ALL = ["corpus/a.txt", "corpus/en/b.txt", "corpus/en/deep/c.txt"]


def test_a_text_is_read_once_by_however_many_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "latest.txt").symlink_to("a.txt")
    (folder.parent / "other").symlink_to(folder)
    monkeypatch.chdir(folder)
    given = [folder, folder / "en/b.txt", "en/../en/b.txt", "en", folder.parent / "other", "../*"]
    assert names(survey(given)) == ALL
    assert names(survey(given[::-1])) == ALL


def test_a_glob_names_what_a_shell_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for written in ("corpus/*", "corpus/**", "corpus/**/*", f"{folder}/*", "*", "en/../corpus/*"):
        (folder.parent / "en").mkdir(exist_ok=True)
        assert names(survey([written])) == ALL, written
    assert names(survey(["corpus/e*"])) == ALL[1:]
    assert names(survey(["corpus/*/*.txt"])) == ALL[1:2]
    assert names(survey(["corpus/.g*"])) == ["corpus/.git/d.txt"]
    with pytest.raises(DataError, match="names no file"):
        named_entries("corpus/x*", "**/*")


@pytest.mark.skipif(os.getuid() != 0, reason="another user is needed")
def test_a_glob_tells_of_a_folder_that_may_not_be_opened() -> None:
    with TemporaryDirectory() as made:  # not in pytest's own folder, which others may not enter
        os.chmod(made, 0o755)
        Path(made, "a/shut").mkdir(parents=True)
        Path(made, "a/a.txt").write_text(PROSE)
        Path(made, "a/shut").chmod(0)
        child = os.fork()
        if not child:
            os.setuid(65534)
            try:
                named_entries(f"{made}/*", "**/*")
            except DataError as error:
                os._exit(7 if "cannot be opened" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_what_lies_behind_a_link_to_a_folder_is_weighed(folder: Path, tmp_path: Path) -> None:
    (folder / "again").symlink_to("en")  # read already
    assert names(survey([folder])) == ALL
    (tmp_path / "disk2").mkdir()
    (tmp_path / "disk2/more.txt").write_text(PROSE * 10)
    (folder / "more").symlink_to(tmp_path / "disk2")
    with pytest.raises(DataError, match=r"\(260 of 388, .*2 link to a folder; the largest is more"):
        survey([folder])
    assert len(names(survey([folder / "more", folder / "en", folder / "a.txt"]))) == 4


def test_a_window_of_any_size_is_unpacked(tmp_path: Path) -> None:
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    lines = json.dumps({"text": "wide"}).encode() + b"\n"
    path = tmp_path / "RC_2019-01.zst"
    path.write_bytes(packer.compress(lines) + packer.flush())
    assert kind(path) == "jsonl in zstd"
    (unit,) = cut_units(files_of(path))
    (item,) = read_unit(unit)
    assert isinstance(item, Document) and item.text == "wide"


@pytest.mark.parametrize("text", ["{} are braces\nin C\n", '{"a": 1} is JSON,\nthis is not\n'])
def test_text_that_begins_with_braces_is_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert kind(path) == "text"
    path.write_text('{"a":\n1}\n{"a":\n2}\n')
    assert kind(path) == "- JSON that is not a list of documents"


@pytest.mark.parametrize("path", ["/proc/kmsg", "{}/proc/self/mem", "/proc", "/sys", "link"])
def test_what_the_kernel_makes_up_is_no_input(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("/proc/kmsg")
    given = path.format("../" * 20)
    assert main(["data", "tokenizer", given, "--output", "new", "--vocab-size", "300"]) == 2
    assert "is the kernel's" in capsys.readouterr().err
    Path("a.txt").write_text(PROSE)
    table: list[str] = []
    assert len(survey([tmp_path], print_line=table.append).files) == 1
    assert "left out: the kernel's" in "\n".join(table)


def test_what_a_shell_substitutes_is_read(tmp_path: Path, model: Path) -> None:
    line = json.dumps({"text": PROSE})
    command = (
        f"{sys.executable} -m megahybrid data tokenize <(echo '{line}') "
        f"--tokenizer {model} --output {tmp_path}/new"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and ": 1 documents" in done.stdout, done.stderr


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no folder in memory")
def test_a_folder_in_memory_is_a_folder() -> None:
    with TemporaryDirectory(dir="/dev/shm") as made:
        Path(made, "a.txt").write_text("corpus/a.txt")
        assert names(survey([made])) == ALL[:1]


@pytest.mark.parametrize("sign", ["\n", "\r", "\u2028", "\x1b[2J", "\u202e"])
def test_a_name_begins_no_line(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["data", "tokenizer", f"no{sign}such", "--output", "new", "--vocab-size", "300"],
        ["data", "verify", f"no{sign}such"],
        ["check", f"no{sign}such"],
        ["checkpoint", "show", f"no{sign}such"],
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.endswith("\n") and told[:-1].isprintable(), words
