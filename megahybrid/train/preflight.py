"""Checks that can refuse a run before any rank starts."""

from collections.abc import Sequence
from pathlib import Path

from megahybrid.config import RunConfig
from megahybrid.config.missing_data import making_command, missing_data
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.length_plans import open_plans
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.errors import DataError
from megahybrid.parallel.mesh import choose_device
from megahybrid.train.restore import check_resume_point
from megahybrid.train.suites import check_suites


def check_inputs(run: RunConfig, directory: Path, allow: Sequence[str] = ()) -> None:
    """Refuse what cannot train before any rank starts and anything is written.

    Looks at the device, the data, the tokenizer, the suites, and the run that `directory` or
    `start` already holds. Raises MegahybridError.
    """
    choose_device(run.device, local_rank=0)
    _refuse_missing_data(run)
    tokenizer = load_tokenizer(run.data.tokenizer) if run.data.tokenizer else None
    first: tuple[str, str] | None = None  # the field and hash of the first tokenizer met
    if tokenizer is not None:
        first = ("data.tokenizer", tokenizer.info.sha256)
    for name, given in run.data.sources.items():
        if given.plans:
            open_plans(name, given.plans, run.model.vocab_size)
    for field, path in run.data.datasets():
        dataset = TokenDataset(path, vocab_size=run.model.vocab_size)
        if first is not None:
            dataset.check_tokenizer(first[1], first[0])
        elif dataset.manifest is not None:
            source = ".".join(field.split(".")[:3])
            first = (f"the tokenizer of {source}", dataset.manifest.tokenizer.sha256)
    check_suites(run)
    check_resume_point(run, directory, allow)


def _refuse_missing_data(run: RunConfig) -> None:
    """Raise DataError for data that a command of ours makes; of others, whoever opens them says
    what is wrong with them."""
    for field, path in missing_data(run):
        if (command := making_command(path)) is not None:
            raise DataError(f"{field}={path} does not exist. Make it with: {command}")
