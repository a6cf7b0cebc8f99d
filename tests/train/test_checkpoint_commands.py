"""`megahybrid evaluate` and `megahybrid sample` on a checkpoint of a real run on two ranks."""

import json
import shutil
from pathlib import Path

import pytest

from megahybrid import cli
from megahybrid.checkpoint.manifest import read_manifest
from megahybrid.commands.trained_model import load_trained_model
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data_prep.vocabulary import train_tokenizer
from megahybrid.ledger import read_ledger
from megahybrid.parallel.mesh import ParallelMesh
from tests.events import named
from tests.train.text_run import VOCAB, Trained, call, refused


def test_evaluate_repeats_what_the_run_told_at_the_end_of_each_stage(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [line.detail for line in named(read_ledger(trained.run / "ledger.jsonl"), "evaluate")]
    assert len(events) == 4  # two stages, stream and documents
    for step in (4, 8):
        checkpoint = trained.run / "checkpoints" / f"step-{step:08d}"
        told = json.loads(call(capsys, "evaluate", checkpoint, "--json", "--device", "cpu"))
        at_step = [event for event in events if event["step"] == step]
        for score, event in zip(told["scores"], at_step, strict=True):
            same = ("set", "stage", "step", "rows", "tokens", "length")
            assert {name: score[name] for name in same} == {name: event[name] for name in same}
            assert score["loss"] == pytest.approx(event["loss"], rel=1e-5)
            for ours, theirs in zip(score["by_position"], event["by_position"], strict=True):
                assert ours["tokens"] == theirs["tokens"]
                assert ours["loss"] == (theirs["loss"] and pytest.approx(theirs["loss"], rel=1e-5))


def test_evaluate_prints_tables_for_a_person(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    text = call(capsys, "evaluate", trained.run, "--device", "cpu")
    assert "step 8 · 4,096 tokens · stage long · cpu, fp32" in text
    assert "Held-out loss, rows of 64 tokens" in text
    assert "below the line: beyond the stage's 64 tokens" in text
    assert "128 – 255" in text


def test_evaluate_scores_another_dataset_at_another_length(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads(
        call(
            capsys, "evaluate", trained.run, "--data", trained.folder / "text", "--length", 40,
            "--max-tokens", 400, "--json", "--device", "cpu",
        )
    )  # fmt: skip
    assert [score["set"] for score in told["scores"]] == ["text", "text"]
    assert all(score["length"] == 40 and 0 < score["tokens"] <= 400 for score in told["scores"])
    assert told["scores"][1]["by_position"][-1]["stop"] == 40


def test_named_data_are_held_out_sets_of_suites_and_analyses(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An imported run has none of its own: what it is asked must not need another import."""
    words = "keys: [a, b], values: [c, d], needle: ' {key} {value}', question: ' {key}'"
    hay = "haystack: {kind: held_out, set: other}"
    asked = f"kind: needle, lengths: [48], depths: [0.5], trials: 2, {hay}, {words}"
    (tmp_path / "asked.yaml").write_text(f"tasks: {{one: {{{asked}}}}}", encoding="utf-8")
    told = refused(capsys, "evaluate", trained.run, tmp_path / "asked.yaml", "--device", "cpu")
    assert "haystack.set=other is not a held-out set" in told and "--data NAME=DIR" in told
    options = ("--data", f"other={trained.folder / 'text'}", "--device", "cpu", "--json")
    result = json.loads(call(capsys, "evaluate", trained.run, tmp_path / "asked.yaml", *options))
    assert result["tasks"]["one"]["rows"][0]["trials"] == 2
    assert result["data"] == {"other": str(trained.folder / "text")}
    whole = ("--length", 200, "--trials", 1, "--json", "--device", "cpu")
    needles = [
        json.loads(call(capsys, "analyse", trained.run, *whole, *data))["results"][0]["attention"]
        for data in ((), options[:2], ("--data", trained.folder / "text"))
    ]
    assert needles[0] != needles[1] == needles[2]


def test_data_that_is_named_wrongly_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = trained.folder / "text"
    for command in ("evaluate", "analyse"):
        told = refused(capsys, command, trained.run, "--data", "=x", "--device", "cpu")
        assert "--data==x names no dataset" in told
        twice = ("--data", text, "--data", f"text={text}")
        assert "'text' is" in refused(capsys, command, trained.run, *twice, "--device", "cpu")


def test_a_picture_of_the_heads_is_drawn(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--length", 200, "--trials", 1, "--device", "cpu", "--picture")
    told = call(capsys, "analyse", trained.run, *options, tmp_path / "heads.png")
    assert told.rstrip().endswith(f"drawn as {tmp_path / 'heads.png'}")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    told = refused(capsys, "analyse", trained.run, *options, tmp_path / "no" / "heads.png")
    assert "heads.png cannot be used (No such file or directory)" in told


def test_model_has_the_plan_of_the_stage_it_was_written_in(trained: Trained) -> None:
    windows = [
        load_trained_model(trained.run / "checkpoints" / f"step-{step:08d}", ParallelMesh.single())
        .model.blocks[0]
        .attention.scheme.window
        for step in (4, 8)
    ]
    assert windows == [8, 24]


def test_sample_prints_the_prompt_and_what_follows(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = (trained.folder / "lines.txt").read_text(encoding="utf-8")[:20]
    command = ("sample", trained.run, "--prompt", prompt, "--tokens", 20, "--device", "cpu")
    text = call(capsys, *command)
    assert text.startswith(prompt) and len(text) > len(prompt) + 1
    assert call(capsys, *command) == text
    assert call(capsys, *command, "--seed", 2) != text
    greedy = call(capsys, *command, "--temperature", 0)
    assert call(capsys, *command, "--temperature", 0, "--seed", 2) == greedy


def test_sample_says_when_the_model_no_longer_sees_the_beginning(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = (trained.folder / "lines.txt").read_text(encoding="utf-8")[:600]
    command = ["sample", str(trained.run), "--prompt", prompt, "--tokens", "2", "--device", "cpu"]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert told.out.startswith(prompt)
    assert told.err.count("longer than the 64 tokens of stage long") == 1


def test_missing_path_is_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(capsys, "evaluate", tmp_path / "nowhere")
    assert "is no checkpoint and holds none" in refused(capsys, "evaluate", tmp_path)
    assert "is no checkpoint" in refused(capsys, "sample", trained.tokenizer, "--prompt", "a")


@pytest.mark.parametrize("whole_run", [False, True])
def test_damaged_checkpoint_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole_run: bool
) -> None:
    shutil.copytree(trained.run / "checkpoints" / "step-00000008", tmp_path / "checkpoints" / "8")
    checkpoint = tmp_path / "checkpoints" / "8"
    checkpoint = checkpoint.rename(checkpoint.with_name("step-00000008"))
    file = next(checkpoint.glob("fragments-*"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    told = refused(capsys, "evaluate", tmp_path if whole_run else checkpoint, "--device", "cpu")
    assert ("none of its 1 checkpoints can be read" if whole_run else "is damaged in 1 of") in told


def test_numbers_that_mean_nothing_are_refused(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run, prompt = trained.run, ("--prompt", "a")
    assert "--length=0 scores nothing" in refused(capsys, "evaluate", run, "--length", 0)
    assert "--max-tokens=0 scores" in refused(capsys, "evaluate", run, "--max-tokens", 0)
    assert "--tokens=0 adds nothing" in refused(capsys, "sample", run, *prompt, "--tokens", 0)
    for value in ("-1", "nan", "inf"):
        told = refused(capsys, "sample", run, *prompt, "--temperature", value)
        assert f"--temperature={value} is no temperature" in told


def test_dataset_of_another_vocabulary_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (VOCAB, 500):
        info = TokenizerInfo(kind="sentencepiece", sha256="0" * 64, vocab_size=size, eod_id=1)
        with TokenWriter(tmp_path / str(size), info) as writer:
            writer.add([2, 3, 4])
    told = refused(capsys, "evaluate", trained.run, "--data", tmp_path / "500")
    assert "model.vocab_size=310 is smaller than the tokenizer's" in told
    told = refused(capsys, "evaluate", trained.run, "--data", tmp_path / str(VOCAB))
    assert "was made with the tokenizer 000000000000, not the" in told
    told = refused(capsys, "evaluate", trained.run, "--data", tmp_path / "nowhere")
    assert "nowhere is not a dataset" in told


def test_tokenizer_that_is_missing_or_not_the_datas_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sample", trained.run, "--prompt", "a", "--tokenizer")
    told = refused(capsys, *command, tmp_path / "nowhere.model")
    assert "nowhere.model cannot be read" in told
    for size, words in ((VOCAB - 10, "has sha256"), (VOCAB + 20, "has 320 tokens, more than the")):
        path = tmp_path / f"{size}.model"
        train_tokenizer([trained.folder / "lines.txt"], path, size)
        told = refused(capsys, *command, path)
        assert words in told and "--tokenizer=" in told and "that made the data" in told


def test_prompt_without_a_token_is_refused(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--prompt is empty" in refused(capsys, "sample", trained.run, "--prompt", "")
    assert "not UTF-8" in refused(capsys, "sample", trained.run, "--prompt", "a\udcff")


def test_run_without_held_out_sets_or_tokenizer_says_what_to_name(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "step-00000008"
    shutil.copytree(trained.run / "checkpoints" / "step-00000008", checkpoint)
    manifest = read_manifest(checkpoint)
    data = manifest.config["data"] | {"held_out": {}, "tokenizer": None}
    manifest = manifest.model_copy(update={"config": {**manifest.config, "data": data}})
    (checkpoint / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    told = refused(capsys, "evaluate", checkpoint, "--device", "cpu")
    assert "data.held_out names no set" in told and "--data" in told
    told = refused(capsys, "sample", checkpoint, "--prompt", "a", "--device", "cpu")
    assert "names no tokenizer" in told and "--tokenizer" in told
    command = ("--prompt", "a", "--tokenizer", trained.tokenizer, "--tokens", 3, "--device", "cpu")
    assert call(capsys, "sample", checkpoint, *command).startswith("a")


SUITE = """
tasks:
  needles: {{kind: needle, lengths: [300], depths: [0.0, 1.0], trials: 2,
    haystack: {{kind: held_out}}, keys: [ab, cd, ef], values: [bad, cab, dab],
    needle: " {{key}} {{value}}", question: " {{key}}", answer: " {{value}}"}}
  recall: {{kind: recall, lengths: [32, 64], trials: 5, ids: [2, 300]}}
  {ruler}
"""


def test_suite_is_scored_and_kept_in_the_run(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "small.yaml"
    ruler = "ruler: {kind: ruler, tasks: [niah_single_1], lengths: [900], trials: 1}"
    suite.write_text(SUITE.format(ruler=ruler))
    told = json.loads(call(capsys, "evaluate", trained.run, suite, "--json", "--device", "cpu"))
    assert set(told["tasks"]) == {"needles", "recall", "ruler"} and told["step"] == 8
    assert [row["depth"] for row in told["tasks"]["needles"]["rows"]] == [0.0, 1.0]
    kept = trained.run / "evaluations" / "step-00000008.suite.small.json"
    assert json.loads(kept.read_text()) == told
    text = call(capsys, "evaluate", trained.run, suite, "--device", "cpu")
    assert "exact match by depth and length, 2 trials a cell" in text
    assert "RULER, share of references found" in text and str(kept) in text
    told_of = refused(capsys, "evaluate", trained.run, suite, "--length", "5")
    assert "--length=5 says nothing to a suite" in told_of
    for option in (["--limit", "3"], ["--include", tmp_path], ["--beyond"]):
        told_of = refused(capsys, "evaluate", trained.run, suite, *option)
        assert f"{option[0]}" in told_of and "says nothing to a suite" in told_of
    suite.write_text("tasks: {a: {kind: recall, lengths: [32], ids: [2, 4300]}}")
    told_of = refused(capsys, "evaluate", trained.run, suite)
    assert "tasks.a.ids=[2, 4300] reach beyond the vocabulary (310 ids)" in told_of
    suite.write_text("tasks: {a: {kind: recal, lengths: [32]}}")
    assert "recall" in refused(capsys, "evaluate", trained.run, suite)


def test_analyse_says_where_heads_look_for_a_suite_and_for_own_examples(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE.format(ruler=""))
    text = call(capsys, "analyse", trained.run, suite, "--threshold", "0.0", "--device", "cpu")
    assert "needles: 300 tokens, depth 1, 2 examples" in text
    assert "local (1)" in text and "global (1)" in text and "Retrieval heads" in text
    own = tmp_path / "own.json"
    tokens = [n % 290 + 2 for n in range(80)]
    own.write_text(
        json.dumps([{"tokens": tokens, "question": 60, "answer": 70, "needles": [[20, 25]]}])
    )
    command = ("analyse", trained.run, "--device", "cpu", "--examples", own, "--json")
    told = json.loads(call(capsys, *command))["results"][0]
    assert (told["task"], told["length"], told["trials"]) == ("own", 80, 1)
    assert told["attention"]["by_kind"]["local"]["mass"]["needle"] == 0  # a window of 24
    assert len(told["attention"]["layers"][0]["heads"]) == 4
    own.write_text('[{"tokens": [1, 2]}]')
    assert "is not a JSON list of tokens" in refused(capsys, *command)
    for option, words in (
        (["--depth", "2"], "--depth=2 is no share"),
        (["--threshold", "nan"], "--threshold=nan is no share"),
        ([suite, "--trials", "3"], f"--trials=3 says nothing to {suite}"),
    ):  # fmt: skip
        assert words in refused(capsys, "analyse", trained.run, "--device", "cpu", *option)


def test_layers_can_be_changed_for_a_look(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", trained.run, "--json", "--device", "cpu")
    plain = json.loads(call(capsys, *command))
    wide = json.loads(call(capsys, *command, "--change", "local.window=null"))
    assert (plain["changes"], wide["changes"]) == ([], ["local.window=null"])
    assert wide["scores"][0]["loss"] != plain["scores"][0]["loss"]
    model = load_trained_model(trained.run, ParallelMesh.single(), ["local.window=7"]).model
    assert [block.attention.scheme.window for block in model.blocks] == [7, None]
    told = refused(capsys, *command, "--change", "local.qk_norm={kind: none}")
    assert "--change.local changes which parameters exist" in told
