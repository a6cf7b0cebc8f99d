"""What can be refused before any rank starts."""

from collections.abc import Sequence
from pathlib import Path

from megahybrid.config import RunConfig
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import MANIFEST_NAME
from megahybrid.data.packing import PLAN_NAME
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.errors import ConfigError
from megahybrid.parallel.mesh import choose_device
from megahybrid.train.examine import check_suites
from megahybrid.train.restore import check_beginning


def check_inputs(run: RunConfig, directory: Path, allow: Sequence[str] = ()) -> None:
    """What can be refused before any rank starts, and before anything is written: the device, the
    data, the tokenizer, and the run that `directory` or `start` already holds."""
    choose_device(run.device, local_rank=0)
    _refuse_dataset(directory)
    tokenizer = load_tokenizer(run.data.tokenizer) if run.data.tokenizer else None
    first: tuple[str, str] | None = None  # the field and hash of the first tokenizer met
    if tokenizer is not None:
        first = ("data.tokenizer", tokenizer.info.sha256)
    for part, sources in (("sources", run.data.sources), ("held_out", run.data.held_out)):
        for name, source in sources.items():
            dataset = TokenDataset(source.path, vocab_size=run.model.vocab_size)
            if first is not None:
                dataset.check_tokenizer(first[1], first[0])
            elif dataset.manifest is not None:
                first = (f"the tokenizer of data.{part}.{name}", dataset.manifest.tokenizer.sha256)
    check_suites(run)
    check_beginning(run, directory, allow)


def _refuse_dataset(directory: Path) -> None:
    """Raises ConfigError where a dataset or a plan lies in the place of the run's folder."""
    for name in (MANIFEST_NAME, PLAN_NAME):
        if (directory / name).exists():
            raise ConfigError(
                f"directory={directory} holds a dataset ({name}), not a run. Name a folder that is "
                "the run's own."
            )
    if any(directory.glob("*.idx")):
        raise ConfigError(
            f"directory={directory} holds token files (.idx), not a run. Name a folder that is the "
            "run's own."
        )
