"""The commands on a device as a user types them: a run in bf16 through three lengths, stopped and
gone on with to the bit, evaluated, and sampled from."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megahybrid.data.token_writer import TokenWriter
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.data_prep.vocabulary import train_tokenizer
from tests.train.example import arithmetic_of, checkpoint_bytes, steps_of, steps_so_far
from tests.train.forked import Nursery, Ranks

ROOT = Path(__file__).parents[2]
STEPS = 36
RUN = """
precision: bf16
deterministic: true
model:
  vocab_size: 310
  hidden_size: 64
  intermediate_size: 96
  num_heads: 2
  num_kv_heads: 1
  layer_plan:
    num_layers: 2
    pattern: [local, global]
    schemes:
      local: {position: {kind: rope, theta: 10000}, window: 8, qk_norm: {kind: rms}}
      global: {position: {kind: nope}}
data:
  sources: {text: {path: text}}
  held_out: {unseen: {path: unseen}}
  block_tokens: 256
  lanes: 4
  tokenizer: words.model
kernels: {blocks: plain}
stages:
  - {name: short, tokens: 6144, lengths: {16: 1}, batch_tokens: 512, micro_batch_tokens: 256,
      weights: {text: 1}, learning_rate: {kind: linear, start: 1.0e-2, end: 5.0e-3}}
  - {name: middle, tokens: 6144, lengths: {64: 1}, batch_tokens: 512, micro_batch_tokens: 256,
      weights: {text: 1}, schemes: {local: {window: 24}}, recompute: selective,
      learning_rate: {kind: linear, start: 5.0e-3, end: 2.0e-3}}
  - {name: long, tokens: 6144, lengths: {128: 1}, batch_tokens: 512, micro_batch_tokens: 256,
      weights: {text: 1}, schemes: {local: {window: 24}}, recompute: full,
      learning_rate: {kind: linear, start: 2.0e-3, end: 1.0e-3}}
checkpoint: {every_steps: 8, keep_last: 20}
evaluate: {every_steps: 12, max_tokens: 3000}
log: {audit_every_steps: 10}
"""


def write_text(folder: Path) -> None:
    """Text of a hundred words, its tokenizer, its tokens, and the run file."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(100)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 200))) for _ in range(120)]
    (folder / "lines.txt").write_text("\n".join(texts), encoding="utf-8")
    train_tokenizer([folder / "lines.txt"], folder / "words.model", 300)
    tokenizer = load_tokenizer(folder / "words.model")
    for name, part in (("text", texts[:100]), ("unseen", texts[100:])):
        with TokenWriter(folder / name, tokenizer.info) as writer:
            for ids in tokenizer.encode(part):
                writer.add(ids)
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")


class Command:
    """`megahybrid *arguments` in a folder, under way, in a process of its own from the start."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.output = folder / f"{'-'.join(arguments[:3]).replace('/', '-')}.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megahybrid", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
            )

    def runs(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ended(self, code: int, seconds: float = 120.0) -> str:
        """What it printed; it must end with `code` within `seconds`."""
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            found = None
        said = self.output.read_text()
        assert found == code, said[-3000:]
        return said


class Forked:
    """The same, forked from what has been imported, which a CUDA driver does not survive."""

    def __init__(self, nursery: Nursery, folder: Path, *arguments: str) -> None:
        output = folder / "-".join(arguments[:3]).replace("/", "-")
        output.mkdir(exist_ok=True)
        self.ranks = Ranks(nursery, arguments, 1, folder, outputs=output)

    def runs(self) -> bool:
        return self.ranks.runs()

    def stop(self) -> None:
        self.ranks.send(signal.SIGTERM)

    def ended(self, code: int, seconds: float = 120.0) -> str:
        assert self.ranks.wait(seconds) == [code], self.ranks.text()[-3000:]
        return self.ranks.text()


@dataclass(frozen=True)
class Place:
    """Where commands run, and what forks them: nothing where they run on a card."""

    folder: Path
    nursery: Nursery | None

    @property
    def device(self) -> str:
        return "cpu" if self.nursery else "cuda"

    def command(self, *arguments: str) -> Command | Forked:
        if self.nursery is None:
            return Command(self.folder, *arguments)
        return Forked(self.nursery, self.folder, *arguments)

    def train(self, directory: str, *more: str) -> Command | Forked:
        how = (f"directory={directory}", f"device={self.device}")
        return self.command("train", "run.yaml", *how, *more)


def stopped_early(place: Place) -> None:
    """A run that is asked to stop after its first steps, and does."""
    command = place.train("again")
    deadline = time.monotonic() + 120
    while steps_so_far(place.folder / "again") < 3:
        assert time.monotonic() < deadline and command.runs(), command.ended(0)
        time.sleep(0.002)
    command.stop()
    command.ended(75)
    assert 3 <= len(steps_of(place.folder / "again")) < STEPS


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_in_bf16_is_stopped_and_gone_on_with_to_the_bit_evaluated_and_sampled(
    device: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    write_text(tmp_path)
    place = Place(tmp_path, request.getfixturevalue("nursery") if device == "cpu" else None)
    # Beside each other: a card has room, and starting is most of it.
    whole = place.train("whole")
    # On a card what is not said is measured: kernels, and plain against compiled blocks.
    told = ["deterministic=false", "kernels.blocks=auto", "checkpoint.every_steps=100"]
    measured = place.train("measured", *told) if device == "cuda" else None
    stopped_early(place)
    place.train("again").ended(0)
    whole.ended(0)

    assert [line.stage for line in steps_of(tmp_path / "whole")[::12]] == [
        "short",
        "middle",
        "long",
    ]
    assert arithmetic_of(tmp_path / "again") == arithmetic_of(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "again", STEPS)
    for step in (12, 24, STEPS):
        assert checkpoint_bytes(tmp_path / "again", step) == checkpoint_bytes(
            tmp_path / "whole", step
        )
    losses = [line.loss for line in steps_of(tmp_path / "whole")]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0

    score = place.command("evaluate", "again", "--device", device)
    text = place.command("sample", "again", "--prompt", "ab", "--tokens", "20", "--device", device)
    assert "unseen" in score.ended(0)
    assert len(text.ended(0)) > 10
    if measured is not None:
        measured.ended(0)
        compared = [line.loss for line in steps_of(tmp_path / "measured")]
        assert compared == pytest.approx(losses, rel=0.05)
