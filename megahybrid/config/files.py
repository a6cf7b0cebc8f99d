"""The files and packages that a run needs on the machine it trains on, looked for without reading.

Paths of data are relative to the working directory; one that exists only beside the run file is
found there.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from megahybrid.config.missing_data import dataset_exists, missing_in_words
from megahybrid.config.old_words import Tell
from megahybrid.config.packaged import is_packaged, or_packaged
from megahybrid.config.run import RunConfig
from megahybrid.printable import shortened


def missing_files(run: RunConfig) -> list[str]:
    """Return a line for all missing data, one for each other path that is not there, and one for
    each package that the run asks for and that is not installed."""
    return list(_missing(run))


def _missing(run: RunConfig) -> Iterator[str]:
    if (data := missing_in_words(run)) is not None:
        yield data
    paths = {
        f"evaluate.suites.{name}.path": suite.path for name, suite in run.evaluate.suites.items()
    }
    if run.start is not None:
        paths["start.checkpoint"] = run.start.checkpoint
    for field, path in paths.items():
        if not is_packaged(or_packaged(path)) and not os.path.exists(path):
            yield f"{field}={shortened(path, 200)} does not exist. Correct the path."
    for field, package, install in _packages(run):
        if importlib.util.find_spec(package) is None:
            yield f"{field} needs {package}, which is not installed here. {install}"


def _packages(run: RunConfig) -> Iterator[tuple[str, str, str]]:
    """The field that asks for a package beyond megahybrid's own, its name, and how to get it."""
    if run.log.tensorboard:
        yield (
            "log.tensorboard=true",
            "tensorboard",
            "Run `pip install megahybrid[tensorboard]`, or set it to false.",
        )
    if run.log.wandb != "off":
        yield f"log.wandb={run.log.wandb}", "wandb", "Run `pip install wandb`, or set it to off."
    if run.kernels.norm == "apex":
        yield "kernels.norm=apex", "apex", "Build NVIDIA's apex, or use kernels.norm=torch."
    if "cudnn_frontend" in (run.kernels.full, run.kernels.windowed):
        yield (
            "kernels: cudnn_frontend",
            "cudnn",
            "Run `pip install megahybrid[gpu]`, or use auto.",
        )


def beside(run: RunConfig, run_file: Path, tell: Tell) -> RunConfig:
    """Return the run with each path of data that exists only beside `run_file` as it is from here;
    `tell` is given a line about each."""
    folder = run_file.parent
    if is_packaged(run_file) or folder == Path():
        return run

    def found(field: str, path: str) -> str:
        if os.path.isabs(path) or dataset_exists(path) or not dataset_exists(str(folder / path)):
            return path
        there = str(folder / path)
        tell(f"{field}={shortened(path, 200)} is not here, but beside the run file: {there}.")
        return there

    paths = {field: found(field, path) for field, path in run.data.datasets()}
    changed: dict[str, object] = {
        "sources": {
            name: source.moved(
                {field: paths[f"data.sources.{name}.{field}"] for field, _ in source.fields()}
            )
            for name, source in run.data.sources.items()
        },
        "held_out": {
            name: source.model_copy(update={"path": paths[f"data.held_out.{name}.path"]})
            for name, source in run.data.held_out.items()
        },
    }
    if run.data.tokenizer is not None:
        changed["tokenizer"] = found("data.tokenizer", run.data.tokenizer)
    data = run.data.model_copy(update=changed)
    return run if data == run.data else run.model_copy(update={"data": data})
