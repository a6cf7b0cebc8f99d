"""A trained run on text, and its commands called."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from megahybrid import cli
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.data_prep.vocabulary import train_tokenizer
from tests.train.forked import Nursery, Ranks

VOCAB = 300
RUN = """
precision: fp32
device: cpu
model:
  vocab_size: 310
  hidden_size: 32
  intermediate_size: 48
  num_heads: 4
  num_kv_heads: 2
  layer_plan:
    num_layers: 2
    pattern: [local, global]
    schemes:
      local: {{position: {{kind: rope, theta: 10000}}, window: 8, qk_norm: {{kind: rms}}}}
      global: {{position: {{kind: nope}}}}
parallel: {{tensor: 2, zero_stage: 1}}
data:
  sources: {{text: {{path: {folder}/text}}}}
  held_out: {{unseen: {{path: {folder}/unseen}}}}
  block_tokens: 256
  lanes: 4
  tokenizer: {folder}/words.model
stages:
  - {{name: short, tokens: 2048, lengths: {{16: 1}}, batch_tokens: 512, micro_batch_tokens: 256,
      weights: {{text: 1}}, learning_rate: {{kind: linear, start: 1.0e-2, end: 5.0e-3}}}}
  - {{name: long, tokens: 2048, lengths: {{32: 1, 64: 1}}, batch_tokens: 512,
      micro_batch_tokens: 256, weights: {{text: 1}}, schemes: {{local: {{window: 24}}}},
      learning_rate: {{kind: linear, start: 5.0e-3, end: 1.0e-3}}}}
checkpoint: {{every_steps: 100, keep_last: 3}}
evaluate: {{every_steps: null, max_tokens: 3000, context_gain: [trained, 100]}}
"""


@dataclass(frozen=True)
class Trained:
    folder: Path
    run: Path  # its directory
    tokenizer: Path


def train_text_run(folder: Path, nursery: Nursery) -> Trained:
    """A run of eight steps through two stages on two ranks, on text of a hundred words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(100)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 200))) for _ in range(120)]
    (folder / "lines.txt").write_text("\n".join(texts), encoding="utf-8")
    train_tokenizer([folder / "lines.txt"], folder / "words.model", VOCAB)
    tokenizer = load_tokenizer(folder / "words.model")
    for name, part in (("text", texts[:100]), ("unseen", texts[100:])):
        with TokenWriter(folder / name, tokenizer.info) as writer:
            for ids in tokenizer.encode(part):
                writer.add(ids)
    (folder / "run.yaml").write_text(RUN.format(folder=folder), encoding="utf-8")
    ranks = Ranks(nursery, ["train", "run.yaml", f"directory={folder / 'run'}"], 2, folder)
    assert ranks.wait() == [0, 0], ranks.text()[-2000:]
    return Trained(folder, folder / "run", folder / "words.model")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that must succeed prints."""
    code = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command which must fail with code 2 prints."""
    code = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert code == 2 and not told.out
    assert told.err.startswith("megahybrid: ") and told.err.count("\n") == 1, told.err
    return told.err
