"""An import is a run that goes on: its run file, its tokenizer, its place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megahybrid.checkpoint.reader import verify
from megahybrid.config import check_run, load
from megahybrid.config.base import dump_yaml
from megahybrid.errors import ConfigError
from megahybrid.interop.export import export
from megahybrid.interop.import_model import import_model
from tests.interop.examples import NOPE, ROPE, model_of, run_of_model
from tests.interop.stock_models import LLAMA, written


def test_a_run_file_is_written_that_starts_from_the_import(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    run = load(tmp_path / "run.yaml")
    check_run(run, 1)
    text = (tmp_path / "run.yaml").read_text()
    keys = [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]
    assert keys == ["model", "data", "stages", "start", "precision"]
    assert "gate" not in text and "score_scale" not in text  # at their defaults
    assert "tie_embeddings: false" in text
    assert run.start is not None
    assert run.start.checkpoint == str(tmp_path / "ours")
    assert run.start.take == "weights"
    assert run.model.layer_plan.pattern == ["rope"]
    assert run.model.tie_embeddings is False


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "bf16")]
)
def test_the_run_goes_on_in_the_precision_of_the_weights(
    dtype: str, precision: str, tmp_path: Path
) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA, dtype)
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    assert load(tmp_path / "run.yaml").precision == precision
    assert ("precision" in (tmp_path / "run.yaml").read_text()) == (precision == "fp32")


def test_weights_that_bf16_would_round_leave_in_fp32(tmp_path: Path) -> None:
    """Half precision has 11 bits, bf16 has 8; and a run's own weights have 24."""
    written(tmp_path / "theirs", "Llama", LLAMA, "float16")
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("theirs", "back"))
    assert all(torch.equal(before[key].float(), after[key]) for key in before)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", "Llama", LLAMA)
    (folder / "tokenizer.json").write_text("{}")
    import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    named = load(tmp_path / "run.yaml").data.tokenizer
    assert named == str(tmp_path / "ours/tokenizer.json")
    assert Path(named).read_text() == "{}"


def test_an_import_without_a_place_goes_where_the_run_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "theirs", "Llama", LLAMA)
    import_model(Path("theirs"), Path("run.yaml"))
    assert load(Path("run.yaml")).start.checkpoint == "runs/run-imported"
    (tmp_path / "runs/run-imported").rename(tmp_path / "before")
    import_model(Path("theirs"), Path("run.yaml"))
    verify(tmp_path / "runs/run-imported/checkpoints/step-00000000")


def test_an_import_leaves_as_it_came_whatever_its_run_will_change(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    model = model_of([ROPE] * 2, eps=1e-6, tie_embeddings=False, intermediate_size=40)
    run = run_of_model(model, "stages.0.schemes={layer0: {window: 128}}")
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "llama"


def test_a_run_file_of_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    model = model_of([ROPE, NOPE], eps=1e-6, tie_embeddings=False, vocab_size=62)
    (tmp_path / "run.yaml").write_text(dump_yaml(run_of_model(model)))
    with pytest.raises(ConfigError) as caught:
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    assert str(caught.value).splitlines() == [
        "model.vocab_size=62 is not the source's (61). Set it to that.",
        "model.intermediate_size=48 is not the source's (40). Set it to that.",
        "model.layer_plan: layer 1 is nope, all keys, the source's is rope theta 10000, all keys. "
        f"Correct it, or mean it with --plan {tmp_path / 'run.yaml'}.",
    ]
    assert not (tmp_path / "ours").exists()
