"""Preparing and opening data: tokenizing and verifying against peers, and a trillion-token corpus.

    python -m benchmarks.data_prepare [tokenize] [verify] [open] [--rounds 3] [--megabytes 40]

tokenize: the same .jsonl and tokenizer, two processes, to a file that can be trained on: ours (with
the shuffle, checksums and fsync); datasets.map(batched=True) and save_to_disk; a Pool that encodes
line by line and sends the ids to one writer, as Megatron's tools/preprocess_data.py does. verify:
against sha256sum of the same files, CPU-seconds. open: 10^12 tokens in 3,726 sparse shards with
1.25 G documents, to the first row. Rounds alternate; medians are printed.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_serving import keep, write_corpus

PROCESSES = 2


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in usage)


def make_text(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """Python's library as .jsonl, repeated to size, and a 16k byte-level BPE trained on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megahybrid.data_prep.gather_stdlib import stdlib_documents

    path, size, number = folder / "text.jsonl", 0, 0
    documents = list(stdlib_documents())
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            name, text = documents[number % len(documents)]
            size += file.write(json.dumps({"id": name, "text": f"{number}\n{text}"}) + "\n")
            number += 1
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in documents[:400]), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return path, folder / "tokenizer.json"


def ours(text: Path, tokenizer: Path, output: Path) -> None:
    """`megahybrid data tokenize`."""
    from megahybrid.data_prep.tokenize import tokenize

    tokenize([text], tokenizer, output, workers=PROCESSES, quiet=True)


def hugging_face(text: Path, tokenizer: Path, output: Path) -> None:
    """datasets.map(batched=True), then save_to_disk."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    backend = Tokenizer.from_file(str(tokenizer))
    eod = backend.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*item.ids, eod] for item in found]}

    cache = output.with_suffix(".cache")
    dataset = datasets.load_dataset(
        "json", data_files=str(text), split="train", cache_dir=str(cache)
    )
    made = dataset.map(
        encode, batched=True, num_proc=PROCESSES, remove_columns=dataset.column_names
    )
    made.save_to_disk(str(output), num_proc=PROCESSES)
    shutil.rmtree(cache)


_backend: Any = None


def _begin(tokenizer: str) -> None:
    global _backend
    from tokenizers import Tokenizer

    _backend = Tokenizer.from_file(tokenizer)


def _encode_line(line: str) -> list[int]:
    return [*_backend.encode(json.loads(line)["text"], add_special_tokens=False).ids, 0]


def pool_per_line(text: Path, tokenizer: Path, output: Path) -> None:
    """One task a line, ids pickled back, one writer: as Megatron's preprocess_data.py."""
    output.mkdir()
    lengths = []
    with (
        multiprocessing.get_context("spawn").Pool(PROCESSES, _begin, (str(tokenizer),)) as pool,
        open(text, encoding="utf-8") as lines,
        open(output / "text.bin", "wb") as file,
    ):
        for ids in pool.imap(_encode_line, lines, 32):
            file.write(np.asarray(ids, np.uint16).tobytes())
            lengths.append(len(ids))
        pool.close()
        pool.join()  # so that the children's CPU-seconds are counted
    np.asarray(lengths, np.int32).tofile(output / "text.idx")


def tokenize_table(folder: Path, rounds: int, megabytes: int) -> dict[str, Any]:
    """MB/s by the clock, and per CPU-second; every round's seconds of both are returned."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    text, tokenizer = make_text(folder, megabytes)
    size = text.stat().st_size / 1e6
    peers: dict[str, Callable[[Path, Path, Path], None]] = {
        "megahybrid data tokenize": ours,
        "datasets.map and save": hugging_face,
        "Pool, line by line": pool_per_line,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for number in range(rounds):
        for name, prepare in peers.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            try:
                prepare(text, tokenizer, folder / f"out-{number}")
            except ImportError as error:
                print(f"{name}: not measured ({error})")
                continue
            found[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
            shutil.rmtree(folder / f"out-{number}")
    print(f"{f'tokenize {size:.0f} MB, 2 processes':30} {'MB/s':>8} {'ours is':>8} {'MB/cpu-s':>9}")
    mine = statistics.median(wall for wall, _ in found["megahybrid data tokenize"])
    for name, values in found.items():
        if values:
            wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
            ratio = f"{wall / mine:7.2f}x"
            print(f"{name:30} {size / wall:8.2f} {ratio:>8} {size / cpu:9.2f}")
    return {"megabytes": size, "wall_and_cpu_seconds": found}


def verify_table(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU-seconds for the same bytes."""
    from megahybrid.data.verify import verify_dataset

    write_corpus(folder / "data", 150_000_000)
    files = [str(path) for path in (folder / "data").glob("shard-*")]
    found: dict[str, list[float]] = {"megahybrid data verify": [], "sha256sum": []}
    for _ in range(rounds):
        began = cpu_seconds()
        verify_dataset(folder / "data")
        found["megahybrid data verify"].append(cpu_seconds() - began)
        began = cpu_seconds()
        subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
        found["sha256sum"].append(cpu_seconds() - began)
    size = sum(Path(path).stat().st_size for path in files) / 1e9
    ours_median, peer = (statistics.median(values) for values in found.values())
    print(f"verify {size:.2f} GB: {size / ours_median:.2f} GB per CPU-second", end="; ")
    print(f"sha256sum {size / peer:.2f}; ours is {peer / ours_median:.1f}x")
    return {"gigabytes": size, "cpu_seconds": found}


def write_sparse_corpus(folder: Path, tokens: int, documents: int) -> None:
    """Shards of holes: every token is 0. Indexes are right at both ends, which is all that an open
    of this size looks at."""
    from megahybrid.data.manifest import (
        BLOCK_BYTES,
        MANIFEST_NAME,
        LengthBin,
        Manifest,
        ShardEntry,
        TokenizerInfo,
    )
    from megahybrid.data.token_file import DTYPE_CODES, HEADER, MAGIC

    folder.mkdir()
    shard_tokens = 2**28
    zeros = bytes(BLOCK_BYTES)
    whole = zlib.crc32(zeros)
    shards = []
    for number in range(-(-tokens // shard_tokens)):
        count = min(shard_tokens, tokens - number * shard_tokens)
        held = documents * count // tokens
        name = f"shard-{number:05d}"
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(2 * count)
        with open(folder / f"{name}.idx", "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES["uint16"], held, held + 1))
            for at, form, value in (
                (4 * (held - 1), "<i", count // held),
                (4 * held + 8 * (held - 1), "<q", 2 * (count - count // held)),
                (12 * held + 8 * held, "<q", held),
            ):
                file.seek(HEADER.size + at)
                file.write(struct.pack(form, value))
        blocks, rest = divmod(2 * count, BLOCK_BYTES)
        crc = (whole,) * blocks + ((zlib.crc32(zeros[:rest]),) if rest else ())
        shards.append(
            ShardEntry(
                bin=f"{name}.bin",
                idx=f"{name}.idx",
                documents=held,
                tokens=count,
                bytes=2 * count,
                block_bytes=BLOCK_BYTES,
                crc32=crc,
            )
        )
    manifest = Manifest(
        tokenizer=TokenizerInfo(kind="sentencepiece", sha256="0" * 64, vocab_size=50_000, eod_id=1),
        dtype="uint16",
        documents=sum(shard.documents for shard in shards),
        tokens=tokens,
        length_histogram=(LengthBin(min_tokens=512, documents=documents, tokens=tokens),),
        shards=tuple(shards),
        sources=(),
        command="sparse",
    )
    (folder / MANIFEST_NAME).write_text(manifest.dump())


OPEN = """
import re, sys, time
from pathlib import Path
import numpy
began = time.perf_counter()
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.loader import StepShape, read_step
from megahybrid.data.mixture import Mixture
dataset = TokenDataset(sys.argv[1])
mixture = Mixture({"a": dataset}, {"a": 1}, seed=1, block_tokens=262144, lanes=64)
step = read_step(mixture, mixture.start(), StepShape(8192, 1, 1))
assert step.micro_batches[0].shape == (1, 8192)
seconds = time.perf_counter() - began
# Not ru_maxrss, which keeps what the parent had before exec.
memory = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(seconds, memory, dataset.tokens, dataset.documents, len(dataset.shards))
"""


def open_table(folder: Path, rounds: int) -> dict[str, Any]:
    """Time and memory of a fresh process."""
    write_sparse_corpus(folder / "sparse", 10**12, 1_250_000_000)
    found = []
    for _ in range(rounds):
        run = subprocess.run(
            [sys.executable, "-c", OPEN, str(folder / "sparse")],
            check=True,
            capture_output=True,
            text=True,
        )
        found.append([float(word) for word in run.stdout.split()])
    seconds, memory = (statistics.median(row[i] for row in found) for i in (0, 1))
    _, _, tokens, documents, shards = found[0]
    print(
        f"open and first row of {tokens:.3g} tokens, {documents:.3g} documents, {shards:.0f} "
        f"shards: {seconds:.2f} s, peak memory {memory:.0f} MiB"
    )
    return {"tokens": tokens, "shards": shards, "seconds_and_mib": [row[:2] for row in found]}


def main() -> None:
    """Prints the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=["tokenize", "verify", "open"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=40)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for table in args.tables:
        with tempfile.TemporaryDirectory() as name:
            if table == "tokenize":
                found[table] = tokenize_table(Path(name), args.rounds, args.megabytes)
            elif table == "verify":
                found[table] = verify_table(Path(name), args.rounds)
            else:
                found[table] = open_table(Path(name), args.rounds)
    keep("data_prepare", found)


if __name__ == "__main__":
    main()
