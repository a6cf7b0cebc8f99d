"""Members of .tar and .zip: whole ones are read, broken ones told with their place."""

import gzip
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from megahybrid.data_prep.documents import BadText, Document, LongDocument, read_unit
from megahybrid.data_prep.inputs import cut_units
from megahybrid.data_prep.tokenize import tokenize
from tests.data_prep.reading import files_of

TEXTS = {f"part-{i}/{i}.txt": f"text {i} é\n" * (i + 1) for i in range(8)}
LINES = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)).encode()


def tar(
    path: Path, files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(path: Path) -> tuple[list[str], list[tuple[str, int, str]]]:
    """Texts, and what was bad, of everything in a file."""
    texts, bad = [], []
    for unit in cut_units(files_of(path)):
        for item in read_unit(unit):
            if isinstance(item, Document):
                texts.append(item.text)
            elif isinstance(item, LongDocument):
                try:
                    texts.append("".join(item.pieces))
                except BadText as error:
                    bad.append((item.name, 0, str(error)))
            else:
                bad.append((item.file.removeprefix(str(path)), item.offset, item.reason))
    return texts, bad


FILES = {name: text.encode() for name, text in TEXTS.items()}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_member_of_a_tar_is_a_document(tmp_path: Path, form: int) -> None:
    long_name = "deep/" * 15 + "x.txt" if form == tarfile.USTAR_FORMAT else "é" * 200 + ".txt"
    path = tar(tmp_path / "a.tar", FILES | {long_name: b"the last"}, form=form)
    assert read(path) == ([*TEXTS.values(), "the last"], [])


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.zip"])
def test_packed_archives_give_the_same(tmp_path: Path, name: str) -> None:
    plain = tar(tmp_path / "a.tar", FILES)
    if name.endswith("zip"):
        path = zipped(tmp_path / name, FILES)
    elif name.endswith("zst"):
        path = tmp_path / name
        path.write_bytes(pytest.importorskip("zstandard").compress(plain.read_bytes()))
    else:
        path = tar(tmp_path / name, FILES, "w:gz")
    assert read(path) == (list(TEXTS.values()), [])


@pytest.mark.parametrize("make", [tar, zipped])
def test_members_are_read_by_their_own_kind(tmp_path: Path, make: type) -> None:
    files = {
        "a.jsonl": LINES + b"{broken\n",
        "b.jsonl.gz": gzip.compress(LINES),
        "c/d.txt.gz": gzip.compress(b"packed text"),
        "inner.tar": b"x",
        "._a.jsonl": b"\xff",
        "__MACOSX/a": b"\xff",
        "binary": b"\xff\xfe\0",
    }
    path = make(tmp_path / f"a.{make.__name__.replace('zipped', 'zip')}", files)
    lines = [f"line {i}" for i in range(5)]
    assert read(path) == (
        [*lines, *lines, "packed text"],
        [
            ("!a.jsonl", len(LINES), "broken json"),
            ("!inner.tar", 0, "archive within an archive"),
            ("!binary", 0, "utf-16, not utf-8"),
        ],
    )


def test_table_within_an_archive_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    held = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), held)
    assert read(zipped(tmp_path / "a.zip", {"t.parquet": held.getvalue()})) == (["one", "two"], [])


def test_broken_header_costs_its_member_alone(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", FILES)
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        places = [entry.offset for entry in archive]
    raw[places[3] + 5] ^= 1
    path.write_bytes(raw)
    texts, bad = read(path)
    assert texts == [text for i, text in enumerate(TEXTS.values()) if i != 3]
    assert bad == [("", places[3], "broken tar header")]


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_tar_gives_the_members_before(tmp_path: Path, packed: bool) -> None:
    plain = tar(tmp_path / "plain.tar", FILES | {"last.jsonl": LINES * 500})
    raw = plain.read_bytes()[:-20_000]
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    texts, bad = read(path)
    assert texts[:8] == list(TEXTS.values())
    assert len(texts) > 8 and set(texts[8:]) == {f"line {i}" for i in range(5)}
    assert bad == [("!last.jsonl", 0, "truncated tar")]
    if packed:
        path.write_bytes(gzip.compress(plain.read_bytes())[:-30])
        texts, bad = read(path)
        assert texts[:8] == list(TEXTS.values())
        assert [reason for _, _, reason in bad][-1] == "truncated gzip"


def test_tar_without_an_end_is_told(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.txt": b"x"})
    path.write_bytes(path.read_bytes()[:1024])
    assert read(path) == (["x"], [("", 1024, "truncated tar")])


def test_broken_member_of_a_zip_costs_itself_alone(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", FILES, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(FILES["part-3/3.txt"]) + 2] ^= 1
    path.write_bytes(raw)
    texts, bad = read(path)
    assert texts == [text for i, text in enumerate(TEXTS.values()) if i != 3]
    assert [(name, reason) for name, _, reason in bad] == [("!part-3/3.txt", "broken zip member")]


class Unseekable(io.RawIOBase):
    """A pipe, say: sizes and checksums then stand behind their members."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize("written", ["stored", "deflated", "bzip2", "described", "zip64"])
def test_zip_without_its_directory_gives_every_whole_member(tmp_path: Path, written: str) -> None:
    target = Unseekable() if written == "described" else io.BytesIO()
    method = {"stored": zipfile.ZIP_STORED, "bzip2": zipfile.ZIP_BZIP2}.get(written)
    with zipfile.ZipFile(target, "w", method or zipfile.ZIP_DEFLATED) as archive:  # type: ignore
        for name, text in FILES.items():
            with archive.open(name, "w", force_zip64=written == "zip64") as file:
                file.write(text)
    raw = target.data if isinstance(target, Unseekable) else target.getvalue()
    directory = raw.index(b"PK\x01\x02")
    path = tmp_path / "a.zip"
    for end in (directory, directory + 50, len(raw) - 22):
        path.write_bytes(raw[:end])
        assert read(path) == (
            list(TEXTS.values()),
            [("", directory, "broken or truncated zip")],
        )
    path.write_bytes(raw[:-4] + b"\xff" + raw[-3:])  # where the directory begins
    assert read(path)[0] == list(TEXTS.values())
    third, fourth = (raw.index(name.encode()) - 30 for name in list(TEXTS)[3:5])
    for broken in (
        raw[: third + 5] + b"\xff" * 40 + raw[third + 45 : directory],  # its header and more
        raw[: fourth - 20] + raw[fourth:directory],  # its end
    ):
        path.write_bytes(broken)
        texts, bad = read(path)
        assert texts == [text for i, text in enumerate(TEXTS.values()) if i != 3]
        assert ("", "broken or truncated zip") in [(name, reason) for name, _, reason in bad]
    path.write_bytes(raw[: directory - 20])  # the last one's, and the directory
    assert read(path)[0] == list(TEXTS.values())[:-1]


def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    zeros = bytes(80 * 2**20)
    path = zipped(tmp_path / "a.zip", {"zeros.txt": zeros, "good.txt": b"good"})
    assert read(path)[0] == ["good"] and read(path)[1][0][2] == "decompression bomb"
    path = tar(tmp_path / "a.tar.gz", {"good.txt": b"good", "zeros.txt": zeros}, "w:gz")
    assert read(path)[1][-1][2] == "decompression bomb"


def test_names_that_climb_are_only_labels(tmp_path: Path, model: Path) -> None:
    names = ["../../climbed.txt", "/climbed.txt", "a/../../b.txt", "bad\udcff.txt", "x\ny.txt"]
    inside = tmp_path / "in"
    inside.mkdir()
    files = {name: b"\xff" if number else b"a b c" for number, name in enumerate(names)}
    path = tar(inside / "a.tar", files)
    before = sorted(tmp_path.parent.iterdir())
    tokenize([path], model, inside / "out", max_bad_fraction=1, quiet=True)
    listed = list(map(json.loads, (inside / "out/quarantine.jsonl").read_bytes().splitlines()))
    assert [item["file"].split("!")[1] for item in listed] == [
        "/climbed.txt",
        "a/../../b.txt",
        "bad\\xff.txt",
        "x\ny.txt",
    ]
    assert sorted(tmp_path.parent.iterdir()) == before and sorted(tmp_path.iterdir()) == [inside]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_any_byte_may_be_wrong(tmp_path: Path, kind: str) -> None:
    """Whatever is flipped, cut or put in: no exception, and every whole text that comes is one."""
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(path, FILES)
    else:
        tar(path, FILES, "w:gz" if kind == "tar.gz" else "w")
    raw = path.read_bytes()
    draw = random.Random(0)
    for number in range(150):
        broken = bytearray(raw)
        place = draw.randrange(len(raw))
        if number % 3 == 0:
            broken[place] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            del broken[place:]
        else:
            broken[place:place] = draw.randbytes(draw.randrange(1, 600))
        path.write_bytes(broken)
        texts, bad = read(path)
        assert all(isinstance(item, tuple) for item in bad)
        if kind != "tar":  # a plain .tar has no checksum of its contents
            assert set(texts) <= set(TEXTS.values())
            assert bad or len(texts) == len(TEXTS)
        if kind == "zip" and number % 3 == 0:  # a member, or the directory, or its end
            assert len(texts) >= len(TEXTS) - 1
