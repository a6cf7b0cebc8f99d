"""What holds for every test. Threads and checked annotations are set up by `tests/__init__.py`."""

import pytest
from hypothesis import settings

from tests import distributed

# A shared machine stalls at times, and a stall is no counterexample. The same examples each run.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Workers of the distributed pools end with the session."""
    distributed.close_pools()
