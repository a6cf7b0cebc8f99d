"""`data tokenize --chat`: conversations become documents whose mask is what the assistant wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahybrid.data.chat.template_file import SHIPPED, TemplateFile, read_template
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep.chat_encoder import ChatJob
from megahybrid.data_prep.coloured_targets import OTHER, TARGET, coloured
from megahybrid.data_prep.tokenize import TokenizeReport, tokenize
from megahybrid.errors import DataError
from tests.data.chat.chats import OF_MINE, TOOLS, conversation, write_tokenizer
from tests.data_prep.test_commands import call

Made = dict[tuple[int, ...], tuple[bool, ...]]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(rows: Path, tokenizer: Path, output: Path, job: ChatJob, **more: Any) -> TokenizeReport:
    options: dict[str, Any] = {"text_field": "messages", "max_bad_fraction": 1.0, "quiet": True}
    return tokenize([rows], tokenizer, output, chat=job, **options | more)


def read(folder: Path) -> Made:
    """The tokens of each document without eod, and whether each token counts, eod's at the end."""
    dataset, found = verify_dataset(folder), Made()
    for index in range(dataset.documents):
        start, length = dataset.document_span(index)
        tokens = dataset.document(index).tolist()
        assert tokens.pop() == dataset.eod_id
        found[tuple(tokens)] = tuple(dataset.counts(start, length).tolist())
    return found


def job(name: str, **more: Any) -> ChatJob:
    return ChatJob(read_template(name), **more)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_tokens_and_masks_are_those_of_transformers(tokenizer: Path, tmp_path: Path) -> None:
    """Token by token, over templates with blocks: what it calls the assistant's tokens mask."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    for name in ("chatml", "llama3", "cohere"):
        tools = TOOLS if name != "cohere" else None
        rows = [
            {"messages": conversation(seed, tools=tools is not None and seed % 2 == 1)}
            | ({"tools": tools} if seed % 2 else {})
            for seed in range(20)
        ]
        run(write_rows(tmp_path / f"{name}.jsonl", rows), tokenizer, tmp_path / name, job(name))
        found = read(tmp_path / name / "train")
        assert len(found) == len(rows)
        for row in rows:
            wanted = theirs.apply_chat_template(
                row["messages"],
                tools=row.get("tools"),
                chat_template=read_template(name).source,
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
            mask = [bool(one) for one in wanted["assistant_masks"]]
            # A special token ends each turn, so eod, which is not the assistant's, is not learnt.
            assert found[tuple(wanted["input_ids"])] == (*mask, False)
            assert 0 < sum(mask) < len(mask)


def test_template_without_blocks_has_its_answers_and_ends_of_turns_as_targets(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Transformers has no mask for it: what it must be is put together from the words alone."""
    rows = [
        {"messages": conversation(seed, tools=bool(seed % 2)), "tools": json.dumps(TOOLS)}
        for seed in range(20)
    ]
    mine = ChatJob(TemplateFile("mine.jinja", OF_MINE), today="2025-01-31")
    run(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path / "out", mine)
    ours = load_tokenizer(tokenizer)
    found = read(tmp_path / "out" / "train")
    assert len(found) == len(rows)
    for row in rows:
        parts = [
            ("<|im_start|>system\n", False),
            (f"Tools: {json.dumps(TOOLS, ensure_ascii=False)}31 Jan 2025<|im_end|>\n", False),
        ]
        for message in row["messages"]:
            if message["role"] == "system":
                continue
            parts.append((f"<|im_start|>{message['role']}\n", False))
            if "tool_calls" in message:
                function = message["tool_calls"][0]["function"]
                text = json.dumps(function, ensure_ascii=False, indent=1)
            else:
                text = message["content"].strip()
            parts += [(f"{text}<|im_end|>", message["role"] == "assistant"), ("\n", False)]
        text = "".join(part for part, _ in parts)
        (marked,) = ours.encode_marked([text])
        of_characters = np.repeat([told for _, told in parts], [len(part) for part, _ in parts])
        wanted = [
            bool(of_characters[begin:end].any())
            for begin, end in zip(marked.begins, marked.ends, strict=True)
        ]
        assert found[tuple(marked.ids.tolist())] == (*wanted, False)


def test_end_of_a_plain_answer_is_eod_which_is_learnt(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER, {"role": "user", "content": "And"}, ANSWER]}]
    run(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path / "out", job("plain"))
    ((tokens, counts),) = read(tmp_path / "out" / "train").items()
    parts = ["User: Hi\n\nAssistant: ", "Yo\n\n", "User: And\n\nAssistant: ", "Yo"]
    (marked,) = load_tokenizer(tokenizer).encode_marked(["".join(parts)])
    of_characters = np.repeat([False, True, False, True], [len(part) for part in parts])
    assert list(tokens) == marked.ids.tolist()
    assert list(counts) == [*of_characters[marked.begins].tolist(), True]


def test_what_cannot_be_learnt_from_is_counted_by_reason(tokenizer: Path, tmp_path: Path) -> None:
    call_of = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "4"}
    bad: dict[str, Any] = {
        "empty conversation": [],
        "prompt only": [USER],
        "unknown role 'robot'": [USER, {"role": "robot", "content": "x"}],
        "message without a role": [USER, {"content": "x"}],
        "message that is no object": [USER, "x"],
        "content that is no text": [{"role": "user", "content": 3}, ANSWER],
        "empty answer": [USER, {"role": "assistant", "content": " "}],
        "unbalanced: user after user": [USER, USER, ANSWER],
        "unbalanced: assistant after assistant": [USER, ANSWER, ANSWER],
        "unbalanced: ends with user": [USER, ANSWER, USER],
        "unbalanced: ends with tool": [USER, call_of, result],
        "unbalanced: a tool's result without a call": [USER, result, ANSWER],
        "<|im_end|> in a message": [USER, {"role": "assistant", "content": "a<|im_end|>b"}],
        "<|im_start|> in a message": [
            {"role": "user", "content": [{"text": "a<|im_"}, {"text": "start|>b"}]},
            ANSWER,
        ],
        "NUL character": [USER, {"role": "assistant", "content": "a\0b"}],
        "lone surrogate": [USER, {"role": "assistant", "content": "\ud800"}],
        "longer than 200 tokens": [USER, {"role": "assistant", "content": "z" * 200}],
        "no list of messages in field 'messages'": "Hi",
    }
    good = [[USER, ANSWER], [USER, call_of, result, ANSWER | {"name": None}]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": one, "id": 7}) + "\n" for one in [*bad.values(), *good])
        + '{"broken": \n{"text": "no"}\n'
    )
    report = run(rows, tokenizer, tmp_path / "out", job("chatml", max_tokens=200), kept=["id"])
    wanted = dict.fromkeys(bad, 1) | {"broken json": 1}
    assert report.bad == wanted | {"no list of messages in field 'messages'": 2}
    assert report.documents == {"train": 2}
    listed = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(listed) == len(bad) + 2
    # Of the bytes on disk, as of any document.
    line = next(json.loads(one) for one in listed if json.loads(one)["reason"] == "prompt only")
    raw = rows.read_bytes()[line["offset"] :].partition(b"\n")[0]
    assert json.loads(raw)["messages"] == [USER] and line["lost"] == len(raw) + 1
    assert verify_dataset(tmp_path / "out" / "train").metadata(0) == {"id": 7}


def test_long_conversations_are_cut_behind_an_answer(tokenizer: Path, tmp_path: Path) -> None:
    turns = [
        message
        for number in range(6)
        for message in (USER, {"role": "assistant", "content": f"{number}" * 9})
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    whole = run(rows, tokenizer, tmp_path / "whole", job("chatml"))
    sizes = sorted(map(len, read(tmp_path / "whole" / "train")))
    limit = sizes[1] - 3
    cut = job("chatml", max_tokens=limit, too_long="cut")
    report = run(rows, tokenizer, tmp_path / "cut", cut, max_bad_fraction=0.0)
    assert report.bad == {"cut at a turn": 1} and report.documents == whole.documents
    short = write_rows(
        tmp_path / "short.jsonl", [{"messages": turns[:10]}, {"messages": turns[:2]}]
    )
    run(short, tokenizer, tmp_path / "short", job("chatml"))
    assert read(tmp_path / "cut" / "train") == read(tmp_path / "short" / "train")
    # The longest that is allowed has room for eod as well.
    fits = job("chatml", max_tokens=sizes[1] + 1)
    assert run(rows, tokenizer, tmp_path / "fits", fits).bad == {}
    left = run(rows, tokenizer, tmp_path / "left", job("chatml", max_tokens=sizes[1]))
    assert left.bad == {f"longer than {sizes[1]} tokens": 1}


@pytest.mark.parametrize("tools", [True, False])
def test_a_table_gives_what_lines_give(tokenizer: Path, tmp_path: Path, tools: bool) -> None:
    """Its structures have a null for every key that another row has, and a column may be absent."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    more = {"tools": json.dumps(TOOLS)} if tools else {}
    rows = [
        {"messages": conversation(seed, tools=tools and bool(seed % 2))} | more for seed in range(8)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    found = []
    for path in (lines, tmp_path / "rows.parquet"):
        report = run(path, tokenizer, tmp_path / path.suffix[1:], job("chatml"), held_out=0.3)
        assert report.bad == {} and report.documents["held_out"] > 0
        found.append([read(tmp_path / path.suffix[1:] / part) for part in report.documents])
    assert found[0] == found[1]


def test_sentencepiece_reserves_what_no_text_can_spell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "the cat sees a dog. " * 9 + str(n)} for n in range(40)]
    text, model = write_rows(tmp_path / "text.jsonl", rows), tmp_path / "t.model"
    said = ["--vocab-size", "300", "--chat", "chatml", "--output", str(model)]
    assert call("tokenizer", str(text), *said) == 0
    ours = load_tokenizer(model)
    assert {*SHIPPED["chatml"]} <= ours.control_tokens
    assert ours.special_tokens["<|im_end|>"] not in ours.encode(["a <|im_end|> b"])[0]
    messages = [USER, {"role": "assistant", "content": "é the cat 😀漢"}]
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": messages}])
    out = str(tmp_path / "out")
    said = ["--chat", "messages", "--tokenizer", str(model), "--output", out]
    assert call("tokenize", str(chats), *said) == 0
    ((tokens, counts),) = read(tmp_path / "out" / "train").items()
    answer = [token for token, told in zip(tokens, counts, strict=False) if told]
    end = ours.special_tokens["<|im_end|>"]
    assert f"{len(answer)} of them targets" in capsys.readouterr().out
    assert answer == [*ours.encode(["é the cat 😀漢"])[0], end] and not counts[-1]
    assert call("inspect", f"{out}/train", "--tokenizer", str(model)) == 0
    shown = capsys.readouterr().out
    assert f"{len(answer)} of the tokens count as targets" in shown
    assert "<|im_start|>assistant\né the cat 😀漢<|im_end|>" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "chatml"], "--template=chatml is for conversations, but --chat is not"),
        (["--max-tokens", "9"], "--max-tokens=9 is for conversations"),
        (["--chat", "messages", "--field", "x"], "--field=x and --chat=messages both name"),
        (["--chat", "messages", "--long-chats", "cut"], "--long-chats=cut needs --max-tokens"),
        (["--chat", "messages", "--template", "no"], "--template=no is none of chatml, llama3, co"),
        (["--chat", "messages", "--eod", "<|im_end|>"], "template chatml writes <|im_end|> within"),
        (
            ["--chat", "dialogue"],
            r"hold no document \(1 no list of messages in field 'dialogue'\). Check --chat",
        ),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_written(
    tokenizer: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    said = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), *words]
    with pytest.raises(DataError, match=message.replace("|", r"\|")) as raised:
        call("tokenize", str(rows), *said)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 2
    assert not (tmp_path / "out" / "train").exists()


def test_targets_are_coloured_by_document_and_by_row() -> None:
    shown = coloured([5, 6, 7, 8], [False, True, True, False], None)
    found = [(shown.plain[span.start : span.end].split(), span.style) for span in shown.spans]
    assert found == [(["5"], OTHER), (["6", "7"], TARGET), (["8"], OTHER)]


def test_where_nothing_is_left_the_way_out_is_that_of_the_conversations(
    tokenizer: Path, tmp_path: Path
) -> None:
    for name, messages, more, told in (
        ("prompt", [USER], {}, r"2 prompt only\)\. Correct the conversations"),
        ("long", [USER, ANSWER], {"max_tokens": 2}, r"longer than 2 tokens\)\. Raise --max-tokens"),
    ):
        rows = write_rows(tmp_path / f"{name}.jsonl", [{"messages": messages}] * 2)
        with pytest.raises(DataError, match=told):
            run(rows, tokenizer, tmp_path / name, job("chatml", **more))
