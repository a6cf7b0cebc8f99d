"""How the package hangs together, by its imports: no circles, and train/ a few floors high."""

from collections.abc import Iterable, Mapping

import grimp
import pytest

TRAIN = "megahybrid.train."
MOST_FLOORS = 5

Arrows = Mapping[str, set[str]]


def circles(arrows: Arrows) -> list[list[str]]:
    """The sets of names that reach one another (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        path.append(name)
        for below in arrows[name]:
            if below not in number:
                visit(below)
            if below in path:
                lowest[name] = min(lowest[name], lowest[below])
        if lowest[name] == number[name]:
            circle = path[path.index(name) :]
            del path[path.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in arrows:
        if name not in number:
            visit(name)
    return found


def floors(arrows: Arrows) -> dict[str, int]:
    """How many names the longest chain of arrows from each has, itself included."""
    known: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in known:
            known[name] = 1 + max((of(below) for below in arrows[name]), default=0)
        return known[name]

    return {name: of(name) for name in arrows}


def rooms(arrows: Arrows, folder: str) -> dict[str, set[str]]:
    """The modules and subpackages of `folder`, and which of its others each imports."""

    def room(module: str) -> str:
        return module.removeprefix(folder).partition(".")[0]

    inside = [module for module in arrows if module.startswith(folder)]
    found: dict[str, set[str]] = {room(module): set() for module in inside}
    for module in inside:
        found[room(module)] |= {room(other) for other in arrows[module] if other in inside}
        found[room(module)].discard(room(module))
    return found


@pytest.fixture(scope="module")
def imports() -> Arrows:
    """What each module imports: at its top, within a function, or for the type checker alone."""
    graph = grimp.build_graph("megahybrid", exclude_type_checking_imports=False, cache_dir=None)
    return {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}


def test_no_modules_import_each_other_in_a_circle(imports: Arrows) -> None:
    assert "megahybrid.train.run" in imports and "megahybrid.launch.submit" in imports
    assert circles(imports) == []


def test_train_is_a_few_floors_high(imports: Arrows) -> None:
    found = floors(rooms(imports, TRAIN))
    high = {room: floor for room, floor in found.items() if floor > MOST_FLOORS}
    assert high == {} and found["run"] > 1


def _arrows(*pairs: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for above, below in pairs:
        found.setdefault(above, set()).add(below)
        found.setdefault(below, set())
    return found


def test_a_circle_and_a_long_chain_are_seen() -> None:
    assert circles(_arrows("ab", "bc", "cd", "db")) == [["b", "c", "d"]]
    assert circles(_arrows("ab", "ba", "cd", "ce")) == [["a", "b"]]
    assert circles(_arrows("ab", "ac", "bd", "cd")) == []
    assert floors(_arrows("ab", "bc", "cd", "ad")) == {"a": 4, "b": 3, "c": 2, "d": 1}
    modules = {"t.a.x": {"t.a.y", "t.b", "o"}, "t.a.y": set(), "t.b": set(), "o": set()}
    assert rooms(modules, "t.") == {"a": {"b"}, "b": set()}
