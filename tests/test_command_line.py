"""The command line itself: quick, light, and clear about what it does not understand."""

import importlib.util
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import megahybrid
from megahybrid.cli import _parser, main
from megahybrid.cli.examples import EXAMPLES
from megahybrid.cli.parser import commands_of
from tests.train.example import RUN

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "deepspeed", "wandb", "transformers", "numpy", "matplotlib", "sentencepiece")


def python(*arguments: str, folder: Path = ROOT) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a new Python says, and its CPU seconds."""
    return run(sys.executable, *arguments, folder=folder)


def run(*command: str, folder: Path = ROOT) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a command says, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(code: str, folder: Path = ROOT) -> set[str]:
    """Which heavy libraries are imported after `code`."""
    show = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done, _ = python("-c", f"{code}\n{show}", folder=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    seconds = []
    for _ in range(3):  # the first one may have to compile
        done, cpu = python("-m", "megahybrid", "--help")
        assert done.returncode == 0
        seconds.append(cpu)
    for command in ("train", "check", "describe", "compare", "evaluate", "sample", "report"):
        assert command in done.stdout
    assert min(seconds) < 0.3


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import megahybrid") == set()
    assert imported("import megahybrid.cli; megahybrid.cli._parser()") == set()
    assert imported("import megahybrid.config") == set()


@pytest.mark.parametrize("command", ["check --no-files", "describe"])
def test_without_torch_and_within_a_second(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    words = [*command.split(), "run.yaml"]
    code = f"from megahybrid.cli import main\nassert main({words}) == 0"
    assert imported(code, tmp_path) == set()
    seconds = []
    for _ in range(2):
        done, cpu = python("-m", "megahybrid", *words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        seconds.append(cpu)
    assert min(seconds) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_installed_command_is_the_module() -> None:
    command = Path(sys.executable).with_name("megahybrid")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done, _ = run(str(command), "--help")
    assert done.stdout == python("-m", "megahybrid", "--help")[0].stdout


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    line = f"{sys.executable} -m megahybrid describe run.yaml | head -1; echo ${{PIPESTATUS[0]}}"
    done, _ = run("bash", "-c", line, folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr


PARSERS = dict(commands_of(_parser()))
LEAVES = [words for words in PARSERS if not any(w[: len(words)] == words != w for w in PARSERS)]


@pytest.mark.parametrize("words", PARSERS, ids=lambda words: " ".join(words) or "megahybrid")
def test_every_help_text_has_an_example_that_parses(words: tuple[str, ...]) -> None:
    lines = EXAMPLES[" ".join(words)]
    assert lines and all(line in PARSERS[words].format_help() for line in lines)
    for line in lines:
        typed = shlex.split(line.partition("$(")[2].partition(")")[0] or line, comments=True)
        assert typed.pop(0) == "megahybrid"
        assert typed[: len(words)] == list(words)
        end = typed.index(">") if ">" in typed else None  # what the shell takes
        _, rest = _parser().parse_known_args(typed[:end])
        assert all("=" in word or word.endswith(".yaml") for word in rest)


def test_no_example_is_of_a_command_that_is_gone() -> None:
    assert {tuple(words.split()) for words in EXAMPLES} == PARSERS.keys()


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_option_has_a_help_that_says_its_default(words: tuple[str, ...]) -> None:
    text = " ".join(PARSERS[words].format_help().split())
    for action in PARSERS[words]._actions:
        assert action.help, f"{' '.join(words)} {action.dest}"
        if action.option_strings and action.default not in (None, False, [], "", "==SUPPRESS=="):
            assert f"{action.default})" in text or "default" in action.help, action.dest


NEARLY = {
    "trian run.yaml": "trian is no command. Did you mean train?",
    "data tokenise a": "tokenise is no command. Did you mean tokenize?",
    "train run.yaml --procesess 2": "--procesess 2. Did you mean --processes?",
    "sample runs/a --promt b": "--prompt",
    "sample runs/a --prompt b --device gpu": "--device: gpu is not one of auto, cpu, cuda.",
    "checkpoint lst runs/a": "lst is no command. Did you mean list?",
    "launch statsu": "statsu is no command. Did you mean status?",
}


@pytest.mark.parametrize("typed", NEARLY)
def test_a_word_that_is_nearly_right_is_named(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    assert ended.value.code == 2
    assert NEARLY[typed] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("typed", ["", "data", "checkpoint", "launch"])
def test_a_bare_call_prints_help(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    assert ended.value.code == 0
    assert "example" in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"megahybrid {megahybrid.__version__}\n"


def test_a_shell_is_told_what_may_follow(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    out = tmp_path / "out"
    for line, wanted in {
        "megahybrid tr": "train",
        "megahybrid train run.yaml --proc": "--processes",
        "megahybrid data tok": "tokenizer",
        "megahybrid sample a --device c": "cuda",
    }.items():
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_SHELL": "bash",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        command = [sys.executable, "-m", "megahybrid"]
        subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert wanted in [word.strip() for word in out.read_text().splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_shells_code_or_how_to_get_it(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["completion", shell])
    told = capsys.readouterr()
    if importlib.util.find_spec("argcomplete") is None:
        assert code == 2 and "pip install argcomplete" in told.err
    else:
        assert code == 0 and "megahybrid" in told.out and not told.err
