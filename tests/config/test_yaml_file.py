"""YAML as a run file means it, and what is refused."""

from pathlib import Path

import pytest

from megahybrid.config.yaml_file import apply_overrides, merge, parse_yaml, read_tree
from megahybrid.errors import ConfigError

VALUES = [
    ("3e-4", 3e-4),
    ("1.0e-8", 1e-8),
    ("1e3", 1000.0),
    ("800_000", 800_000),
    ("010", 10),
    ("0x10", 16),
    ("off", "off"),
    ("no", "no"),
    ("yes", "yes"),
    ("on", "on"),
    ("y", "y"),
    ("true", True),
    ("1:30", "1:30"),
    ("null", None),
    ("~", None),
    ("", None),
    ("'3'", "3"),
    ("{a: [1, 2]}", {"a": [1, 2]}),
]


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[repr(t) for t, _ in VALUES])
def test_a_value_is_read_as_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)

REFUSED = {
    "duplicate": ("a: 1\nb: 2\na: 3\n", "f.yaml line 3: the key 'a' is written twice"),
    "nested duplicate": ("m:\n  a: 1\n  a: 1\n", "f.yaml line 3: the key 'a' is written twice"),
    "python": ("a: !!python/object/apply:os.system [ls]\n", "f.yaml line 1: the YAML tag"),
    "own tag": ("a: !thing 1\n", "f.yaml line 1: the YAML tag !thing is not read."),
    "bomb": (BOMB, "f.yaml: YAML aliases stand for more than 20000 values."),
    "circle": ("a: &a\n  b: *a\n", "f.yaml: a YAML alias contains itself."),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "f.yaml is nested too deeply."),
    "two documents": ("a: 1\n---\nb: 1\n", "f.yaml line 2: a second YAML document begins"),
    "yaml 1.1": ("%YAML 1.1\n---\na: off\n", "f.yaml: YAML directives (%) are not read."),
    "tab": ("a:\n\tb: 1\n", "f.yaml line 2: not YAML: found character '\\t'"),
    "open list": ("a: [1, 2\n", "f.yaml line 2: not YAML: expected ',' or ']'"),
    "empty": ("", "f.yaml is empty."),
    "only comments": ("# nothing\n", "f.yaml is empty."),
    "list": ("- a\n", "f.yaml holds a list, not a mapping"),
    "scalar": ("just text\n", "f.yaml holds the single value 'just text', not a mapping"),
    "control character": ("a: \x01\n", "f.yaml: not YAML:"),
    "bad date": ("a: 2024-13-45\n", "f.yaml: not YAML:"),
    "missing include": ("include: [no.yaml]\n", "no.yaml does not exist (included by f.yaml)."),
    "include of numbers": ("include: [3]\n", "f.yaml: include=[3] is not a list of files."),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_meant_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_tree(path)
    assert "\n" not in str(error.value)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


def test_files_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"b\.yaml is not UTF-8 text \(byte 3\)"):
        read_tree(binary)
    with pytest.raises(ConfigError, match="is a folder, not a YAML file"):
        read_tree(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        read_tree(tmp_path / "none.yaml")


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\n")
    assert read_tree(path) == {"a": {"x": 1}, "b": {"x": 1}}


def test_an_include_that_goes_in_a_circle_names_the_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]\n")
    with pytest.raises(ConfigError, match=r"in a circle \(a\.yaml -> b\.yaml -> a\.yaml\)"):
        read_tree(tmp_path / "a.yaml")


def test_includes_are_merged_in_order_under_the_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/one.yaml").write_text("include: two.yaml\nm: {a: 1, b: 1}\nl: [1, 2]\n")
    (tmp_path / "parts/two.yaml").write_text("m: {a: 0, z: 0}\n")
    (tmp_path / "parts/three.yaml").write_text("m: {b: 2, c: 2}\n")
    (tmp_path / "run.yaml").write_text(
        "include: [parts/one.yaml, parts/three.yaml]\nm: {c: 3}\nl: [9]\n"
    )
    assert read_tree(tmp_path / "run.yaml") == {"m": {"a": 1, "b": 2, "c": 3, "z": 0}, "l": [9]}


def test_a_mapping_of_another_kind_replaces_the_old_one_whole() -> None:
    rope = {"position": {"kind": "rope", "theta": 5}, "window": 3}
    assert merge(rope, {"position": {"kind": "nope"}}) == {
        "position": {"kind": "nope"},
        "window": 3,
    }
    assert merge(rope, {"position": {"theta": 6}})["position"] == {"kind": "rope", "theta": 6}
    assert merge({"scaling": None}, {"scaling": {"factor": 2}}) == {"scaling": {"factor": 2}}


def test_overrides_replace_and_leave_the_original_alone() -> None:
    tree = {"stages": [{"lengths": {256: 1}, "tokens": 5}], "log": {"wandb": "off"}}
    changed = apply_overrides(
        tree,
        ["stages.0.lengths={512: 1}", "stages.0.tokens=7_000", "log.wandb=off", "a.b=3e-4", "c="],
    )
    assert changed["stages"] == [{"lengths": {512: 1}, "tokens": 7000}]
    assert changed["a"] == {"b": 3e-4}
    assert changed["log"] == {"wandb": "off"}
    assert changed["c"] is None
    assert tree["stages"][0] == {"lengths": {256: 1}, "tokens": 5}
    assert apply_overrides(tree, ["stages.0.lengths.256=4"])["stages"][0]["lengths"] == {256: 4}


def test_an_override_that_is_not_yaml_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^a\.b line 1: not YAML"):
        apply_overrides({}, ["a.b=[1"])
