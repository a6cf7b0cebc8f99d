"""Everything here compares with transformers."""

import pytest

pytest.importorskip(
    "transformers", reason="transformers is not installed: nothing to export to or import from"
)
