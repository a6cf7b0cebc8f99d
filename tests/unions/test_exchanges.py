"""Each exchange and layout of context ranks, through each place that must know it; a member that is
in no code is refused by each place itself."""

import json
import os
import subprocess
import sys

import pytest

from tests.unions.exchanges import MEMBERS, PLACES

ASKED = [
    (union, member, place)
    for union, members in MEMBERS.items()
    for member in members
    for place in PLACES[union]
]


@pytest.mark.parametrize(("union", "member", "place"), ASKED)
def test_a_member_is_known_to(union: str, member: str, place: str) -> None:
    PLACES[union][place](member)


def test_a_half_added_member_is_refused_by_every_place() -> None:
    environment = {**os.environ, "MEGAHYBRID_TESTS_ANNOTATIONS": "off"}
    command = [sys.executable, "-m", "tests.unions.exchanges"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {union: set(places) for union, places in told.items()} == {
        union: set(places) for union, places in PLACES.items()
    }
    passed = [f"{u}.{p}" for u, places in told.items() for p, said in places.items() if not said]
    assert passed == []
    # By the place itself, not by an accident further on: such a line names what it does not know.
    for union, places in told.items():
        for place, said in places.items():
            assert said.startswith(("AssertionError", "ValidationError", "ValueError")), (
                f"{union}.{place}: {said}"
            )
