"""A call on a GPU runs what is marked `gpu`: nothing that needs a device goes without the mark."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def functions(source: str) -> Iterator[ast.FunctionDef]:
    """Every test of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def unmarked(source: str) -> list[str]:
    """Tests that ask for a device in another way than by the mark."""
    found = []
    for test in functions(source):
        said = [ast.unparse(decorator) for decorator in test.decorator_list]
        marked = any("pytest.mark.gpu" in line or "ON_A_CARD" in line for line in said)
        by_hand = any("skipif(not torch.cuda.is_available()" in line for line in said)
        moved = any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "cuda"
            and not node.args
            for node in ast.walk(test)
        )
        if by_hand or (moved and not marked):
            found.append(test.name)
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_what_needs_a_device_has_the_mark(path: Path) -> None:
    assert unmarked(path.read_text()) == []


def test_a_skip_by_hand_and_a_move_without_the_mark_are_seen() -> None:
    by_hand = "@pytest.mark.skipif(not torch.cuda.is_available(), reason='')\ndef test_a(): pass\n"
    moved = "def test_b():\n    x = draw('x', 4).cuda()\n"
    assert unmarked(by_hand + moved) == ["test_a", "test_b"]
    assert unmarked(moved.replace("def", "@pytest.mark.gpu\ndef")) == []
