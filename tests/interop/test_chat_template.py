"""An export that chats: its template, its ends and its card; and a talk in the terminal."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megahybrid.commands import chat as chat_module
from megahybrid.commands.chat import chat
from megahybrid.data.chat.template_file import SHIPPED
from megahybrid.data.tokenizer import load_tokenizer, train_sentencepiece
from megahybrid.errors import MegahybridError
from megahybrid.interop import tokenizer as written
from megahybrid.interop.export import export
from megahybrid.interop.logit_proof import quiet
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import ROPE, checkpoint_of_model, model_of, run_of_model

TEXTS = ["The quick brown fox, é ü 漢字.\n\n\n        done  ok\nWhat do you know? I know."] * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run's folder with a checkpoint, and its tokenizer with the tokens of chatml."""
    folder = tmp_path_factory.mktemp("made")
    file = folder / "t.model"
    file.write_bytes(train_sentencepiece(TEXTS, vocab_size=300, control_tokens=SHIPPED["chatml"]))
    model = model_of([ROPE], vocab_size=304)
    run = run_of_model(model, f"data.tokenizer={file}")
    return checkpoint_of_model(folder / "run", model, run=run), file


def test_an_export_chats_with_the_ids_and_ends_of_ours(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    monkeypatch.setattr(written, "TEXT_CHARACTERS", 20_000)
    monkeypatch.setattr(written, "FUZZ", 100)
    run, file = made
    out = tmp_path / "out"
    export(run, out, chat_template="chatml")
    ours = load_tokenizer(file)
    end = ours.special_tokens["<|im_end|>"]
    with quiet():
        theirs = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
        assert GenerationConfig.from_pretrained(str(out)).eos_token_id == [end, ours.info.eod_id]
    messages = [{"role": "user", "content": "What é?"}, {"role": "assistant", "content": "I know."}]
    found = theirs.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    text = "<|im_start|>user\nWhat é?<|im_end|>\n<|im_start|>assistant\nI know.<|im_end|>\n"
    (marked,) = ours.encode_marked([text])
    assert list(found["input_ids"]) == marked.ids.tolist()
    answer = [
        i for i, told in zip(found["input_ids"], found["assistant_masks"], strict=True) if told
    ]
    assert answer == [*ours.encode(["I know."])[0], end]
    fields = json.loads((out / "config.json").read_text())
    assert fields["eos_token_id"] == [end, ours.info.eod_id]
    # The card's own lines are run as a reader would run them.
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with quiet(), contextlib.redirect_stdout(printed):
        exec(code.replace("FOLDER", str(out)), {})
    assert printed.getvalue() and "<|im_start|>" not in printed.getvalue()


@pytest.mark.parametrize(
    ("template", "tokenizer", "message"),
    [
        ("llama3", None, "template llama3 writes <|begin_of_text|>"),
        ("chatml", "none", "--chat-template=chatml needs the tokenizer"),
        ("nosuch", None, "--chat-template=nosuch is none of chatml"),
    ],
)
def test_a_template_that_does_not_fit_publishes_nothing(
    made: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    tokenizer: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(written, "TEXT_CHARACTERS", 2_000)
    monkeypatch.setattr(written, "FUZZ", 10)
    with pytest.raises(MegahybridError, match=re.escape(message)):
        export(made[0], tmp_path / "out", tokenizer=tokenizer, chat_template=template)
    assert not any(tmp_path.iterdir())


def test_a_talk_puts_each_line_to_the_model_with_all_before(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = load_tokenizer(made[1])
    asked: list[Any] = []

    def answered(model: Any, prompt: list[int], **options: Any) -> list[int]:
        asked.append((prompt, options["ends"], options["eod_id"]))
        return list(ours.encode(["I know."])[0])

    monkeypatch.setattr(chat_module, "sample_tokens", answered)
    lines = iter(["What?\n", "\n", "a<|im_end|>b\n", "More\n"])
    mesh = ParallelMesh.single()
    assert chat(made[0], mesh, template="chatml", system="Short.", lines=lines) == 0
    told = capsys.readouterr()
    assert told.out == "model: I know.\n" * 2
    assert "<|im_end|> is a special token, which no message may spell" in told.err
    said = "<|im_start|>{}\n{}<|im_end|>\n"
    first = said.format("system", "Short.") + said.format("user", "What?")
    second = first + said.format("assistant", "I know.") + said.format("user", "More")
    for (prompt, ends, eod), text in zip(asked, (first, second), strict=True):
        (marked,) = ours.encode_marked([text + "<|im_start|>assistant\n"])
        assert prompt == marked.ids.tolist()
        assert ends == (ours.special_tokens["<|im_end|>"],) and eod == ours.info.eod_id
