"""The allocator is set up for the user, and left alone where the user has done so."""

import os

import pytest

from megahybrid.parallel.allocator import NAMES, expandable_segments


def test_segments_expand_unless_the_user_has_said_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(NAMES[1], "max_split_size_mb:64")
    expandable_segments()
    assert NAMES[0] not in os.environ
    monkeypatch.delenv(NAMES[1])
    monkeypatch.setenv(NAMES[0], "")  # so that it is put back
    monkeypatch.delenv(NAMES[0])
    expandable_segments()
    assert os.environ[NAMES[0]] == "expandable_segments:True"
