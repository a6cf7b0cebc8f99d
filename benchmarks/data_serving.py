"""Rows served per CPU-second, against megatron-core's GPTDataset and Hugging Face datasets.

    python -m benchmarks.data_serving [--tokens 60000000] [--rounds 5]

All read the same token ids from the page cache, in a random training order, in one process. Ours
are rows of 8,192 inputs and their targets (8,193 tokens), with document boundaries, in steps of 64
rows through `read_step`: order, mixture, checks and all; ids keep their width, as on the way to a
GPU. The host part of a GPU step adds the int64 document starts, which the model reads there; the
tensors of a CPU step are int64 tokens, targets and starts, by torch. GPTDataset gives int64
tokens and labels with its cheapest settings (no attention mask, no boundaries). datasets gives
8,193 ids in numpy format and nothing else. Rounds alternate; medians and ratios are printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.loader import StepShape, read_step
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.mixture import Mixture
from megahybrid.data.token_writer import TokenWriter

LENGTH, VOCAB, EOD, BATCH = 8192, 50_000, 0, 64


def write_corpus(folder: Path, tokens: int) -> None:
    """Log-normal documents, mean about 812 tokens, as in real web text."""
    draw = np.random.default_rng(0)
    info = TokenizerInfo(kind="sentencepiece", sha256="0" * 64, vocab_size=VOCAB, eod_id=EOD)
    with TokenWriter(folder, info) as writer:
        while tokens > 0:
            lengths = np.maximum(2, draw.lognormal(6.0, 1.2, 5000)).astype(np.int64)
            ids = draw.integers(1, VOCAB, lengths.sum(), dtype=np.int64)
            ids[np.cumsum(lengths) - 1] = EOD
            writer.add_documents(ids, lengths)
            tokens -= len(ids)


def ours(folder: Path, use: str = "ids") -> Iterator[int]:
    """Yields rows served, a step at a time. use: the ids and where documents end; gpu: what the
    trainer makes on the host before a step on a GPU; cpu: the tensors of a step on a CPU."""
    mixture = Mixture(
        {"a": TokenDataset(folder)}, {"a": 1}, seed=1, block_tokens=32 * LENGTH, lanes=64
    )
    state, shape = mixture.start(), StepShape(LENGTH, BATCH, BATCH)
    while True:
        step = read_step(mixture, state, shape)
        state = step.state
        (batch,) = step.micro_batches
        if use == "gpu":
            assert batch.starts.shape == batch.shape
        elif use == "cpu":
            made = batch.tensors("cpu")
            assert made.tokens.shape == made.targets.shape == made.starts.shape
        yield BATCH


def megatron(folder: Path, cache: Path, rows: int) -> Iterator[int] | None:
    """GPTDataset over the same .bin and .idx."""
    try:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    except ImportError as error:
        print(f"megatron-core: not measured ({error})")
        return None

    class Words:
        eod, pad, vocab_size, unique_identifiers = EOD, -1, VOCAB, {"class": "bench"}

    prefix = str(folder / "shard-00000")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Words(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, rows, Split.train, config)

    def serve() -> Iterator[int]:
        index = 0
        while True:
            sample = dataset[index % len(dataset)]
            assert sample["tokens"].shape == (LENGTH,)
            index += 1
            yield 1

    return serve()


def hugging_face(folder: Path, cache: Path) -> Iterator[int] | None:
    """Rows of 8,193 ids, numpy format, memory-mapped arrow."""
    try:
        import datasets
    except ImportError as error:
        print(f"datasets: not measured ({error})")
        return None
    datasets.disable_progress_bars()
    raw = np.fromfile(folder / "shard-00000.bin", np.uint16).astype(np.int32)
    rows = raw[: len(raw) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    feature = datasets.Features({"ids": datasets.Sequence(datasets.Value("int32"), LENGTH + 1)})
    made = datasets.Dataset.from_dict({"ids": rows}, features=feature)
    made.save_to_disk(str(cache / "hf"))
    dataset = datasets.load_from_disk(str(cache / "hf")).with_format("numpy")
    order = np.random.default_rng(1).permutation(len(dataset))

    def serve() -> Iterator[int]:
        place = 0
        while True:
            assert dataset[int(order[place % len(order)])]["ids"].shape == (LENGTH + 1,)
            place += 1
            yield 1

    return serve()


def rows_per_cpu_second(rows: Iterator[int], seconds: float) -> float:
    """Of this process, all threads."""
    served, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        for _ in range(20):
            served += next(rows)
    return served / spent


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "data", args.tokens)
        peers: dict[str, Iterator[int] | None] = {
            "megahybrid": ours(folder / "data"),
            "megahybrid, host part of a GPU step": ours(folder / "data", "gpu"),
            "megahybrid, tensors of a CPU step": ours(folder / "data", "cpu"),
            "megatron-core GPTDataset": megatron(folder / "data", folder / "cache", 200_000),
            "datasets, numpy format": hugging_face(folder / "data", folder),
        }
        report({name: rows for name, rows in peers.items() if rows is not None}, args)


def report(peers: dict[str, Iterator[int]], args: argparse.Namespace) -> None:
    """Alternates the peers and prints medians and ratios."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for rows in peers.values():
        rows_per_cpu_second(rows, 0.2)
    for _ in range(args.rounds):
        for name, rows in peers.items():
            found[name].append(rows_per_cpu_second(rows, args.seconds))
    ours_median = statistics.median(found["megahybrid"])
    print(
        f"{'rows of 8,193 tokens per CPU-second':36} {'median':>10} {'lowest':>10} {'ours is':>9}"
    )
    for name, values in found.items():
        median = statistics.median(values)
        ratio = f"{ours_median / median:.1f} x" if name != "megahybrid" else ""
        print(f"{name:36} {median:10,.0f} {min(values):10,.0f} {ratio:>9}")
    keep("data_serving", {"rows_per_cpu_second": found})


def keep(name: str, found: dict[str, Any]) -> None:
    """Writes every number measured, with what it was measured on."""
    import torch  # here: the workers of data_prepare import this file, and need no torch

    from benchmarks.machine import machine, write

    print(write(name, {"machine": machine(torch.device("cpu"))} | found))


if __name__ == "__main__":
    main()
