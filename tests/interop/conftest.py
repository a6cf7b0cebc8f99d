"""Where transformers may copy the code of our own class."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Read when transformers is first imported.
_MODULES = tempfile.mkdtemp(prefix="transformers-modules-")
os.environ.setdefault("HF_MODULES_CACHE", _MODULES)


@pytest.fixture(autouse=True, scope="session")
def _copied_code() -> Iterator[None]:
    yield
    shutil.rmtree(_MODULES, ignore_errors=True)
