"""One example's data for all tests of this folder."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megahybrid.parallel.local_launch import STOP_SIGNALS
from tests.train.example import write_example
from tests.train.forked import Nursery
from tests.train.text_run import Trained, train_text_run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    write_example(folder)
    return folder


@pytest.fixture
def example(prepared: Path, tmp_path: Path) -> Path:
    """A folder of this test's own with data and run.yaml."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Trained:
    """A run on text with checkpoints; its `evaluations` are anyone's."""
    return train_text_run(tmp_path_factory.mktemp("text_run"), nursery)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The launcher takes the process's signals; give them back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
