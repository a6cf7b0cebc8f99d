"""One example's data for all tests of this folder."""

import shutil
from pathlib import Path

import pytest

from tests.train.example import write_example


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
