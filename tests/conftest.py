"""What holds for every test. Threads and checked annotations are set up by `tests/__init__.py`."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import distributed
from tests.train.forked import Nursery

# A shared machine stalls at times, and a stall is no counterexample. The same examples each run.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """The process that forks ranks of real commands."""
    with Nursery() as process:
        yield process


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Workers of the distributed pools end with the session."""
    distributed.close_pools()
