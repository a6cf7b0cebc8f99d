"""A run of 40,000 parameters with two sources and three stages, on data drawn here."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_writer import TokenWriter
from megahybrid.ledger import LEDGER_NAME, StepLine, read_every_line, read_ledger

VOCAB = 97
TOKENIZER = TokenizerInfo(kind="sentencepiece", sha256="0" * 64, vocab_size=VOCAB, eod_id=1)

RUN = """
seed: 1
precision: fp32
device: cpu
model:
  vocab_size: 97
  hidden_size: 32
  intermediate_size: 64
  num_heads: 4
  num_kv_heads: 2
  block: pre_norm
  norm: rms
  layer_plan:
    num_layers: 2
    pattern: [local, global]
    schemes:
      local: {position: {kind: rope, theta: 10000}, window: 16, qk_norm: {kind: rms}}
      global: {position: {kind: nope}}
data:
  sources: {books: {path: books}, code: {path: code}}
  held_out: {held: {path: held}}
  block_tokens: 512
  lanes: 4
stages:
  - name: short
    tokens: 4096
    lengths: {64: 1}
    batch_tokens: 1024
    micro_batch_tokens: 512
    weights: {books: 1}
    learning_rate: {kind: linear, start: 3.0e-3, end: 1.0e-3, warmup_tokens: 2000}
  - name: middle
    tokens: 6144
    lengths: {256: 1}
    batch_tokens: 1024
    micro_batch_tokens: 512
    weights: {books: 1, code: 1}
    schemes: {local: {window: 32}}
    learning_rate: {kind: linear, start: 1.0e-3, end: 5.0e-4}
  - name: long
    tokens: 6144
    lengths: {128: 1, 512: 1}
    batch_tokens: 1024
    micro_batch_tokens: 512
    weights: {books: 1, code: 3}
    learning_rate: {kind: linear, start: 5.0e-4, end: 1.0e-4}
checkpoint: {every_steps: 3, keep_last: 20}
evaluate: {every_steps: 5, max_tokens: 2048}
log: {audit_every_steps: 4}
"""
STEPS = 16  # 4 + 6 + 6


def write_data(folder: Path) -> None:
    """Two sources of a few thousand tokens, so that a run sees them more than once."""
    draw = np.random.default_rng(0)
    for name, documents, longest in (("books", 12, 700), ("code", 40, 150), ("held", 6, 400)):
        with TokenWriter(folder / name, TOKENIZER) as writer:
            for length in draw.integers(5, longest, documents):
                writer.add((np.cumsum(draw.integers(0, 3, length)) + draw.integers(95)) % 95 + 2)


def write_example(folder: Path) -> Path:
    """The data and `run.yaml` in `folder`; returns the run file."""
    write_data(folder)
    run_file = folder / "run.yaml"
    run_file.write_text(RUN)
    return run_file


def steps_of(run: Path) -> list[StepLine]:
    """The steps of a run that still hold."""
    return read_ledger(run / LEDGER_NAME).steps


def steps_so_far(run: Path) -> int:
    """Step lines of all attempts, also while the run goes on."""
    path = run / LEDGER_NAME
    if not path.exists():
        return 0
    return sum(isinstance(line, StepLine) for line in read_every_line(path))


def arithmetic_of(run: Path) -> list[tuple[Any, ...]]:
    """Of each step, all that must not depend on interruptions, to the bit."""
    return [
        (s.step, s.stage, s.tokens, s.length, s.learning_rate, s.loss, s.gradient_norm,
         s.cursor_crc, json.dumps(s.source_tokens), json.dumps(s.gradient_norm_by_kind))
        for s in steps_of(run)
    ]  # fmt: skip


def checkpoint_bytes(run: Path, step: int = STEPS) -> dict[str, bytes]:
    """The fragments files of one checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
