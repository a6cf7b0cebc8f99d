"""Saving and resuming through `megahybrid train`: layouts, branches, changed configs, kills."""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megahybrid.checkpoint.fragments import STATES, whole
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.manifest import read_manifest
from megahybrid.checkpoint.reader import Reader
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_writer import TokenWriter
from megahybrid.ledger import StepLine, read_ledger
from tests.events import named
from tests.train.forked import Nursery, Ranks

VOCAB, STEPS = 70, 12
RUN = """
precision: fp32
device: cpu
model:
  vocab_size: 70
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
stages:
  - {{name: short, tokens: 3072, lengths: {{16: 1}}, batch_tokens: 512, micro_batch_tokens: 128,
      weights: {{text: 1}}, learning_rate: {{kind: linear, start: 1.0e-3, end: 1.0e-3}}}}
  - {{name: long, tokens: 3072, lengths: {{32: 1}}, batch_tokens: 512, micro_batch_tokens: 128,
      weights: {{text: 1}}, learning_rate: {{kind: linear, start: 1.0e-3, end: 5.0e-4}}}}
optimizer: {{eps: 1.0e-5}}
checkpoint: {{every_steps: 2, keep_last: 9}}
evaluate: {{every_steps: null, max_tokens: 500}}
"""


@dataclass(frozen=True)
class Place:
    folder: Path
    nursery: Nursery

    def begin(self, run: str, *words: str, processes: int = 1) -> Ranks:
        """`megahybrid train` into a directory."""
        layout = [] if processes > 1 else ["parallel.tensor=1"]
        where = [f"directory={self.folder / run}", *layout, *words]
        return Ranks(self.nursery, ["train", "run.yaml", *where], processes, self.folder)

    def train(self, run: str, *words: str, processes: int = 1, code: int = 0) -> str:
        """The same, to its end; returns what it printed."""
        ranks = self.begin(run, *words, processes=processes)
        assert ranks.wait() == [code] * processes, ranks.text()
        return ranks.text()

    def steps(self, run: str) -> list[StepLine]:
        return read_ledger(self.folder / run / "ledger.jsonl").steps

    def events(self, run: str, name: str) -> list[dict]:
        return [
            line.detail for line in named(read_ledger(self.folder / run / "ledger.jsonl"), name)
        ]

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / run / "checkpoints" / f"step-{step:08d}"


def names(checkpoints: Path) -> set[str]:
    """The published ones."""
    return {path.name for path in checkpoints.glob("step-*")}


def write_text(folder: Path, seed: int, documents: int) -> None:
    draw = random.Random(seed)
    info = TokenizerInfo(kind="test", sha256="0" * 64, vocab_size=VOCAB, eod_id=0)
    with TokenWriter(folder, info) as writer:
        for _ in range(documents):
            words = [draw.randrange(1, VOCAB)]
            for _ in range(draw.randint(3, 120)):
                words.append((words[-1] * 3 + draw.randrange(3)) % (VOCAB - 1) + 1)
            writer.add(words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Data, a run file, and an unbroken run of twelve steps through two stages on two ranks."""
    folder = tmp_path_factory.mktemp("training")
    for name, seed, documents in (("text", 0, 200), ("unseen", 1, 20), ("other", 2, 100)):
        write_text(folder / name, seed, documents)
    (folder / "run.yaml").write_text(RUN.format(folder=folder), encoding="utf-8")
    with Nursery() as nursery:
        made = Place(folder, nursery)
        made.train("unbroken", processes=2)
        yield made


def weights(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with Reader(path) as reader:
        for name, tensor in reader.manifest.tensors.items():
            for state in STATES:
                yield f"{state}/{name}", reader.read(name, state, whole(tensor.shape))


def cut_back(place: Place, run: str, step: int) -> None:
    """A run as it was when only the checkpoints up to `step` had been written."""
    shutil.copytree(place.folder / "unbroken", place.folder / run)
    for path in (place.folder / run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_the_same_layout_goes_on_to_the_bit(place: Place) -> None:
    cut_back(place, "again", 4)
    place.train("again", processes=2)
    ours, theirs = place.steps("again"), place.steps("unbroken")
    assert [line.loss for line in ours] == [line.loss for line in theirs] and len(ours) == STEPS
    assert [line.cursor_crc for line in ours] == [line.cursor_crc for line in theirs]
    pairs = zip(
        weights(place.checkpoint("again", STEPS)),
        weights(place.checkpoint("unbroken", STEPS)),
        strict=True,
    )
    assert all(a[1].tobytes() == b[1].tobytes() for a, b in pairs)


def test_another_layout_goes_on_with_the_same_rows(place: Place) -> None:
    """tensor 2 → data 2 with ZeRO-3 → one process with ZeRO-2, in one run, over a stage's end."""
    cut_back(place, "moved", 4)
    other = ("parallel.tensor=1", "parallel.zero_stage=3")
    place.train("moved", *other, "stages.0.tokens=3072", processes=2)
    assert place.steps("moved")[-1].step == STEPS
    for step in (10, 12):
        shutil.rmtree(place.checkpoint("moved", step))
    place.train("moved", "parallel.zero_stage=2")
    ours, theirs = place.steps("moved"), place.steps("unbroken")
    assert [line.cursor_crc for line in ours] == [line.cursor_crc for line in theirs]
    losses = [line.loss for line in theirs]
    assert [line.loss for line in ours] == pytest.approx(losses, rel=1e-5)
    changes = place.events("moved", "config_change")
    assert {"field": "parallel.tensor", "before": "2", "now": "1"} in changes


def test_saving_beside_the_training_changes_nothing(place: Place) -> None:
    place.train("waiting", "checkpoint.asynchronous=false", processes=2)
    for step in (4, 12):
        pairs = zip(
            weights(place.checkpoint("waiting", step)),
            weights(place.checkpoint("unbroken", step)),
            strict=True,
        )
        assert all(a[1].tobytes() == b[1].tobytes() for a, b in pairs), step
    saved = place.events("unbroken", "save")
    assert [detail["saved_step"] for detail in saved] == [2, 4, 6, 8, 10, 12]
    assert all(detail["ok"] and detail["stall_seconds"] > 0 for detail in saved)


def test_a_semantic_change_is_refused_with_both_values_unless_allowed(place: Place) -> None:
    cut_back(place, "changed", 4)
    change = "model.layer_plan.schemes.local.window=6"
    told = place.train("changed", change, code=2)
    field = "model.layer_plan.schemes.local.window"
    assert f"{field}=6 is not what the run in" in told and "was started with (8;" in told
    assert f"--allow {field}" in told
    place.train("changed", "log.audit_every_steps=3", change, "--allow", "model.layer_plan")
    assert {"field": field, "before": "8", "now": "6"} in place.events("changed", "config_change")
    assert place.steps("changed")[-1].step == STEPS
    assert place.steps("changed")[5].loss != place.steps("unbroken")[5].loss


def test_branches_take_everything_or_the_weights_and_know_their_parent(place: Place) -> None:
    trunk = place.checkpoint("unbroken", 6)
    place.train(
        "decay",
        f"start.checkpoint={trunk}",
        "start.take=all",
        "stages.1.learning_rate.end=0.0",
        f"data.sources.other.path={place.folder}/other",
        "stages.1.weights={other: 1}",
    )
    first = place.steps("decay")[0]
    assert (first.step, first.tokens) == (7, 3072 + 512)
    assert first.source_tokens == {"text": 3072, "other": 512}
    place.train("anew", f"start.checkpoint={place.folder / 'unbroken'}", "stages.1.tokens=512")
    assert place.steps("anew")[0].step == 1
    assert place.steps("anew")[0].loss < place.steps("unbroken")[0].loss
    for run, parent, take in (("decay", 6, "all"), ("anew", STEPS, "weights")):
        newest = latest(place.folder / run)
        assert newest is not None
        told = read_manifest(newest).train_state["parent"]
        source = str(place.checkpoint("unbroken", parent).resolve())
        assert (told["checkpoint"], told["step"], told["take"]) == (source, parent, take)
        (event,) = place.events(run, "start" if take == "weights" else "resume")
        assert event["parent"] == told


def test_a_branch_that_takes_the_state_goes_on_with_the_moments_and_begins_the_data_anew(
    place: Place,
) -> None:
    """Its first update by hand: the gradient is what the first moment tells, and all else follows
    from the parent's moments and count of updates."""
    trunk = place.checkpoint("unbroken", 6)
    one = [f"start.checkpoint={trunk}", "checkpoint.every_steps=1", "optimizer.clip_norm=null"]
    place.train("state", *one, "start.take=state", "stages.0.tokens=512", "stages.1.tokens=512")
    begun, first = place.steps("state")[0], place.steps("unbroken")[0]
    assert (begun.step, begun.tokens, begun.cursor_crc) == (1, 512, first.cursor_crc)
    assert begun.learning_rate == first.learning_rate and begun.loss != first.loss
    rate, decay, (beta1, beta2), eps, updates = 1e-3, 0.1, (0.9, 0.95), 1e-5, 7
    with Reader(trunk) as before, Reader(place.checkpoint("state", 1)) as after:
        assert after.manifest.optimizer_step == updates
        assert after.manifest.train_state["parent"]["take"] == "state"
        for name, tensor in before.manifest.tensors.items():
            w0, m0, v0 = (before.read(name, state, whole(tensor.shape)) for state in STATES)
            w1, m1, v1 = (after.read(name, state, whole(tensor.shape)) for state in STATES)
            gradient = (m1.astype(float) - beta1 * m0) / (1 - beta1)
            squares = beta2 * v0 + (1 - beta2) * gradient**2
            np.testing.assert_allclose(v1, squares, rtol=1e-4, atol=1e-10)
            root = np.sqrt(squares / (1 - beta2**updates)) + eps
            shrunk = w0 * (1 - rate * decay) if len(tensor.shape) > 1 else w0
            update = rate * (m1 / (1 - beta1**updates)) / root
            np.testing.assert_allclose(w1, shrunk - update, rtol=1e-4, atol=2e-7)


def test_best_and_every_so_many_stay(place: Place) -> None:
    keep = [f"checkpoint.{word}" for word in ("keep_last=1", "keep_every_steps=4", "keep_best=x")]
    told = place.train("kept", *keep, code=2)
    assert "checkpoint.keep_best names 'x', which data.held_out does not define" in told
    place.train("kept", *keep[:2], "checkpoint.keep_best=unseen", "evaluate.every_steps=2")
    scores = {
        detail["step"]: detail["loss"]
        for detail in place.events("kept", "evaluate")
        if detail["rows"] == "stream"
    }
    # The last step is scored after its checkpoint is written.
    best = min((step for step in scores if step < STEPS), key=lambda step: scores[step])
    found = {int(path.name[5:]) for path in (place.folder / "kept" / "checkpoints").iterdir()}
    assert found == {4, 8, 12, best}


def test_kills_at_any_moment_of_a_run_that_always_saves(place: Place) -> None:
    """A kill -9 while a thread writes leaves the checkpoint before, and the run ends as if never
    interrupted."""
    checkpoints = place.folder / "killed" / "checkpoints"
    for moment in range(3):
        before = names(checkpoints)
        ranks = place.begin("killed", "checkpoint.every_steps=1", processes=2)
        ranks.until(lambda: len(names(checkpoints) - before) > moment)  # noqa: B023
        time.sleep(0.004 * moment)
        ranks.send(signal.SIGKILL)
        ranks.wait()
        found = latest(place.folder / "killed")
        assert found is not None
    place.train("killed", "checkpoint.every_steps=1", processes=2)
    losses = [line.loss for line in place.steps("killed")]
    assert losses == [line.loss for line in place.steps("unbroken")]
    assert not [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]


def test_the_ledger_tells_the_stall_apart_from_the_writing(place: Place) -> None:
    lines = (place.folder / "unbroken" / "ledger.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    details = [line["detail"] for line in events if line.get("event") == "save"]
    for detail in details:
        assert detail["checked_seconds"] >= detail["seconds"] > 0
