"""A member that is added to its union and nowhere else is refused at every place, by the place
itself: in a process as users start it, where no annotation is checked."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megahybrid.config.model import ModelConfig, rotation_problems
from megahybrid.config.scheme_words import position_in_words
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.init import parameter_rule
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.unions.dummies import DUMMIES, PerDimension, with_scaling
from tests.unions.members import UNIONS
from tests.unions.probes import PLACES

NO_PARAMETERS = "a parameter without a row is refused; these add none"
NOTHING_TO_DECIDE = {
    **{(name, "first_values"): NO_PARAMETERS for name in UNIONS if name != "block"},
    ("scaling", "fingerprint"): "a stage may change it",
    ("scaling", "counts"): "frequencies are no parameters",
    ("scaling", "memory"): "frequencies are no parameters",
    ("spectrum", "fingerprint"): "a stage may change it",
    ("spectrum", "counts"): "frequencies are no parameters",
    ("spectrum", "memory"): "frequencies are no parameters",
    ("block", "self_test"): "it asks attention alone",
    ("norm", "self_test"): "it asks attention alone",
    ("activation", "self_test"): "it asks attention alone",
}


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, str | None]]:
    environment = {**os.environ, "MEGAHYBRID_TESTS_ANNOTATIONS": "off"}
    command = [sys.executable, "-m", "tests.unions.dummies"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str | None]] = json.loads(done.stdout)
    return found


CASES = [
    (member, place)
    for member in DUMMIES
    for place in PLACES
    if (member, place) not in NOTHING_TO_DECIDE
]


@pytest.mark.parametrize(("member", "place"), CASES)
def test_a_half_added_member_is_refused_by(
    member: str, place: str, told: dict[str, dict[str, str | None]]
) -> None:
    assert told[member][place] is not None, f"{place} passes an unknown {member} silently"


def test_every_union_has_a_half_added_member() -> None:
    assert set(UNIONS) - set(DUMMIES) == {"pattern"}  # which is two forms, matched in one place


def test_a_parameter_without_a_row_of_first_values_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"blocks\.0\.gate\.weight has no row"):
        parameter_rule("blocks.0.gate.weight", DUMMIES["scaling"], OptimizerConfig())


@pytest.fixture
def scaled() -> ModelConfig:
    return with_scaling(PerDimension(factors=(1.0, 2.0, 3.0, 4.0)))


def test_a_scaling_that_tells_all_is_run_and_described(scaled: ModelConfig) -> None:
    """A factor for each frequency takes one class: no other file of config/ or model/ knows it."""
    schemes = scaled.layer_plan.schemes
    assert len({hash(scheme) for scheme in schemes.values()}) == 2
    assert position_in_words(schemes["layer0"]) == "rope, per_dimension x4"
    assert rotation_problems(schemes, scaled.head_dim) == []
    (line, *_) = rotation_problems(schemes, 12)
    assert line == (
        "layer_plan.schemes.layer0.position.scaling.factors has 4 entries, not 6. Give as many."
    )
    ours = Transformer(scaled, ParallelMesh.single()).double()
    tokens = torch.arange(12)[None]
    assert ours.logits(tokens, torch.zeros_like(tokens)).isfinite().all()


def test_a_list_in_a_scaling_is_read_from_a_run_file_and_hashes() -> None:
    read = PerDimension.model_validate({"kind": "per_dimension", "factors": [1.0, 2.0]})
    assert read == PerDimension(factors=(1.0, 2.0)) and hash(read) == hash(
        PerDimension(factors=(1.0, 2.0))
    )
    assert PerDimension.model_validate_json(read.model_dump_json()) == read
