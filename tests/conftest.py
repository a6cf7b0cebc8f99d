"""What holds for every test. Threads and checked annotations are set up by `tests/__init__.py`."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import tests
from tests import distributed
from tests.long_tests import LONG
from tests.train.forked import Nursery

# A shared machine stalls at times, and a stall is no counterexample. The same examples each run.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


# Parameters whose bare value says nothing: a reader of a failure shall see tensor4, not 4.
NAMED = {
    "tensor": "tensor",
    "context": "context",
    "degree": "tensor",
    "zero_stage": "zero",
    "world_size": "ranks",
    "processes": "processes",
    "window": "window",
    "head_dim": "head_dim",
    "theta": "theta",
    "seq": "seq",
}
DTYPES = {
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
}


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """Return an id that says what runs, where the parameters give none of their own."""
    if isinstance(val, bool):
        return argname if val else f"no_{argname}"
    if argname in NAMED and isinstance(val, int | float):
        return f"{NAMED[argname]}{val:g}"
    if argname == "window" and val is None:
        return "no_window"
    return DTYPES.get(str(val)) or getattr(val, "kind", None)


def pytest_report_header() -> str:
    """Whether annotations are checked: a machine without our development tools may lack it."""
    return f"annotations: {tests.ANNOTATIONS}"


# Files of a minute or more, the longest first: begun last, one of them would be waited for while
# the other processes have nothing left to do.
LONGEST = (
    "tests/benchmarks/test_gpu_call.py",
    "tests/data_prep/test_tokenize.py",
    "tests/launch/test_on_slurm.py",
    "tests/train/test_resume.py",
    "tests/model/test_selftest.py",
    "tests/train/test_wrong_numbers.py",
    "tests/train/test_stop.py",
    "tests/parity/test_layers.py",
    "tests/train/test_launcher.py",
    "tests/model/test_kernels.py",
    "tests/model/test_compiled.py",
    "tests/checkpoint/test_resume_on_layouts.py",
    "tests/parity/test_engine.py",
    "tests/model/test_kernels_before.py",
    "tests/train/test_tensor_ranks.py",
    "tests/parity/test_context_engine.py",
)


def _place(item: pytest.Item) -> int:
    name = item.nodeid.partition("::")[0]
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def _mark_long(items: list[pytest.Item], whole_files: bool) -> None:
    """Mark what tests/long_tests.py names, and refuse a name there that is no test any more."""
    names = {(file, name) for file, each in LONG.items() for name in each}
    files, found = set(), set()
    for item in items:
        file, _, name = item.nodeid.partition("::")
        files.add(file)
        for key in ((file, name), (file, name.partition("[")[0])):
            if key in names:
                found.add(key)
                item.add_marker("long")
    gone = sorted(f"{file}::{name}" for file, name in names - found if file in files)
    if gone and whole_files:
        raise pytest.UsageError(f"tests/long_tests.py names what is no test: {', '.join(gone)}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `grid` runs where `-m` names it; the longest files come first."""
    _mark_long(items, whole_files=not any("::" in argument for argument in config.args))
    items.sort(key=_place)  # stable: a file's tests keep their order
    if "grid" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("grid") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("grid") is None]


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: no later collection has to walk over it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked `gpu` needs a device, and nothing else decides about it."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """A test leaves the working directory as it was: others start processes from it."""
    yield
    here = item.config.invocation_params.dir
    try:
        left = Path.cwd()
    except FileNotFoundError:
        left = Path("a folder that is gone")
    if left != here:
        os.chdir(here)
        pytest.fail(f"left the working directory at {left}", pytrace=False)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """The process that forks ranks of real commands."""
    with Nursery() as process:
        yield process


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Workers of the distributed pools end with the session."""
    distributed.close_pools()
