"""What each stage reads of each source, as far as its files are on this machine: for `describe`."""

from typing import Any

from megahybrid.config import RunConfig
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.length_plans import open_plans
from megahybrid.errors import DataError


def data_shares(run: RunConfig) -> list[dict[str, Any]]:
    """Return for each stage and source with a weight: `share` of the stage's tokens, `tokens`,
    `epochs` of the source, and of one with a mask about how many `targets` count in the loss.

    epochs and targets are None where the source's files are not here; targets also where it has no
    mask, so that every token but a document's last is one.
    """
    opened = {name: _opened(run, name) for name in run.data.sources}
    counted = {
        name: dataset.counted_targets() / dataset.tokens
        for name, dataset in opened.items()
        if dataset is not None and dataset.tokens and dataset.masked
    }
    told = []
    for index, stage in enumerate(run.stages):
        total = sum(stage.weights.values())
        for name, weight in stage.weights.items():
            if not weight:
                continue
            tokens = run.stage_plan.stage_tokens[index] * weight / total
            dataset = opened.get(name)
            row: dict[str, Any] = {"stage": stage.name, "source": name, "share": weight / total}
            row |= {"tokens": round(tokens), "epochs": None, "targets": None}
            if dataset is not None and dataset.tokens:
                row["epochs"] = tokens / dataset.tokens
                if name in counted:
                    row["targets"] = round(tokens * counted[name])
            told.append(row)
    return told


def _opened(run: RunConfig, name: str) -> TokenDataset | None:
    """The dataset of a source; None where it is not here, or not as it should be: `check` says."""
    source = run.data.sources[name]
    try:
        if source.plans:
            return open_plans(name, source.plans, run.model.vocab_size)[0]
        assert source.path is not None  # one of both is given
        return TokenDataset(source.path, vocab_size=run.model.vocab_size)
    except DataError:
        return None
