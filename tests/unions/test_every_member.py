"""Each member of each union, through each place that must know it: what a member still lacks fails
by the names of member and place."""

import pytest

from tests.unions.members import EXAMPLES, MEMBERS
from tests.unions.probes import PLACES


def test_every_member_has_an_example() -> None:
    assert [name for name in MEMBERS if name not in EXAMPLES] == []
    assert [name for name in EXAMPLES if name not in MEMBERS] == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_is_known_to(member: str, place: str) -> None:
    assert member in EXAMPLES, f"{member} has no example in tests/unions/members.py"
    PLACES[place](EXAMPLES[member].model())
