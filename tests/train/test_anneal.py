"""A stage whose window and theta change on the way: as stages of its own, resumed anywhere."""

import json
import shutil
from pathlib import Path

import pytest

from megahybrid.commands.trained_model import load_trained_model
from megahybrid.interop.export import export
from megahybrid.ledger import LEDGER_NAME, read_ledger
from megahybrid.parallel.mesh import ParallelMesh
from tests.events import named
from tests.train.example import arithmetic_of, checkpoint_bytes, steps_of
from tests.train.forked import Nursery, Ranks

PLAIN = "model.layer_plan.schemes.local.qk_norm.kind=none"
BOTH = "{local: {window: 384, position: {theta: 5.0e5}}}"
MIDDLE = [
    PLAIN,
    "model.layer_plan.schemes.local.window=128",
    "checkpoint.every_steps=1",
    "stages.1.lengths={512: 1}",
    "stages.1.schemes={}",
    "stages.1.weights={books: 1}",
    "stages.1.learning_rate={kind: linear, start: 1.0e-3, end: 1.0e-3}",
]
ANNEALED = [*MIDDLE, f"stages.1.anneal={{steps: 3, schemes: {BOTH}}}"]
WINDOWS = [128, 128, 256, 256, 384, 384]  # of the steps 4 to 9
THETAS = [10000, 10000, 70710.7, 70710.7, 500000, 500000]
LAYOUTS = {
    # Before a change, at one, after it, and at the stage's end.
    "single": (1, ["parallel.zero_stage=1"], (5, 6, 7, 10)),
    "tensor2-zero3": (2, ["parallel.tensor=2", "parallel.zero_stage=3"], (7,)),
}


def train(nursery: Nursery, folder: Path, directory: str, world: int, *more: str) -> None:
    ranks = Ranks(nursery, ["train", "run.yaml", f"directory={directory}", *more], world, folder)
    assert ranks.wait() == [0] * world, ranks.text()


def test_an_annealed_stage_is_the_stages_it_could_be_written_as(
    nursery: Nursery, example: Path
) -> None:
    """To the bit: a stage per value, each with the fields it has by then."""
    train(nursery, example, "annealed", 1, *ANNEALED)
    stages = [
        f"{{name: part{n}, tokens: 2048, lengths: {{512: 1}}, batch_tokens: 1024, "
        "micro_batch_tokens: 512, weights: {books: 1}, "
        f"schemes: {{local: {{window: {WINDOWS[2 * n]}, position: {{theta: {THETAS[2 * n]}}}}}}}, "
        "learning_rate: {kind: linear, start: 1.0e-3, end: 1.0e-3}}"
        for n in range(3)
    ]
    text = (example / "run.yaml").read_text()
    head, rest = text.split("  - name: middle\n")
    (example / "parts.yaml").write_text(
        head + "".join(f"  - {stage}\n" for stage in stages) + "  - name: long\n"
        + rest.split("  - name: long\n")[1]
    )  # fmt: skip
    same = [PLAIN, MIDDLE[1], MIDDLE[2]]
    ranks = Ranks(nursery, ["train", "parts.yaml", "directory=parts", *same], 1, example)
    assert ranks.wait() == [0], ranks.text()
    one, other = ([s.loss for s in steps_of(example / name)] for name in ("annealed", "parts"))
    assert one == other
    assert checkpoint_bytes(example / "annealed") == checkpoint_bytes(example / "parts")

    events = named(read_ledger(example / "annealed" / LEDGER_NAME), "anneal")
    told = [(e.step, e.detail["local.window"], e.detail["local.position.theta"]) for e in events]
    assert told == [(6, 256, 70710.7), (8, 384, 500000)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumed_at_and_inside_a_change_is_the_run_that_was_not_interrupted(
    layout: str, nursery: Nursery, example: Path
) -> None:
    world, overrides, steps = LAYOUTS[layout]
    train(nursery, example, "whole", world, *ANNEALED, *overrides)
    for step in steps:
        left = example / f"from{step}"
        (left / "checkpoints").mkdir(parents=True)
        kept = f"step-{step:08d}"
        shutil.copytree(example / "whole/checkpoints" / kept, left / "checkpoints" / kept)
        manifest = json.loads((left / "checkpoints" / kept / "manifest.json").read_text())
        scheme = manifest["train_state"]["schemes"]["local"]
        assert (scheme["window"], scheme["position"]["theta"]) == (
            WINDOWS[step - 5], THETAS[step - 5]
        )  # fmt: skip
        train(nursery, example, f"from{step}", world, *ANNEALED, *overrides)
        assert arithmetic_of(left) == arithmetic_of(example / "whole")[step:]
        assert checkpoint_bytes(left) == checkpoint_bytes(example / "whole")


def test_a_checkpoint_inside_an_annealed_stage_is_read_and_exported_as_it_was_trained(
    nursery: Nursery, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(nursery, example, "whole", 1, *ANNEALED)
    step = example / "whole/checkpoints/step-00000007"
    scheme = load_trained_model(step, ParallelMesh.single()).model.blocks[0].attention.scheme
    assert (scheme.window, scheme.position.theta) == (256, 70710.7)
    export(step, example / "out", tokenizer="none")
    config = json.loads((example / "out/config.json").read_text())
    assert config["sliding_window"] == 256
    assert config["rope_parameters"]["rope_theta"] == 70710.7
