"""Datasets from datasets: the same documents, whatever is done to them."""

import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep import rewrite, unit_files
from megahybrid.data_prep.merge import Split
from megahybrid.data_prep.pack import pack
from megahybrid.data_prep.rewrite import (
    export_dataset,
    import_dataset,
    merge_datasets,
    shuffle_datasets,
)
from megahybrid.errors import DataError
from tests.data.corpus import EOD, all_tokens, tokenizer_info, write_corpus

LENGTHS = [5, 90, 1, 30, 7, 64, 2, 9, 200, 3]


def documents(path: Path) -> list[tuple[int, ...]]:
    dataset = verify_dataset(path)
    return [tuple(dataset.document(i).tolist()) for i in range(dataset.documents)]


@pytest.fixture(params=[2**22, 50], ids=["held", "streamed"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "PIECE_TOKENS", request.param)


def test_merged_datasets_follow_one_another(tmp_path: Path, pieces: None) -> None:
    for name in ("a", "b"):
        write_corpus(tmp_path / name, LENGTHS, seed=ord(name), shard_tokens=64)
    made = merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", shard_tokens=100)
    assert documents(tmp_path / "out") == documents(tmp_path / "a") + documents(tmp_path / "b")
    assert made.documents == 20 and len(made.shards) > 2


def test_shuffled_documents_are_the_same_in_another_order(
    tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "a", [4 + n % 50 for n in range(400)])
    shuffle_datasets([tmp_path / "a"], tmp_path / "one", seed=1)
    monkeypatch.setattr(unit_files, "RUN_BYTES", 10_000)
    shuffle_datasets([tmp_path / "a"], tmp_path / "two", seed=1, memory_bytes=20_000)
    shuffle_datasets([tmp_path / "a"], tmp_path / "other", seed=2)
    before = documents(tmp_path / "a")
    one, two, other = (documents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two != other and sorted(one) == sorted(other) == sorted(before)
    assert abs(np.corrcoef([before.index(d) for d in one], range(len(one)))[0, 1]) < 0.2
    with pytest.raises(DataError, match="is not empty"):
        shuffle_datasets([tmp_path / "a"], tmp_path / "one")


def test_split_puts_each_document_in_one_part(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [4 + n % 50 for n in range(400)])
    split = Split(0.25, 3)
    made = shuffle_datasets([tmp_path / "a"], tmp_path / "out", split=split)
    parts = [documents(tmp_path / "out" / name) for name in made]
    assert list(made) == ["train", "held_out", "held_out_long"]
    assert sorted(chain(*parts)) == sorted(documents(tmp_path / "a"))
    assert 60 < len(parts[1]) < 140 and [len(d) for d in parts[2]] == [53] * 3


def test_exported_and_imported_again_nothing_changed(tmp_path: Path, pieces: None) -> None:
    dataset = write_corpus(tmp_path / "a", LENGTHS, shard_tokens=64)
    assert export_dataset(tmp_path / "a", tmp_path / "x/plain") == (10, sum(LENGTHS))
    plain = TokenDataset(tmp_path / "x/plain", vocab_size=1000)
    assert all_tokens(plain).tolist() == all_tokens(dataset).tolist()
    assert list(plain.document_spans()) == list(dataset.document_spans())
    import_dataset(tmp_path / "x/plain", tmp_path / "b", tokenizer_info())
    assert documents(tmp_path / "b") == documents(tmp_path / "a")
    with pytest.raises(DataError, match="exists already"):
        export_dataset(tmp_path / "a", tmp_path / "x/plain")


def test_megatron_reads_what_is_exported(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = write_corpus(tmp_path / "a", LENGTHS, shard_tokens=64)
    export_dataset(tmp_path / "a", tmp_path / "plain")
    theirs = indexed.IndexedDataset(str(tmp_path / "plain"))
    found = np.concatenate([theirs[i] for i in range(len(theirs))])
    assert found.tolist() == all_tokens(dataset).tolist()
    assert len(theirs.document_indices) == len(LENGTHS) + 1


def test_import_ends_every_document_with_eod(tmp_path: Path, pieces: None) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
    contents = [[5, 6, 7], [8, EOD], [9] * 120]
    for tokens in contents:
        builder.add_item(indexed.torch.tensor(tokens))
        builder.end_document()
    builder.finalize(str(tmp_path / "plain.idx"))
    import_dataset(tmp_path / "plain", tmp_path / "b", tokenizer_info())
    expected = [tuple(d) if d[-1] == EOD else (*d, EOD) for d in contents]
    assert documents(tmp_path / "b") == expected


def test_datasets_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", LENGTHS)
    write_corpus(tmp_path / "b", LENGTHS, vocab_size=999)
    with pytest.raises(DataError, match="was made with tokenizer"):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    (tmp_path / "b/manifest.json").unlink()
    with pytest.raises(DataError, match="its vocabulary is unknown"):
        merge_datasets([tmp_path / "b"], tmp_path / "out")


WORDS = {
    "shuffle": ["a", "b", "--output", "out"],
    "import": ["plain", "--output", "out", "--vocab-size", "100", "--eod-id", "0"],
    "export": ["a", "out/x"],
    "pack": ["a", "--output", "out", "--length", "64"],
}
KILLED = """
import os, sys, signal
from pathlib import Path
from megahybrid.cli.data import add_data_commands
import argparse
calls, left = 0, int(sys.argv[1])
def count(frame, event, argument):
    global left
    left -= event == "call" and "data_prep" in frame.f_code.co_filename
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
parser = argparse.ArgumentParser()
add_data_commands(parser.add_subparsers())
sys.argv = ["megahybrid", "data", *sys.argv[2:]]
args = parser.parse_args(sys.argv[1:])
sys.setprofile(count)
args.run(args)
sys.setprofile(None)
print(left)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", WORDS)
def test_killed_anywhere_the_same_command_ends_the_same(tmp_path: Path, name: str) -> None:
    for part in ("a", "b"):
        write_corpus(tmp_path / part, LENGTHS * 3, seed=ord(part), vocab_size=100)
    export_dataset(tmp_path / "a", tmp_path / "plain")

    def call(kill_after: int) -> str:
        words = [sys.executable, "-c", KILLED, str(kill_after), name, *WORDS[name]]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout

    def outside() -> set[str]:
        return {path.name for path in tmp_path.iterdir()} - {"out"}

    before, most = outside(), 10_000
    calls = most - int(call(most).split()[-1])
    expected = content(tmp_path / "out")
    assert len(expected) > 1 and outside() == before
    for part in (0.5, 0.9):  # the very last calls come after the folder has been published
        shutil.rmtree(tmp_path / "out")
        assert not call(int(part * calls)) and content(tmp_path / "out") != expected
        call(most)
        assert content(tmp_path / "out") == expected and outside() == before


def test_plans_are_refused_where_a_dataset_is_wanted(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", LENGTHS)
    pack(tmp_path / "a", tmp_path / "plan", 64)
    for call in (
        lambda: pack(tmp_path / "plan", tmp_path / "out", 32),
        lambda: merge_datasets([tmp_path / "plan"], tmp_path / "out"),
        lambda: shuffle_datasets([tmp_path / "plan"], tmp_path / "out"),
        lambda: export_dataset(tmp_path / "plan", tmp_path / "out"),
    ):
        with pytest.raises(DataError, match=f"plan is a plan of rows.* Name .*{tmp_path}/a\\."):
            call()
    assert not list(tmp_path.glob("out*"))


def test_split_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", LENGTHS)
    with pytest.raises(DataError, match="longest=10 leave no document to train on \\(of 10\\)"):
        shuffle_datasets([tmp_path / "a"], tmp_path / "out", split=Split(0, 10))
    assert not list(tmp_path.glob("out*"))
