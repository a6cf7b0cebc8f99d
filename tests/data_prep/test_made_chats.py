"""The conversations that megahybrid makes itself: the same on every machine, and all of use."""

import hashlib
from pathlib import Path

import pytest

from megahybrid.data.chat.conversation import problem_of, turns
from megahybrid.data_prep.made_chats import made_chats, make_chats
from megahybrid.errors import DataError


def test_the_same_count_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    make_chats(tmp_path / "a.jsonl", 50)
    found = hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert found[:12] == "64b2a0ab9017"
    assert list(made_chats(9, 1)) == list(made_chats(50, 1))[:9] != list(made_chats(9, 2))


def test_each_is_another_conversation_that_something_can_be_learnt_of() -> None:
    chats = list(made_chats(2000, 1))
    assert len({str(chat) for chat in chats}) == 2000
    assert {problem_of(chat, None) for chat in chats} == {""}
    assert {len(turns(chat)) for chat in chats} >= {1, 2, 3, 4}


def test_another_file_than_jsonl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not end in \.jsonl"):
        make_chats(tmp_path / "a.txt")
