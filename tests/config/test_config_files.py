"""Every file under configs/ is read, composed and checked."""

from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.config import RunConfig, check_run, dump, dump_yaml, load, parse, parse_json
from megahybrid.config.advice import warnings
from megahybrid.config.model import ModelConfig
from megahybrid.config.yaml_file import merge, read_tree

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("runs/*.yaml"))
MODELS = sorted(CONFIGS.glob("models/*.yaml"))
SIZES = sorted(CONFIGS.glob("models/sizes/*.yaml"))
SCHEMES = sorted(CONFIGS.glob("models/schemes/*.yaml"))
PARTS = [*CONFIGS.glob("stages/*.yaml"), *CONFIGS.glob("data/*.yaml")]
VARIANTS = {
    "rope",
    "qk_norm",
    "nope",
    "rnope_10k",
    "rnope_100k",
    "rnope_2m",
    "rnope_4m",
    "rnope_10k_swa",
    "rnope_swa",
}


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RUNS, ids=stem)
def test_a_shipped_run_checks(path: Path) -> None:
    run = load(path)
    check_run(run)
    check_run(run, run.parallel.model_ranks)
    if not path.stem.startswith("demo"):  # made for one data rank
        check_run(run, run.parallel.model_ranks * 4)
    assert run.run_directory(path) == Path("runs") / path.stem
    for index in range(len(run.stages)):
        run.plan_at(index)


@pytest.mark.parametrize("path", RUNS, ids=stem)
def test_a_shipped_run_survives_yaml_and_json(path: Path, tmp_path: Path) -> None:
    run = load(path)
    (tmp_path / "resolved.yaml").write_text(dump_yaml(run))
    assert load(tmp_path / "resolved.yaml") == run
    assert parse(RunConfig, dump(run)) == run
    assert parse_json(RunConfig, run.model_dump_json()) == run


@pytest.mark.parametrize("path", MODELS, ids=stem)
def test_a_shipped_model_is_whole(path: Path) -> None:
    parse(ModelConfig, read_tree(path)["model"])


@pytest.mark.parametrize("size", SIZES, ids=stem)
@pytest.mark.parametrize("scheme", SCHEMES, ids=stem)
def test_every_scheme_goes_with_every_size(size: Path, scheme: Path) -> None:
    tree = merge(read_tree(size), read_tree(scheme))
    parse(ModelConfig, tree["model"])


def test_every_variant_of_the_study_has_a_scheme_and_an_8b_model() -> None:
    assert {path.stem for path in SCHEMES} == VARIANTS
    assert {f"{name}_8b" for name in VARIANTS} <= {path.stem for path in MODELS}


def test_every_variant_of_the_study_is_a_run_on_one_recipe() -> None:
    runs = {name: load(CONFIGS / f"runs/paper_{name}_8b.yaml") for name in VARIANTS}
    shared = [
        {
            "model": run.model.model_dump(exclude={"layer_plan": True}),
            "rest": run.model_dump(exclude={"model": True, "stages": {"__all__": {"schemes"}}}),
        }
        for run in runs.values()
    ]
    assert all(one == shared[0] for one in shared)
    raised = {name for name, run in runs.items() if run.plan_at(1) != run.plan_at(0)}
    assert raised == {"rope", "qk_norm"}
    plans = [(run.plan_at(0), run.plan_at(1)) for run in runs.values()]
    assert all(one != other for n, one in enumerate(plans) for other in plans[:n])


@pytest.mark.parametrize("path", RUNS, ids=stem)
def test_nothing_speaks_against_a_shipped_run(path: Path) -> None:
    assert warnings(load(path)) == []


PAPER = CONFIGS / "runs/paper_rope_8b.yaml"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model.logit_scale=1"], "0.0625"),
        (["model.hidden_size=6144", "model.num_heads=48"], "0.0416666667"),
        (["optimizer.base_hidden_size=8192"], "2"),
        (["model.hidden_size=6144", "model.num_heads=48", "model.logit_scale=0.0416666667"], None),
        (["model.logit_scale=1", "model.tie_embeddings=false"], None),
        (["model.logit_scale=1", "optimizer={}"], None),
    ],
)
def test_check_tells_which_logit_scale_tied_embeddings_have_under_mup(
    overrides: list[str], wanted: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--no-files", str(PAPER), *overrides]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(told) == (wanted is not None)
    if wanted is not None:
        assert f"Set it to {wanted}, or tie_embeddings: false." in told[0]
        assert (
            main(["check", "--no-files", str(PAPER), *overrides, f"model.logit_scale={wanted}"])
            == 0
        )
        assert "warning" not in capsys.readouterr().out


def test_every_part_is_used_by_a_run() -> None:
    used = {
        (CONFIGS / "runs" / name).resolve()
        for path in RUNS
        for line in path.read_text().splitlines()
        if line.startswith("include:")
        for name in line.removeprefix("include:").strip(" []").split(", ")
    }
    assert {path.resolve() for path in PARTS} <= used


def test_the_recipes_change_what_they_say() -> None:
    def theta(run: RunConfig, stage: int, scheme: str) -> float:
        return run.plan_at(stage).schemes[scheme].position.theta  # type: ignore[union-attr]

    qwen = load(CONFIGS / "runs/qwen25_1m_8b.yaml")
    assert [theta(qwen, i, "rope") for i in range(5)] == [1e4, 1e6, 1e6, 5e6, 1e7]
    olmo = load(CONFIGS / "runs/olmo3_7b.yaml").plan_at(1).schemes
    assert olmo["global"].position.scaling.factor == 8  # type: ignore[union-attr]
    assert olmo["local"].position.scaling is None  # type: ignore[union-attr]
    paper = load(CONFIGS / "runs/paper_rope_8b.yaml")
    assert [theta(paper, i, "rope") for i in range(2)] == [1e4, 2e6]
    assert paper.stage_plan.stage_steps[0] == 179_000
    assert load(CONFIGS / "runs/command_a.yaml").stage_plan.stage_steps == (
        30000,
        10000,
        5000,
        5000,
    )
    deepseek = load(CONFIGS / "runs/deepseek_v3_8b.yaml")
    assert deepseek.stage_plan.stage_steps[1:] == (1000, 1000)
    assert deepseek.plan_at(2) == deepseek.plan_at(1)
    swan = load(CONFIGS / "runs/swan_1b.yaml")
    kinds = [swan.plan_at(i).schemes["global"].score_scale.kind for i in range(2)]
    assert kinds == ["sqrt_dim", "log"]
