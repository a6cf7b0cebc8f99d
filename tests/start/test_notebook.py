"""docs/heads.ipynb runs from its first cell to its last, by the package's front alone."""

import json
import re
from pathlib import Path

import pytest

import megahybrid

NOTEBOOK = Path(__file__).parents[2] / "docs/heads.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs() -> None:
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_it_takes_what_is_documented_and_nothing_else() -> None:
    page = (NOTEBOOK.parent / "python.md").read_text(encoding="utf-8")
    used = {name for cell in CODE for name in re.findall(r"megahybrid\.(\w+)", cell)}
    assert used <= set(megahybrid.__all__) and all(f"`{name}(" in page for name in used)
    imports = [line for cell in CODE for line in cell.splitlines() if re.match("import|from", line)]
    assert sorted(imports) == [
        "from pathlib import Path",
        "from pydoc_data.topics import topics",
        "import megahybrid",
    ]


def test_it_goes_from_text_to_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, object] = {}
    for cell in CODE:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert (tmp_path / "heads/heads.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(names["picture"], megahybrid.Picture)
    told = capsys.readouterr().out
    assert "done at step 40" in told
    local, full = re.findall(r"(?:local|global): begin ([\d.]+)%", told)
    assert float(local) < 0.05 < float(full)  # what a window of 32 tokens hides
