"""Another layer plan for the same weights: what is exact, what must be learned, what is refused."""

from pathlib import Path

import pytest
import torch

from megahybrid.checkpoint.reader import verify
from megahybrid.commands.trained_model import load_trained_model
from megahybrid.config import load
from megahybrid.config.base import dump_yaml
from megahybrid.errors import ConfigError
from megahybrid.interop.import_model import import_model
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import HEAD, NOPE, ROPE, model_of, run_of_model
from tests.interop.stock_models import LLAMA, written
from tests.train.example import write_data


def test_surgery_says_what_is_exact_and_what_must_be_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA | {"num_hidden_layers": 4})
    schemes = [ROPE, ROPE | {"window": 128}, NOPE, {"position": {"kind": "rope", "theta": 5e5}}]
    sizes = {"eps": 1e-6, "tie_embeddings": False, "intermediate_size": 40}
    run = run_of_model(model_of(schemes, **sizes))
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    import_model(
        tmp_path / "theirs",
        tmp_path / "run.yaml",
        tmp_path / "ours",
        plan_file=tmp_path / "run.yaml",
    )
    lines = capsys.readouterr().out.splitlines()
    assert "layer 0: rope theta 10000, all keys: unchanged, exact" in lines
    assert (
        "layer 1: rope theta 10000, all keys -> rope theta 10000, window 128: exact up to 128 "
        "tokens; must learn to do without far keys"
    ) in lines
    assert any("layer 2: " in line and "order without rotation" in line for line in lines)
    assert any("layer 3: " in line and "other angles" in line for line in lines)
    manifest = verify(tmp_path / "ours/checkpoints/step-00000000")
    assert manifest.config["model"]["layer_plan"]["num_layers"] == 4
    assert manifest.config["model"]["layer_plan"]["schemes"]["layer1"]["window"] == 128


@torch.no_grad()
def test_what_surgery_calls_exact_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows alone change nothing before the first key falls out; and losses say where they do."""
    folder = written(tmp_path / "theirs", "Llama", LLAMA | {"vocab_size": 97})
    sizes = {"eps": 1e-6, "tie_embeddings": False, "intermediate_size": 40, "vocab_size": 97}
    run = run_of_model(model_of([ROPE | {"window": 20}, ROPE | {"window": 30}], **sizes))
    (tmp_path / "plan.yaml").write_text(dump_yaml(run))
    write_data(tmp_path)
    import_model(
        folder, tmp_path / "run.yaml", tmp_path / "ours", plan_file=tmp_path / "plan.yaml",
        data=tmp_path / "held",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "window 20: exact up to 20 tokens" in said
    rows = [line.split() for line in said.splitlines() if "–" in line and line.count(".") == 2]
    assert [row[3] == row[5] for row in rows if row[0] in ("8", "16", "64")] == [True, False, False]
    ours = load_trained_model(tmp_path / "ours", ParallelMesh.single()).model
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(4))
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    error = (ours.logits(tokens) - wanted).abs().amax((0, 2)) / max(1, wanted.abs().max())
    assert error[:20].max() <= 1e-5 < 1e-3 < error[20]
    assert max(load(tmp_path / "run.yaml").stages[0].lengths) == 512  # as far as it was trained


def test_surgery_adds_no_parameters(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    sizes = {"eps": 1e-6, "tie_embeddings": False, "intermediate_size": 40}
    run = run_of_model(model_of([ROPE | HEAD] * 2, **sizes))
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    with pytest.raises(ConfigError, match="Surgery changes positions, windows and scales"):
        import_model(
            tmp_path / "theirs",
            tmp_path / "run.yaml",
            tmp_path / "ours",
            plan_file=tmp_path / "run.yaml",
        )
