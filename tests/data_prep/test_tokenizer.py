import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.data_prep import vocabulary
from megahybrid.data_prep.inputs import cut_units
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.tokenize import tokenize
from megahybrid.data_prep.tokenizer_report import report
from megahybrid.data_prep.vocabulary import train_tokenizer
from megahybrid.errors import DataError
from tests.data_prep.reading import files_of
from tests.data_prep.test_commands import call

# U+2581 is sentencepiece's own mark for a space, and comes back as one.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\u2581\0"), max_size=60)


@settings(max_examples=50)
@given(st.lists(texts, max_size=5))
def test_any_text_survives(tokenizer: Tokenizer, given_texts: list[str]) -> None:
    ids = tokenizer.encode(given_texts)
    assert [tokenizer.decode(item) for item in ids] == given_texts
    assert all(0 < token < tokenizer.info.vocab_size for item in ids for token in item)


@pytest.mark.parametrize("text", ["</s>", "a</s><unk>b", "<s>"])
def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.info.eod_id not in tokenizer.encode([text])[0]
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


@pytest.mark.parametrize("one", ["text", ""])
def test_one_text_without_a_list_is_refused(one: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer._word_cache is not None  # both ways to arrays: word by word, and whole
    for words in (tokenizer, load_tokenizer(write_hugging_face(tmp_path))):
        for encode in (words.encode, words.encode_arrays):
            with pytest.raises(
                TypeError, match=r"takes a list of texts, not one \w+ .*Pass \[text\]"
            ):
                encode(one)
            assert [len(ids) > 0 for ids in encode(("text", "more"))] == [True, True]


def test_training_gives_the_same_bytes_again(corpus: Path, model: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "again.model", 400)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_unigram_can_be_trained_with_special_tokens(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "u.model"
    info = train_tokenizer([corpus], path, 400, kind="unigram", special_tokens=["<|tool|>"])
    assert info.vocab_size == 400
    assert len(load_tokenizer(path).encode(["<|tool|>"])[0]) == 1


def test_vocabulary_that_the_text_cannot_fill_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=60000 cannot be trained on these texts"):
        train_tokenizer([corpus], tmp_path / "a.model", 60_000)


def test_hugging_face_file_is_read_without_its_special_tokens(tmp_path: Path) -> None:
    path = write_hugging_face(tmp_path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.info.kind == "huggingface"
    assert tokenizer.info.vocab_size == 258
    text = "a<|endoftext|>b é\n"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.info.eod_id not in ids and tokenizer.decode(ids) == text
    assert load_tokenizer(path, "<pad>").info.eod_id != tokenizer.info.eod_id
    assert load_tokenizer(tmp_path).info == tokenizer.info
    with pytest.raises(DataError, match="has no token <no>. Name its eod"):
        load_tokenizer(path, "<no>")


def write_hugging_face(folder: Path) -> Path:
    """Bytes as tokens, then two special ones."""
    backend = pytest.importorskip("tokenizers")
    letters = backend.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: index for index, letter in enumerate(sorted(letters))}
    tokenizer = backend.Tokenizer(backend.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = backend.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<pad>"])
    tokenizer.enable_truncation(3)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    assert json.loads(path.read_text())["truncation"]
    return path


@pytest.mark.parametrize("name", ["a.model", "tokenizer.json"])
def test_damaged_or_missing_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x01\x02nonsense")
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path / name)


def test_report_counts_bytes_and_tokens_by_source(
    corpus: Path, model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = tmp_path / "other.model"
    train_tokenizer([corpus], other, 300)
    (tmp_path / "b.txt").write_text("word " * 50)
    sources, used = report(str(model), [str(corpus), f"{tmp_path}/b.txt"], against=str(other))
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert sources[0].bytes == sum(len(text.encode()) for text in texts)
    assert sources[0].tokens == sum(map(len, tokenizer.encode(texts)))
    assert sources[0].tokens_against > sources[0].tokens
    assert sources[1].documents == 1 and not sources[0].changed
    assert used.total() == sources[0].tokens + sources[1].tokens


def test_commands_report_and_adopt(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("tokenizer", "report", str(model), str(corpus), "--against", str(model))
    shown = capsys.readouterr().out
    assert "of 400 ids are used" in shown and "lossless: every text" in shown
    call("tokenizer", "adopt", str(model), "--output", f"{tmp_path}/new.model")
    assert (tmp_path / "new.model").read_bytes() == model.read_bytes()
    with pytest.raises(DataError, match="does not end in .model as"):
        call("tokenizer", "adopt", str(model), "--output", f"{tmp_path}/new.json")
    with pytest.raises(DataError, match="--vocab-size is missing"):
        call("tokenizer", str(corpus), "--output", f"{tmp_path}/new.model")


def test_sample_is_shared_by_weight_and_not_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "LOOK_BYTES", 40_000)
    for name, count in (("a", 4000), ("b", 400)):
        lines = (json.dumps({"text": f"{name} {n} " + "x" * 90}) for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [list(cut_units(files_of(tmp_path / f"{name}.jsonl"), 4000)) for name in "ab"]
    met = []
    read = vocabulary.read_unit
    monkeypatch.setattr(vocabulary, "read_unit", lambda *args: met.append(args) or read(*args))

    def sample(weights: list[float] | None, seed: int = 0) -> list[str]:
        met.clear()
        return list(vocabulary.sampled_texts(sources, weights, 20_000, seed, Fields()))

    texts = sample([1, 3])
    size = {name: sum(len(t) for t in texts if t[0] == name) for name in "ab"}
    assert 4900 <= size["a"] <= 5200 and 14_900 <= size["b"] <= 15_200
    assert len(met) < sum(map(len, sources)) / 2
    assert texts == sample([1, 3]) != sample([1, 3], seed=1)
    by_size = sample(None)
    assert 0.85 < sum(t[0] == "a" for t in by_size) / len(by_size) < 0.95


def test_weights_must_be_one_for_each_input(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--weight is given 1 times with 2 inputs"):
        train_tokenizer([corpus, corpus], tmp_path / "a.model", 400, weights=[1.0])


def test_a_tokenizer_written_anew_under_its_name_is_not_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sees the other cat and the dog runs away\n" * 30)
    model, found = tmp_path / "a.model", []
    for size in (290, 310):
        train_tokenizer([tmp_path / "a.txt"], model, size)
        tokenize([tmp_path / "a.txt"], model, tmp_path / str(size), quiet=True, workers=1)
        found.append(TokenDataset(tmp_path / str(size) / "train").document(0).tolist())
    (encoded,) = load_tokenizer(model).encode([(tmp_path / "a.txt").read_text()])
    assert found[1][:-1] == encoded and found[0] != found[1]
