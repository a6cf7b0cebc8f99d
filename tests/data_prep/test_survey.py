"""What a file is, by its content; what a folder gives; streams."""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.dataset import TokenDataset
from megahybrid.data_prep import json_array, sniff
from megahybrid.data_prep.documents import BadDocument, Document, read_unit
from megahybrid.data_prep.inputs import InputFile, identify
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.sniff import NotText
from megahybrid.data_prep.survey import survey
from megahybrid.data_prep.tokenize import tokenize
from megahybrid.data_prep.vocabulary import train_tokenizer
from megahybrid.errors import DataError

ROWS = [{"text": f"text {n} é", "id": n} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LONG = json.dumps({"text": "x" * 3 * 2**16}) + "\n"
PROSE = "It was the best of times,\nit was the worst of times.\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
DIGESTS = "".join(f"{n:064x}  file-{n}.txt\n" for n in range(3))


def kind(path: Path, asked: str = "auto") -> str:
    found = identify(path, Fields(format=asked))
    return str(found.format) if isinstance(found, InputFile) else f"- {found.why}"


CASES: list[tuple[str, str | bytes, str]] = [
    ("a.json", LINES, "jsonl"),
    ("a.txt", LINES, "jsonl"),
    ("noname", LINES, "jsonl"),
    ("a.json", "\ufeff" + LINES, "jsonl"),
    ("a.json", "\n  \n" + LINES, "jsonl"),
    ("a.json", LINES.replace("\n", "\r\n"), "jsonl"),
    ("a.json", LONG + LINES, "jsonl"),
    ("a.json", LONG, "jsonl"),
    ("a.json", LINES[:-10], "jsonl"),
    ("a.json", '{"text": "one"}', "jsonl"),
    ("a.json", "# made by hand\n" + LINES, "jsonl"),
    ("a.jsonl", "# made by hand\n" + LINES, "jsonl"),
    ("a.jsonl", PROSE, "jsonl"),
    ("a.jsonl", '{"other": 1}\n', "jsonl"),
    ("a.json", '{"text": "one"}\nnot json\nneither\nnor this\n', "jsonl"),
    ("a.jsonl", '{"text": "one"}\nnot json\nneither\nnor this\n', "jsonl"),
    ("a.json", '{"name": "config", "version": 1}', "- JSON that is not a list of documents"),
    (
        "a.json",
        json.dumps({"a": {"b": [1, 2]}}, indent=1),
        "- JSON that is not a list of documents",
    ),
    ("a.jsonl", json.dumps({"a": {"b": 1}}, indent=1), "- JSON that is not a list of documents"),
    ("a.ipynb", json.dumps({"cells": [1]}, indent=1), "- JSON that is not a list of documents"),
    ("noname", json.dumps(ROWS[0], indent=1) * 3, "- JSON that is not a list of documents"),
    ("a.json", "[1, 2, 3]", "- JSON that is not a list of documents"),
    ("a.json", '[{"id": 1}]', "- JSON that is not a list of documents"),
    ("a.json", PROSE, "- JSON that is not a list of documents"),
    ("a.json", json.dumps(ROWS), "json"),
    ("a.json", json.dumps(ROWS, indent=2), "json"),
    ("a.jsonl", json.dumps(ROWS, indent=2), "json"),
    ("noname", "\ufeff " + json.dumps(ROWS), "json"),
    ("a.json", json.dumps(["one", "two"]), "json"),
    ("a.json", json.dumps([{"text": "x" * 3 * 2**16}]), "json"),
    ("a.json", json.dumps(ROWS)[:-30], "json"),
    ("a.json", '"one"\n"two"\n', "strings"),
    ("a.txt", PROSE, "text"),
    ("a.txt", "{ begins with a bracket\nand goes on\n", "text"),
    ("a.txt", '{"x"} is a set\n', "text"),
    ("a.md", "[link](a.html) and more\n", "text"),
    ("a.md", "[1] a reference, 1999\n[2] another one\n", "text"),
    ("a.py", "{1: 2}\n[3]\n", "text"),
    ("a.txt", '"Quoted," she said.\n"So it is."\n', "text"),
    ("a.txt", PROSE.encode("utf-16"), "text"),
    ("a.txt", "Это текст".encode("cp1251"), "text"),
    ("a.txt", b"", "text"),
    ("noname", PROSE, "text"),
    ("a.png", PNG, "- image"),
    ("noname", PNG, "- image"),
    ("a.bin", bytes(range(256)) * 9, "- binary"),
    ("a.csv", "id,name\n1,a\n", "- table"),
    ("a.txt", "".join(f"{n}\tword {n}\t{n * n}\n" for n in range(30)), "- table"),
    ("a.txt", "word,1.5,x\n" * 12, "- table"),
    ("verse.txt", "Oft, in the stilly night,\n" * 20, "text"),
    ("pairs.txt", "a house\tein Haus\n" * 20, "text"),
    ("SHA256SUMS", DIGESTS, "- checksums"),
    ("a.md5", "d41d8cd98f00b204e9800998ecf8427e", "- checksums"),
    ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), "jsonl in gzip"),
    ("a.json.gz", gzip.compress(LINES.encode(), mtime=0), "jsonl in gzip"),
    ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), "json in gzip"),
    ("a.json.gz", LINES, "jsonl"),
    ("a.txt.gz", PROSE, "text"),
    ("a.gz", gzip.compress(PROSE.encode(), mtime=0), "text in gzip"),
    ("a.png.gz", gzip.compress(PNG, mtime=0), "- image"),
    ("a.json.gz", b"\0\1\2broken" + bytes(range(256)), "text in gzip"),
]


@pytest.mark.parametrize(
    "name, content, expected", CASES, ids=[f"{one[0]}-{one[2]}-{n}" for n, one in enumerate(CASES)]
)
def test_content_says_what_a_file_is(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(raw)
    assert kind(tmp_path / name) == expected


def test_packed_file_with_a_broken_head_is_read_as_its_name_says(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(LINES.encode() * 50))
    raw[0] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    assert kind(tmp_path / "a.jsonl.gz") == "jsonl in gzip"


@pytest.mark.parametrize("asked", ["text", "jsonl", "json", "parquet"])
def test_format_that_is_asked_for_is_taken(tmp_path: Path, asked: str) -> None:
    for name, content in (("a.json", LINES), ("b.bin", "\0\1\2"), ("c.jsonl", PROSE)):
        (tmp_path / name).write_text(content)
        assert kind(tmp_path / name, asked) == asked
    (tmp_path / "a.gz").write_bytes(gzip.compress(LINES.encode()))
    assert kind(tmp_path / "a.gz", asked) == f"{asked} in gzip"


rows = st.one_of(
    st.text(max_size=30),
    st.dictionaries(
        st.sampled_from(
            ["text", "id", '"q'],
        ),
        st.one_of(st.text('ab"\\{}[],é\n', max_size=20), st.integers(), st.lists(st.integers())),
    ).map(lambda row: {"text": "t"} | row),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, max_size=12), st.sampled_from([None, 1]), st.integers(1, 40))
def test_array_gives_its_elements(values: list[object], indent: int | None, chunk: int) -> None:
    raw = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    before, json_array.CHUNK_BYTES = json_array.CHUNK_BYTES, chunk
    try:
        reader = json_array.ArrayReader(io.BytesIO(raw), 2**20)
        found = []
        while (element := reader.next()) is not None:
            assert not element.problem
            assert raw[element.offset :][: element.size] == element.raw
            found.append(json.loads(element.raw))
            reader.learn(element)
    finally:
        json_array.CHUNK_BYTES = before
    assert found == values


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from([None, 1]))
def test_flipped_byte_of_an_array_costs_two_elements_at_most(
    place: int, flip: int, indent: int | None
) -> None:
    texts = [f'text {n} "quoted" {{n}}, [x]' for n in range(30)]
    raw = bytearray(
        json.dumps([{"text": text, "n": [1]} for text in texts], indent=indent).encode()
    )
    raw[1 + place % (len(raw) - 1)] ^= flip
    with TemporaryDirectory() as made:
        path = Path(made) / "a.json"
        path.write_bytes(raw)
        found = survey([path], fields=Fields(format="json"))
        items = [item for unit in found.units()[0] for item in read_unit(unit)]
    good = [item.text for item in items if isinstance(item, Document)]
    assert len(set(good) & set(texts)) >= 28
    lost = sum(item.size for item in items if isinstance(item, BadDocument))
    assert lost > 0 or len(good) == 30


def test_every_way_of_json_gives_the_same_documents(model: Path, tmp_path: Path) -> None:
    ways = {
        "a.jsonl": LINES.encode(),
        "b.json": LINES.encode(),
        "c.json": json.dumps(ROWS, indent=1).encode(),
        "d.json.gz": gzip.compress(LINES.encode()),
        "e.json.gz": gzip.compress(json.dumps(ROWS).encode()),
        "f": LINES.encode(),
    }
    made = set()
    for name, raw in ways.items():
        (tmp_path / name).write_bytes(raw)
        tokenize([tmp_path / name], model, tmp_path / f"{name}.out", kept=["id"], quiet=True)
        folder = tmp_path / f"{name}.out/train"
        made.add(
            (folder / "shard-00000.bin").read_bytes() + (folder / "shard-00000.jsonl").read_bytes()
        )
        (source,) = TokenDataset(folder).manifest.sources
        assert source["formats"] == {kind(tmp_path / name): 1}
    assert len(made) == 1


def corpus_folder(tmp_path: Path, prose: int = 400) -> Path:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for number in range(5):
        (folder / f"deep/{number}.qqq").write_text(PROSE * prose + str(number))
    (folder / "a.json.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "SHA256SUMS").write_text(DIGESTS)
    (folder / "logo.png").write_bytes(PNG[:300])
    (folder / "package.json").write_text('{\n "name": "x"\n}\n')
    return folder


def test_folder_is_told_by_suffix(model: Path, tmp_path: Path) -> None:
    folder = corpus_folder(tmp_path)
    (folder / "gone").symlink_to(folder / "nothing")
    (folder / "linked").symlink_to(folder / "deep")
    told: list[str] = []
    report = tokenize([folder], model, tmp_path / "out", quiet=True, print_line=told.append)
    assert report.documents == {"train": 10} and report.loss.lost_bytes == 0
    rows = {tuple(line.split()) for line in told}
    size = str((folder / "a.json.gz").stat().st_size)
    assert (".json.gz", "1", size, "jsonl", "in", "gzip") in rows
    assert (".qqq", "5", f"{5 * (400 * len(PROSE) + 1):,}", "text") in rows
    assert (".png", "1", "300", "left", "out:", "image") in rows
    assert ("(none)", "1", str(len(DIGESTS)), "left", "out:", "checksums") in rows
    assert ("(none)", "1", "0", "left", "out:", "dead", "link") in rows
    assert ("(none)", "1", "0", "left", "out:", "link", "to", "a", "folder") in rows
    (source,) = TokenDataset(tmp_path / "out/train").manifest.sources
    assert source["formats"] == {"jsonl in gzip": 1, "text": 5} and source["files"] == 6
    assert source["left_out"] == {"files": 5, "bytes": 300 + len(DIGESTS) + 17}


def test_folder_with_much_that_is_no_document_is_refused(model: Path, tmp_path: Path) -> None:
    folder = corpus_folder(tmp_path, prose=20)
    for command in (
        lambda: tokenize([folder], model, tmp_path / "out", quiet=True),
        lambda: train_tokenizer([folder], tmp_path / "a.model", 300),
    ):
        with pytest.raises(DataError, match=r"% of its bytes in files .*1 image.*--glob.*--format"):
            command()
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.model").exists()
    report = tokenize([folder], model, tmp_path / "out", quiet=True, pattern="**/*.qqq")
    assert report.documents == {"train": 5}
    with pytest.raises(DataError, match="what is lost.*: .*broken utf-8"):
        tokenize([folder], model, tmp_path / "text", quiet=True, format="text", max_bad_fraction=0)


def test_one_input_of_many_is_weighed_alone(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large/a.txt").write_text(PROSE * 10_000)
    (tmp_path / "small").mkdir()
    (tmp_path / "small/a.json").write_text('{"name":\n 1}')
    with pytest.raises(DataError, match="small has 100.0% of its bytes"):
        survey([tmp_path / "large", tmp_path / "small"])
    found = survey([tmp_path / "large/a.txt", tmp_path / "small/a.json"])
    assert len(found.files) == 1


def test_folder_that_may_not_be_opened_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = corpus_folder(tmp_path)
    scan = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="deep: Permission denied"):
        survey([folder])


def call(*words: str, data: bytes) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megahybrid", "data", "tokenize", *words]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@pytest.mark.parametrize("given", ["-", "/dev/stdin"])
def test_stdin_is_read_by_its_content(model: Path, tmp_path: Path, given: str) -> None:
    many = "".join(json.dumps({"text": f"{n} " + "word " * 300}) + "\n" for n in range(3000))
    (tmp_path / "a.jsonl").write_text(many)
    tokenize([tmp_path / "a.jsonl"], model, tmp_path / "file", quiet=True)
    words = (given, "--tokenizer", str(model), "--workers", "2")
    for name, data in (("plain", many.encode()), ("packed", gzip.compress(many.encode()))):
        done = call(*words, "--output", f"{tmp_path}/{name}", data=data)
        assert done.returncode == 0, done.stderr
        shard = (tmp_path / name / "train/shard-00000.bin").read_bytes()
        assert shard == (tmp_path / "file/train/shard-00000.bin").read_bytes()
        assert "3,000 documents" in done.stdout and "jsonl" in done.stdout
    again = call(*words, "--output", f"{tmp_path}/plain", data=many.encode())
    assert again.returncode == 0, again.stderr
    (source,) = TokenDataset(tmp_path / "plain/train").manifest.sources
    assert source["path"] == given and source["formats"] == {"jsonl": 1}
    done = call(*words, "--output", f"{tmp_path}/no", data=json.dumps(ROWS[0], indent=1).encode())
    assert done.returncode == 2 and "--format" in done.stderr and not (tmp_path / "no").exists()


def test_pipe_by_name_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(LINES * 5000,))
    writer.start()
    found = survey([pipe])
    writer.join()
    items = [item for unit in found.units()[0] for item in read_unit(unit)]
    assert len(items) == 25_000 and all(isinstance(item, Document) for item in items)
    assert items[0].name == f"{pipe}:0" and found.files[0].size == 5000 * len(LINES.encode())
    with pytest.raises(DataError, match="a stream twice"):
        survey(["-", "-"])
    with pytest.raises(DataError, match="/dev/zero is a device"):
        survey(["/dev/zero"])


@given(
    st.binary(max_size=300), st.sampled_from(["a.txt", "a.json", "a.jsonl", "a.gz", "a", "a.tar"])
)
def test_no_bytes_make_it_fail(raw: bytes, name: str) -> None:
    for asked in sniff.FORMATS:
        found = sniff.detect_format(io.BytesIO(raw), name, "text", asked)
        assert isinstance(found, sniff.Format | NotText)
