"""What version 0.1.0 wrote is read today: a run goes on, datasets, exports and jobs open."""

import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megahybrid
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.reader import verify
from megahybrid.cli import main
from megahybrid.config import load
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import read_manifest
from megahybrid.launch.job import read_job
from megahybrid.launch.records import attempts
from megahybrid.ledger import read_ledger
from tests.events import named
from tests.parity.cases import BLOCKS, FAMILIES, NORMS, model
from tests.train.example import steps_of

FILES = Path(__file__).parent / "files"
BEGUN = 6  # steps that the kept run has behind it


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "files"


def test_a_run_that_it_began_goes_on_with_the_same_command(here: Path) -> None:
    """No `--allow`, no step done again; the numbers are those of the machine that wrote them, to
    what another processor's products differ by."""
    command = [sys.executable, "-m", "megahybrid", "train", "run.yaml", "directory=run"]
    done = subprocess.run(
        [*command, "--processes", "1"], cwd=here, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line) for line in (here / "expected.jsonl").read_text().splitlines()]
    found = steps_of(here / "run")
    assert [step.step for step in found] == list(range(1, len(expected) + BEGUN + 1))
    for step, line in zip(found[BEGUN:], expected, strict=True):
        for field in ("step", "stage", "tokens", "length", "cursor_crc", "learning_rate"):
            assert getattr(step, field) == line[field], (step.step, field)
        assert step.loss == pytest.approx(line["loss"], rel=1e-5)
        assert step.gradient_norm == pytest.approx(line["gradient_norm"], rel=1e-4)
    lines = (here / "run/ledger.jsonl").read_text().splitlines()
    (resume,) = named(read_ledger(here / "run/ledger.jsonl"), "resume")
    assert resume.detail["megahybrid"] == megahybrid.__version__
    newest = max((here / "run/checkpoints").glob("step-*"))
    assert verify(newest).written_by["megahybrid"] == megahybrid.__version__
    events = {json.loads(line).get("event") for line in lines}
    assert not events & {"config_change", "repeat_differs", "warning"}
    # The run file says logit_scale of a scheme: one line names the new word.
    assert [line for line in done.stderr.splitlines() if "score_scale" in line] == [
        "megahybrid: run.yaml: model.layer_plan.schemes.global.logit_scale is called score_scale "
        "now. It is read as that; please write the new word."
    ]
    # Steps that are done again are compared where these digests are the same; they are 0.1.0's.
    stages = [e for e in map(json.loads, lines) if e.get("event") == "stage" and e["step"] >= BEGUN]
    digests = [(e["stage"], e["detail"]["repeatable"]["config"]) for e in stages]
    assert digests == [("middle", "18728360170521fc"), ("long", "0d0991ff34006ec4")]


def test_its_checkpoint_and_its_datasets_are_whole(here: Path) -> None:
    assert verify(here / "run/checkpoints/step-00000006").step == BEGUN
    for name in ("books", "code", "held", "chats"):
        assert main(["data", "verify", name]) == 0
    manifest, _ = read_manifest(here / "chats")
    chats = TokenDataset(here / "chats")
    assert manifest.documents == 30 and manifest.shards[0].mask_crc32 is not None
    assert chats.manifest.tokens == manifest.tokens
    assert main(["data", "inspect", "packed"]) == 0


def test_its_export_still_computes_the_same(here: Path) -> None:
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(here / "export", trust_remote_code=True)
    with torch.no_grad():
        logits = exported(torch.arange(2, 42)[None]).logits[0]
    expected = torch.from_numpy(np.load(here / "logits.npy"))
    assert (logits - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


def test_its_job_and_what_became_of_it_are_read(here: Path) -> None:
    job = read_job(here / "job/slurm/job.json")
    assert (job.nodes, job.world_size, job.site.name) == (4, 32, "big")
    (attempt,) = attempts(here / "job")
    assert (attempt.code, attempt.checkpoint, attempt.reason) == (75, 4, "preempted")


def test_its_ledger_is_reported(here: Path) -> None:
    assert main(["report", "run"]) == 0
    assert (here / "run/report/report.html").stat().st_size > 10_000


FINGERPRINTS: dict[str, Any] = json.loads((Path(__file__).parent / "fingerprints.json").read_text())


def test_models_have_the_fingerprints_that_stand_in_checkpoints() -> None:
    now = {family: model_fingerprint(model(family)) for family in FAMILIES}
    for family, block, norm in product(FAMILIES, BLOCKS, NORMS):
        varied = model(family, block, norm, kv_heads=4, tied=False, logit_scale=0.25)
        now[f"{family}-{block}-{norm}"] = model_fingerprint(varied)
    assert {name: now.get(name) for name in FINGERPRINTS} == FINGERPRINTS
    assert len(FINGERPRINTS) >= 91
    stored = (FILES / "run/model_fingerprint").read_text().strip()
    assert stored == model_fingerprint(load(FILES / "run.yaml").model)
