import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep import document_encoder, plain_text, unit_files
from megahybrid.data_prep import long_text as long_module
from megahybrid.data_prep import merge as merge_module
from megahybrid.data_prep import tokenize as tokenize_module
from megahybrid.data_prep.inputs import UNIT_BYTES, cut_units
from megahybrid.data_prep.tokenize import TokenizeReport, tokenize
from megahybrid.errors import DataError

PARTS = ("train", "held_out", "held_out_long")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units from little text."""
    assert UNIT_BYTES > 10_000
    monkeypatch.setattr(tokenize_module, "cut_units", lambda files, _: cut_units(files, 10_000))


def run(corpus: Path, model: Path, output: Path, **options: object) -> TokenizeReport:
    options = {"held_out": 0.1, "longest": 2, "quiet": True} | options
    return tokenize([corpus], model, output, **options)


def texts_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    dataset = verify_dataset(folder)
    return [tokenizer.decode(dataset.document(i)[:-1].tolist()) for i in range(dataset.documents)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (entry for entry in sorted(folder.rglob("*")) if entry.is_file())
    return {str(entry.relative_to(folder)): entry.read_bytes() for entry in files}


def test_every_document_is_in_exactly_one_part(
    corpus: Path, model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    report = run(corpus, model, tmp_path / "out")
    expected = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    parts = {part: texts_of(tmp_path / "out" / part, tokenizer) for part in PARTS}
    assert Counter(chain(*parts.values())) == Counter(expected)
    assert {part: len(found) for part, found in parts.items()} == report.documents
    assert 10 <= len(parts["held_out"]) <= 50
    lengths = sorted((len(ids) for ids in tokenizer.encode(expected)), reverse=True)
    assert sorted(map(len, tokenizer.encode(parts["held_out_long"])), reverse=True) == lengths[:2]
    places = [expected.index(text) for text in parts["train"]]
    assert abs(np.corrcoef(places, range(len(places)))[0, 1]) < 0.2
    names = sorted(entry.name for entry in (tmp_path / "out").iterdir())
    assert names == sorted([*PARTS, "job.json"])


def test_bytes_do_not_depend_on_workers_or_memory(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    run(corpus, model, tmp_path / "one", workers=1)
    run(corpus, model, tmp_path / "two", workers=2, memory_bytes=30_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_seed_gives_another_order_of_the_same_documents(
    corpus: Path, model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = []
    for seed in (0, 1):
        run(corpus, model, tmp_path / str(seed), seed=seed, held_out=0, longest=0)
        found.append(texts_of(tmp_path / str(seed) / "train", tokenizer))
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1])


def test_interrupted_job_goes_on_and_ends_with_the_same_bytes(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, model, tmp_path / "whole")
    encode = tokenize_module.encode_unit
    for stop_at in (0, 3, 7):
        done: list[int] = []

        def encode_some(job, number, unit, stop_at=stop_at, done=done):
            if number == stop_at:
                raise KeyboardInterrupt
            done.append(number)
            return encode(job, number, unit)

        with monkeypatch.context() as patch:
            patch.setattr(tokenize_module, "encode_unit", encode_some)
            with pytest.raises(KeyboardInterrupt):
                run(corpus, model, tmp_path / "broken")
        assert not (tmp_path / "broken/train").exists()
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module.Merge, "run", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, model, tmp_path / "broken")
    with pytest.raises(DataError, match="holds an unfinished job with other inputs or options"):
        run(corpus, model, tmp_path / "broken", seed=5)
    run(corpus, model, tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def raise_interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_copies_of_a_document_are_never_on_both_sides(
    model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "twice.jsonl"
    lines = [json.dumps({"text": f"document {number}" * (1 + number % 7)}) for number in range(60)]
    path.write_text("\n".join(lines + lines))
    run(path, model, tmp_path / "out", held_out=0.3)
    parts = [set(texts_of(tmp_path / "out" / part, tokenizer)) for part in PARTS]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sum(map(len, parts)) == 60 and all(parts)


def test_bad_lines_are_counted_and_listed(corpus: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    shutil.copy(corpus, path)
    with open(path, "ab") as file:
        file.write(b'{"text": \n{"text": "a\\u0000"}\n{"text": "\xff"}\n')
    report = run(path, model, tmp_path / "out")
    assert report.bad == {"NUL character": 1, "broken json": 1, "broken utf-8": 1}
    quarantine = (tmp_path / "out/quarantine.jsonl").read_text()
    listed = [json.loads(line) for line in quarantine.splitlines()]
    assert [item["reason"] for item in listed] == ["broken json", "NUL character", "broken utf-8"]
    raw = path.read_bytes()
    assert raw[listed[2]["offset"] :].startswith(b'{"text": "\xff"}')
    assert report.loss.lost_bytes == sum(item["lost"] for item in listed) == 10 + 20 + 14
    assert report.loss.bytes == len(raw)
    with pytest.raises(DataError, match=rf"=1e-05 is less .* 0\.01% \(44 of {len(raw):,}\)"):
        run(path, model, tmp_path / "strict", max_bad_fraction=1e-5)


BAD_LINES = [
    *(b"{", b"}", b"[", b"nul", b'{"text"', b'{"text":', b'{"text": "a', b'{"text": "a"}}'),
    *(b'{"text": "a",}', b"{'text': 'a'}", b'{text: "a"}', b'{"text": "\t"}', b"\xef\xbb\xbf\x00"),
    *(b"[" * 5000, b'{"a":' * 5000, b'{"text": "\xff"}', b'{"text": "\xc3"}', b"\xfe\xff\x00{"),
    *(b'{"text": "\xed\xa0\x80"}', b'{"text": "\\ud800"}', b'{"text": "\\udc00a"}', b"\x00"),
    *(b'{"text": "a\\u0000"}', b'{"text": ""}', b'{"text": "  "}', b'{"text": null}', b"null"),
    *(
        b'{"text": ["a"]}',
        b'{"text": {"a": 1}}',
        b'{"Text": "a"}',
        b"5",
        b'"a"',
        b'{"text": 1e999}',
    ),
    *(b'{"text": "\xc0\xaf"}', b"\x1f\x8b\x08\x00", b'{"text": "x"} {"text": "y"}'),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_many_kinds_of_bad_line_cost_themselves_alone(
    model: Path, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    assert len(BAD_LINES) >= 30
    path = tmp_path / "bad.jsonl"
    good = [json.dumps({"text": f"good {number}"}).encode() for number in range(len(BAD_LINES))]
    path.write_bytes(b"\n".join(chain(*zip(good, BAD_LINES, strict=True))) + b"\n")
    report = run(
        path, model, tmp_path / "out", held_out=0, longest=0, max_bad_fraction=0.6, workers=workers
    )
    found = texts_of(tmp_path / "out/train", tokenizer)
    assert sorted(found) == sorted(f"good {number}" for number in range(len(good)))
    assert sum(report.bad.values()) + report.loss.empty == len(BAD_LINES)
    assert report.loss.empty == 2 and "empty" not in report.bad
    raw = path.read_bytes()
    for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines():
        item = json.loads(line)
        assert raw[item["offset"] :].split(b"\n")[0] in BAD_LINES, item


def test_inputs_without_documents_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="the inputs hold no document \\(1 no text field 'text'"):
        run(tmp_path / "a.jsonl", model, tmp_path / "out")


def test_shards_beyond_the_format_are_refused_before_the_work(corpus: Path, model: Path) -> None:
    with pytest.raises(DataError, match="shard_tokens=2147483648 is not from 1 to 2147483647"):
        run(corpus, model, corpus.parent / "out", shard_tokens=2**31)
    assert not (corpus.parent / "out").exists()


def test_holding_out_everything_is_refused(corpus: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longest=300 leave no document to train on \\(of 300"):
        run(corpus, model, tmp_path / "out", longest=300)


def test_finished_job_is_not_done_again(corpus: Path, model: Path, tmp_path: Path) -> None:
    report = run(corpus, model, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert run(corpus, model, tmp_path / "out") == report
    assert contents(tmp_path / "out") == before
    with pytest.raises(DataError, match="is not empty: it was made .* \\(--seed was 0, is 1\\)"):
        run(corpus, model, tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") == before


def test_output_among_the_inputs_is_no_input(corpus: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(corpus, tmp_path / "a.jsonl")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"lost.*: less than 0.01% \(3 of "):
        run(tmp_path, model, tmp_path / "out", max_bad_fraction=0)
    report = run(tmp_path, model, tmp_path / "out")
    assert run(tmp_path, model, tmp_path / "out") == report
    assert TokenDataset(tmp_path / "out/train").manifest.sources[0]["files"] == 1


def test_copies_can_be_left_out(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    lines = [json.dumps({"text": f"document {number}"}) for number in range(60)]
    path.write_text("\n".join(lines + lines[:25] + lines[:5]))
    report = run(path, model, tmp_path / "out", held_out=0, longest=0, deduplicate=True)
    assert report.duplicates == 30
    assert sorted(texts_of(tmp_path / "out/train", tokenizer)) == sorted(
        f"document {number}" for number in range(60)
    )


def test_documents_beyond_the_memory_are_copied_in_pieces(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, model, tmp_path / "whole", shard_tokens=20_000)
    monkeypatch.setattr(document_encoder, "LONG_CHARACTERS", 2000)
    monkeypatch.setattr(unit_files, "RUN_BYTES", 20_000)
    monkeypatch.setattr(long_module, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(merge_module, "COPY_TOKENS", 700)
    run(corpus, model, tmp_path / "pieces", shard_tokens=20_000, memory_bytes=9_000)
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


@pytest.mark.parametrize("broken", [b"\xff", b"\0", b""])
def test_long_text_is_streamed_or_taken_back(
    model: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: bytes,
) -> None:
    monkeypatch.setattr(plain_text, "LONG_BYTES", 10_000)
    monkeypatch.setattr(plain_text, "CHUNK_BYTES", 777)
    monkeypatch.setattr(long_module, "PIECE_CHARACTERS", 1000)
    text = "".join(f"Sentence {n} of a long text, é and 語.\n" for n in range(2000))
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + broken)
    (tmp_path / "short.txt").write_text("short")
    report = run(
        tmp_path / "*.txt", model, tmp_path / "out", held_out=0, longest=0, max_bad_fraction=1
    )
    found = texts_of(tmp_path / "out/train", tokenizer)
    if broken:
        assert found == ["short"] and list(report.bad.values()) == [1]
    else:
        assert sorted(found) == sorted(["short", text])
        lengths = {len(ids) + 1 for ids in tokenizer.encode(["short", text])}
        dataset = TokenDataset(tmp_path / "out/train")
        assert {size for _, size in dataset.document_spans()} == lengths


def test_job_with_mostly_bad_lines_is_stopped_early(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    encode = tokenize_module.encode_unit
    monkeypatch.setattr(
        tokenize_module, "encode_unit", lambda *args: done.append(args[1]) or encode(*args)
    )
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good one"}\n{"text": 5}\n' * 20_000)
    with pytest.raises(
        DataError, match=r"is less than what is lost so far: \d.\d\d% .* then goes on"
    ):
        run(path, model, tmp_path / "out", held_out=0, longest=0)
    assert len(done) < 0.2 * path.stat().st_size / 10_000
    report = run(path, model, tmp_path / "out", max_bad_fraction=0.6, held_out=0, longest=0)
    assert report.bad == {"no text field 'text'": 20_000}


@pytest.mark.slow
def test_job_killed_at_any_moment_ends_with_the_same_bytes(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"{n} " + json.loads(line)["text"]}) + "\n"
            for n in range(15)
            for line in corpus.read_text().splitlines()
        )
    )
    words = [str(path), "--tokenizer", str(model), "--held-out", "0.1", "--longest", "2"]

    def call(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megahybrid", "data", "tokenize", *words]
        return subprocess.Popen(
            [*command, "--output", str(output), "--workers", "2"],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )

    began = time.monotonic()
    assert call(tmp_path / "whole").wait() == 0
    whole_seconds = time.monotonic() - began
    draw = random.Random(0)
    kills = 0
    while True:
        process = call(tmp_path / "killed")
        try:
            code = process.wait(draw.uniform(0.2, 0.9) * whole_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if kills < 20:
                continue
            code = call(tmp_path / "killed").wait()
        assert code == 0
        if kills >= 20:
            break
        # It was through before it could be killed: begin again, and strike earlier.
        shutil.rmtree(tmp_path / "killed")
        whole_seconds = max(1.0, 0.8 * whole_seconds)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_folder_of_text_files_is_one_document_each(
    model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / "texts" / str(number)).mkdir(parents=True)
        (tmp_path / "texts" / str(number) / "a.txt").write_text(f"text {number}\n")
    run(tmp_path / "texts", model, tmp_path / "out", held_out=0, longest=0, workers=2)
    assert sorted(texts_of(tmp_path / "out/train", tokenizer)) == [f"text {i}\n" for i in range(5)]
    assert TokenDataset(tmp_path / "out/train").manifest.sources[0]["files"] == 5
