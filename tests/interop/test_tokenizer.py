"""A tokenizer leaves with its ids."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megahybrid.config import RunConfig
from megahybrid.data.tokenizer import load_tokenizer, train_sentencepiece
from megahybrid.errors import DataError, InteropError
from megahybrid.interop import tokenizer as written
from megahybrid.interop.export import export
from megahybrid.interop.import_model import import_model
from megahybrid.interop.logit_proof import quiet
from megahybrid.interop.tokenizer import probe_texts, write_tokenizer
from tests.interop.examples import ROPE, model_of, output_of_card, run_of_model
from tests.interop.stock_models import LLAMA, no_word_of_transformers
from tests.interop.stock_models import written as stock_model

TEXTS = [
    "def f(x):\n    return x + 12\n",
    "The quick brown fox, é ü 漢字.\n\n\n        done  ok",
] * 40

SOURCE = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]


@pytest.fixture(autouse=True)
def _less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "TEXT_CHARACTERS", 60_000)
    monkeypatch.setattr(written, "FUZZ", 300)


def run(vocab_size: int = 600) -> RunConfig:
    return run_of_model(model_of([ROPE], vocab_size=vocab_size))


def folder_with_config(path: Path, kind: str = "cohere2") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    return path


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("kind", ["cohere2", "llama", "qwen3", "olmo3", "smollm3"])
def test_a_bpe_of_sentencepiece_has_the_same_ids_everywhere(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "t.model"
    file.write_bytes(train_sentencepiece(TEXTS, vocab_size=340, special_tokens=["<|im|>"]))
    folder = folder_with_config(tmp_path / "out", kind)
    found = write_tokenizer(folder, run(), str(file))
    ours, theirs = load_tokenizer(file), auto(folder)
    texts = [*probe_texts(ours, seed=9), "<|im|>a</s> b</s>", ""]
    ids = ours.encode(texts)
    assert theirs(texts)["input_ids"] == ids
    assert [theirs.decode(row) for row in ids[:200]] == [ours.decode(row) for row in ids[:200]]
    assert found.eod_id == theirs.eos_token_id == ours.info.eod_id
    assert (folder / "tokenizer.json").exists()


def test_a_unigram_of_sentencepiece_leaves_in_a_form_with_its_ids(tmp_path: Path) -> None:
    file = tmp_path / "t.model"
    file.write_bytes(train_sentencepiece(SOURCE, vocab_size=500, kind="unigram"))
    folder = folder_with_config(tmp_path / "out")
    write_tokenizer(folder, run(), str(file))
    ours = load_tokenizer(file)
    texts = list(probe_texts(ours, seed=9))
    assert auto(folder)(texts)["input_ids"] == ours.encode(texts)


def huggingface(path: Path) -> Path:
    """A byte-level tokenizer.json whose post-processor adds a token at the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(5)
    backend.save(str(path))
    return path


def test_a_tokenizer_json_adds_and_reads_no_special_token(tmp_path: Path) -> None:
    file = huggingface(tmp_path / "tokenizer.json")
    folder = folder_with_config(tmp_path / "out", "llama")
    write_tokenizer(folder, run(), str(file))
    ours, theirs = load_tokenizer(file), auto(folder)
    texts = ["<s>hello<|endoftext|> there, more than five tokens", "", *TEXTS]
    assert theirs(texts)["input_ids"] == ours.encode(texts)
    assert theirs.eos_token_id == ours.info.eod_id == 1


def test_a_model_brings_its_tokenizer_and_leaves_with_a_program_that_writes_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The source is gone by then: an import stands alone, and so does an export."""
    folder = stock_model(tmp_path / "theirs", "Llama", LLAMA | {"vocab_size": 600})
    huggingface(folder / "tokenizer.json")
    import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    shutil.rmtree(folder)
    export(tmp_path / "ours", tmp_path / "out")
    with no_word_of_transformers(caplog):
        said = output_of_card(tmp_path / "out")
    assert said.startswith("Once upon a time") and len(said) > len("Once upon a time")


def test_one_other_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = huggingface(tmp_path / "tokenizer.json")
    folder = folder_with_config(tmp_path / "out", "llama")
    right = written._forms

    def wrong(path: Path, eod_id: int) -> list[dict[str, bytes]]:
        files = right(path, eod_id)[0]
        tokenizer = json.loads(files["tokenizer.json"])
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        return [files | {"tokenizer.json": json.dumps(tokenizer).encode()}]

    monkeypatch.setattr(written, "_forms", wrong)
    with pytest.raises(InteropError, match="gives other ids for"):
        write_tokenizer(folder, run(), str(file))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    file = huggingface(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"more than the model knows \(model.vocab_size=61\)"):
        write_tokenizer(folder_with_config(tmp_path / "out"), run(61), str(file))
