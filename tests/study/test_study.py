"""A study runs what is missing of its grid, once, in processes that share their imports; it goes on
where a kill left it, and tabulates what counts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megahybrid.config import check_run, load
from megahybrid.config.study import Study
from megahybrid.config.suite import Suite
from megahybrid.data.dataset import TokenDataset
from megahybrid.errors import ConfigError, DataError
from megahybrid.ledger import read_ledger
from megahybrid.study.figures import check_rules, figures_of, interval, tabulate, void
from megahybrid.study.grid import study
from megahybrid.study.one_run import StudyRun, without_curves

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = sorted(path.parent for path in EXPERIMENTS.rglob("study.yaml"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: str(folder.relative_to(EXPERIMENTS)))
def test_every_variant_of_a_shipped_study_is_a_run_that_can_be_meant(folder: Path) -> None:
    plan = load(folder / "study.yaml", type=Study)
    assert plan.hypothesis and plan.rules
    plans = []
    for variant in plan.variants:
        overrides = StudyRun(plan, folder, Path("/out"), variant, 1).overrides()
        run = load(folder / plan.run, overrides)
        check_run(run, 1)
        plans.append(run.model_dump(exclude={"directory": True}))
        assert set(plan.data) <= set(run.data.sources)
    assert all(one != other for n, one in enumerate(plans) for other in plans[:n])
    for name in (plan.suite, plan.analyse):
        if name is not None:
            load(folder / name, type=Suite)
    if plan.gate is not None:
        suite = load(folder / str(plan.suite), type=Suite)
        assert plan.gate.length in suite.tasks[plan.gate.task].lengths


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: str(folder.relative_to(EXPERIMENTS)))
def test_what_is_published_of_a_study_is_what_its_results_say(folder: Path) -> None:
    plan = load(folder / "study.yaml", type=Study)
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    if results:
        table = json.loads((folder / "table.json").read_text())
        rows = tabulate(plan, results)
        told = {"rows": rows, "rules": check_rules(plan, rows), "void": void(plan, rows)}
        assert table == json.loads(json.dumps({k: v for k, v in told.items() if v is not None}))


def test_a_result_keeps_every_figure_of_an_analysis() -> None:
    part = {"mass": {"needle": 0.5}, "entropy_bits": 1.0, "near_share": 0.25, "near_by_lag": [0.25]}
    told = {"all": part, "by_kind": {"full": part}, "layers": [], "retrieval_heads": []}
    analysis = {"results": [{"task": "recall", "length": 32, "attention": told}]}
    kept = without_curves(analysis)
    assert "near_by_lag" not in kept["results"][0]["attention"]["all"]
    assert figures_of({"attention": kept}) == figures_of({"attention": analysis})
    assert figures_of({"attention": kept})["recall.32.full.near"] == 0.25


PRE_REGISTERED = ("ratio", "window", "qk_norm_kinds", "fusion")


@pytest.mark.parametrize(
    "folder", [f"{size}{name}" for name in PRE_REGISTERED for size in ("", "150m/")]
)
def test_a_pre_registered_study_has_a_floor_and_rules_for_every_variant(folder: str) -> None:
    plan = load(EXPERIMENTS / folder / "study.yaml", type=Study)
    assert plan.gate is not None and plan.control is not None
    trained = max(
        max(stage.lengths) for stage in load(EXPERIMENTS / folder / plan.run, [*plan.common]).stages
    )
    assert (plan.gate.length, plan.gate.least) == (trained, 0.95)
    assert (plan.control.seeds, len(plan.seeds)) == (4, 5)
    judged = {word.split(":")[0] for rule in plan.rules for word in rule.split() if ":" in word}
    assert judged == set(plan.variants)


RUN = """
precision: fp32
device: cpu
model:
  vocab_size: 43
  hidden_size: 16
  intermediate_size: 32
  num_heads: 2
  layer_plan:
    num_layers: 1
    pattern: [full]
    schemes: {full: {position: {kind: nope}}}
data:
  sources: {puzzles: {path: elsewhere}}
  block_tokens: 128
  lanes: 1
stages:
  - name: only
    tokens: 256
    lengths: {16: 1}
    batch_tokens: 64
    micro_batch_tokens: 64
    weights: {puzzles: 1}
    learning_rate: {kind: linear, start: 1e-3, end: 1e-3}
checkpoint: {every_steps: 1}
"""
STUDY: dict[str, Any] = {
    "hypothesis": "none",
    "pass_rule": "none",
    "rules": ["nope:recall.16 >= 0", "rope:recall.16.full.needle > nope:recall.16.full.needle"],
    "run": "run.yaml",
    "seeds": [1],
    "ids": [2, 43],
    "data": {"puzzles": {"kind": "recall", "length": 15, "pairs": 2, "rows": 40}},
    "suite": "suite.yaml",
    "analyse": "suite.yaml",
    "variants": {
        "nope": [],
        "rope": ["model.layer_plan.schemes.full.position={kind: rope, theta: 100}"],
    },
}
SUITE = {"tasks": {"recall": {"kind": "recall", "lengths": [16], "pairs": 2, "trials": 3}}}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(tmp_path / "small")


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN)
    (folder / "study.yaml").write_text(json.dumps(STUDY | changes))
    (folder / "suite.yaml").write_text(json.dumps(SUITE))
    return folder


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "megahybrid", "study", *map(str, words)]


def test_branches_wait_for_their_trunk_and_go_on_with_it(tmp_path: Path) -> None:
    """Two decays of one trunk: one from its end, one from two steps before."""
    longer = "stages.0.tokens=384"
    folder = written(
        tmp_path / "branched",
        rules=[],
        analyse=None,
        variants={
            "late": [longer, "stages.0.learning_rate.end=0.0"],
            "early": [longer, "start.checkpoint={trunk}/checkpoints/step-00000002"],
            "trunk": ["checkpoint.keep_every_steps=2"],
        },
        branches={"late": "trunk", "early": "trunk"},
    )
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"late-seed1 begins with a checkpoint of trunk-seed1"):
        study(folder, out=out, variants=["late"])
    done = subprocess.run(
        [*command(folder), "--out", out], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 3: trunk-seed1" in done.stdout
    for variant, first in (("trunk", 1), ("late", 5), ("early", 3)):
        steps = read_ledger(out / "runs" / f"{variant}-seed1" / "ledger.jsonl").steps
        assert (steps[0].step, steps[-1].step) == (first, 4 if variant == "trunk" else 6)
    trunk = read_ledger(out / "runs" / "trunk-seed1" / "ledger.jsonl").steps
    early = read_ledger(out / "runs" / "early-seed1" / "ledger.jsonl").steps
    assert [line.loss for line in early[:2]] == [line.loss for line in trunk[2:]]


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ({"a": "nope"}, "branches names variant 'a', which is not there"),
        ({"nope": "rop"}, "branches names variant 'rop', which is not there. Did you mean 'rope'"),
        ({"nope": "rope", "rope": "nope"}, "branches.nope=rope is a branch itself"),
    ],
)
def test_branches_that_cannot_be_meant_are_one_line(
    tmp_path: Path, branches: dict[str, str], words: str
) -> None:
    folder = written(tmp_path / "wrong", branches=branches)
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(folder / "study.yaml", type=Study)


def test_study_trains_scores_and_goes_on_after_a_kill(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = out / "results"
    (small / "run.yaml").write_text(RUN.replace("256", "25600000"))
    with subprocess.Popen(command(small, "--out", out, "--jobs", "2")) as running:
        try:
            until = time.monotonic() + 60
            folders = [out / "runs" / f"{name}-seed1" / "checkpoints" for name in ("nope", "rope")]
            while not all(any(folder.glob("step-*")) for folder in folders):
                assert time.monotonic() < until and running.poll() is None
                time.sleep(0.05)
        finally:
            running.send_signal(signal.SIGKILL)
    assert not results.exists()
    data = TokenDataset(out / "data" / "puzzles")
    assert (data.documents, data.tokens) == (40, 40 * 16)
    assert len(data.uncounted(0, 16)) == 14  # two answers of a puzzle count
    # What a kill left is gone on with: the same run, to its first checkpoints at least.
    ledgers = [out / "runs" / f"{name}-seed1" / "ledger.jsonl" for name in ("nope", "rope")]
    again = subprocess.Popen(command(small, "--out", out, "--jobs", "2"), stdout=-3, stderr=-1)
    until = time.monotonic() + 60
    while not all('"resume"' in ledger.read_text() for ledger in ledgers):
        assert time.monotonic() < until and again.poll() is None
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    _, said = again.communicate(timeout=30)
    assert again.returncode == 75 and said.count(b"-seed1 stopped:") == 2


def test_study_keeps_each_result_once_and_judges_its_rules(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert subprocess.run(command(small, "--out", out)).returncode == 0
    kept = sorted((out / "results").glob("*.json"))
    assert [path.stem for path in kept] == ["nope-seed1", "rope-seed1"]
    before = [path.stat().st_mtime_ns for path in kept]
    told = capfd.readouterr().out
    assert "1 of 1" in told and "nope:recall.16 >= 0" in told and "yes" in told
    table = json.loads((out / "table.json").read_text())
    assert [rule["holds"] is None for rule in table["rules"]] == [False, False]
    assert abs(sum(figures_of(json.loads(kept[0].read_text()))[f"recall.16.full.{part}"]
                   for part in ("begin", "needle", "context", "end")) - 1) < 1e-6  # fmt: skip
    assert study(small, out=out) == 0  # nothing is left to do
    assert before == [path.stat().st_mtime_ns for path in kept]
    # A run in a Python of its own, as on a GPU, finds its training done and scores the same.
    first = json.loads(kept[0].read_text())
    kept[0].unlink()
    plan = load(small / "study.yaml", type=Study)
    alone = StudyRun(plan, small, out, "nope", 1).start(fork=False)
    assert os.waitstatus_to_exitcode(os.waitpid(alone, 0)[1]) == 0
    assert figures_of(json.loads(kept[0].read_text())) == figures_of(first)
    kept[0].write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        study(small, out=out)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, {"variants": ["alibi"]}, "--variants=alibi is not one of nope, rope"),
        ({}, {"seeds": [-1]}, "--seeds=-1 is not a seed"),
        ({}, {"jobs": 0}, "--jobs=0 runs nothing"),
        ({}, {"tabulate_only": True}, "holds no result of this study"),
        ({"rules": ["nope:recall.16 is good"]}, {}, "which is none. Write"),
        ({"rules": ["nop:recall.16 > 1"]}, {}, "variant 'nop', which is not there. Did you mean"),
        ({"suite": None, "analyse": None}, {}, "names no suite, analyse or held_out"),
        ({"held_out": {"length": 8, "context_gain": [7]}}, {}, "names 7, beyond which there is no"),
        ({"held_out": {"length": 8, "context_gain": [2, 2]}}, {}, "names 2 twice"),
        (
            {"held_out": {"length": 8, "context_gain": [2]}, "columns": ["gain.books.3"]},
            {},
            r"no such context \(there are 2\)",
        ),
        ({"seeds": [1, 1]}, {}, "names one twice"),
        ({"suite": "missing.yaml"}, {}, "missing.yaml"),
        ({"rules": ["nope:recal.16 > 0.5"]}, {}, "name recal.16, but no task is recal.16"),
        ({"columns": ["recall.17"]}, {}, r"no task is recall.17 \(there are recall.16\)"),
        ({}, {"out": Path("/proc/nowhere")}, "--out=/proc/nowhere cannot be written to"),
        ({"variants": {"a": ["model.hidden_sise=3"]}, "rules": []}, {}, "hidden_size"),
        ({"prepare": ["data nonsense"]}, {}, "was refused"),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_any_run(
    tmp_path: Path, changes: dict[str, Any], words: dict[str, Any], message: str
) -> None:
    folder = written(tmp_path / "small", **changes)
    with pytest.raises((ConfigError, DataError), match=message) as found:
        study(folder, **({"out": tmp_path / "out"} | words))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_mistake_that_only_a_run_can_tell_ends_the_study(small: Path, tmp_path: Path) -> None:
    text = (small / "run.yaml").read_text()
    (small / "run.yaml").write_text(text.replace("model:", "start: {checkpoint: nowhere}\nmodel:"))
    told = subprocess.run(
        command(small, "--out", tmp_path / "out", "--seeds", "1", "2", "3", "--jobs", "1"),
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1 and "nope-seed1 failed with code 2" in told.stderr
    assert not (tmp_path / "out" / "runs" / "nope-seed2").exists()


def test_a_folder_without_a_study_is_named_with_its_neighbours(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study.yaml.*There are: small\."):
        study(small.parent / "big")


def test_two_studies_do_not_share_an_output(small: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with open(out / "study.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by another study"):
            study(small, out=out)


def result(seed: int, near: float, far: float, variant: str = "rope") -> dict[str, Any]:
    rows = [
        {"length": length, "token_accuracy": value, "exact": value}
        for length, value in ((32, near), (4096, far))
    ]
    tasks = {"recall": {"kind": "recall", "by_length": rows}}
    seconds = {"train": 2.0, "score": 1.0, "cpu": 2.5}
    return {"variant": variant, "seed": seed, "seconds": seconds, "suite": {"tasks": tasks}}


def test_runs_below_the_gate_are_counted_apart_and_rules_compare_medians() -> None:
    plan = load(EXPERIMENTS / "length_extrapolation" / "study.yaml", type=Study)
    found = [result(1, 1.0, 0.2), result(2, 0.9, 0.8), result(3, 0.95, 0.1), result(4, 1.0, 0.6)]
    found += [result(1, 1.0, 1.0, "rnope_swa"), result(1, 0.5, 1.0, "nope")]
    rows = tabulate(plan, found)
    row = next(row for row in rows if row["variant"] == "rope")
    assert (row["seeds"], row["counted"]) == ([1, 2, 3, 4], [1, 3, 4])
    assert row["cpu_seconds"] == 10.0
    told = row["figures"]["recall.4096"]
    assert (told["median"], told["least"], told["most"]) == (0.2, 0.1, 0.6)
    assert told["mean"] == pytest.approx(0.3)
    assert told["interval"] == pytest.approx(4.303 * 0.264575 / 3**0.5, rel=1e-4)
    judged = {rule["rule"]: rule["holds"] for rule in check_rules(plan, rows)}
    assert judged["rnope_swa:recall.4096 > rope:recall.4096"] is True
    assert judged["rnope_swa:recall.4096 > nope:recall.4096"] is None  # nope has no run that counts


def test_a_study_whose_control_has_not_learnt_the_task_is_void() -> None:
    plan = load(EXPERIMENTS / "window" / "study.yaml", type=Study)
    rule = plan.rules[0]
    others = [result(seed, 1.0, 1.0, name) for seed in plan.seeds for name in ("w4", "w16", "w32")]
    near = [1.0, 0.95, 1.0, 1.0, 0.9]

    def judged(passed: list[float]) -> tuple[str | None, bool | None]:
        control = [result(seed, score, 1.0, "w8") for seed, score in enumerate(passed, 11)]
        rows = tabulate(plan, [*others, *control])
        holds = {told["rule"]: told["holds"] for told in check_rules(plan, rows)}
        return void(plan, rows), holds[rule]

    assert judged(near) == (None, True)
    assert judged(near[:3]) == (
        "void so far (2 are not run): 3 of 3 runs of the control, w8, are past the gate, and 4 "
        "must be.",
        None,
    )
    assert judged([0.94, *near[1:]]) == (
        "void for good: 3 of 5 runs of the control, w8, are past the gate, and 4 must be.",
        None,
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"control": {"variant": "rop", "seeds": 1}}, "control names variant 'rop', which is not"),
        ({"control": {"variant": "rope", "seeds": 1}}, "control has no gate to be past."),
        (
            {
                "control": {"variant": "rope", "seeds": 2},
                "gate": {"task": "recall", "length": 16, "least": 0.5},
            },
            "control.seeds=2 is more than seeds has (1).",
        ),
    ],
)
def test_a_control_that_cannot_be_is_refused(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        study(written(tmp_path / "wrong", **changes))
    assert str(error.value).startswith(line) and len(str(error.value).splitlines()) == 1


def test_the_interval_is_students() -> None:
    # 1 … 5: deviation 1.5811, four degrees of freedom, t = 2.7764 (tables).
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.7764 * 0.70711, rel=1e-3)
    assert interval([0.0, 1.0]) == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert interval([1.0]) is None


def test_forked_runs_leave_no_process_behind() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    assert not [name for name in names if "megahybrid\0study" in name]


def test_context_gain_is_a_figure_of_each_set_context_and_position() -> None:
    bucket = {"start": 64, "stop": 128, "gain": 0.25}
    empty = {"start": 128, "stop": 256, "gain": None}
    gain = {"set": "books", "context": 64, "gain": 0.5, "by_position": [bucket, empty]}
    assert figures_of({"context_gain": {"context_gain": [gain]}}) == {
        "gain.books.64": 0.5, "gain.books.64.64-127": 0.25,
    }  # fmt: skip
