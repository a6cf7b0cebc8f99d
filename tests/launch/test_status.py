"""What a person is told: one line per run, from the queue, heartbeats and records."""

import json
import re
from pathlib import Path

import pytest

from megahybrid.errors import ConfigError, MegahybridError
from megahybrid.heartbeat import LOGS, Heartbeat
from megahybrid.launch import slurm
from megahybrid.launch.forecast import forecast
from megahybrid.launch.records import attempts, read_records, record, records_file, stop_lead
from megahybrid.launch.slurm import QueuedJob
from megahybrid.launch.status import node_lines, status_line
from megahybrid.launch.submit import plan
from megahybrid.launch.tail import first_error, tail
from tests.launch.pretend import LEDGER_LINE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "demo"
    logs = directory / "logs" / "7.1"
    logs.mkdir(parents=True)
    monkeypatch.setenv(LOGS, str(logs))  # whose heartbeats these are
    record(directory, "submit", jobs=["7", "8"], nodes=2)
    record(directory, "start", job="7", attempt=0, nodes=["n1", "n2"], checkpoint=None)
    _end(directory, 0, 7, "rank 1: ValueError: x", step=12, checkpoint=10)
    record(directory, "start", job="7", attempt=1, nodes=["n1", "n3"], checkpoint=10)
    _ledger(directory, {"kind": "step", "step": 42, "loss": 2.3125, "seconds": {"update": 3.0}})
    _checkpoint(directory, 40)
    return directory


def _end(directory: Path, attempt: int, code: int, reason: str, **facts) -> None:
    facts = {"step": None, "checkpoint": None, **facts}
    record(directory, "end", job="7", attempt=attempt, code=code, reason=reason, **facts)


def _ledger(directory: Path, *lines: dict) -> None:
    with open(directory / "ledger.jsonl", "a") as file:
        file.writelines(json.dumps(LEDGER_LINE | line) + "\n" for line in lines)


def _checkpoint(directory: Path, step: int) -> None:
    folder = directory / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def _queue(state: str, reason: str = "None") -> dict[str, QueuedJob]:
    return {
        "7": QueuedJob("7", "7", state, reason, "n[1,3]", "3:12:00", "7", "demo"),
        "8": QueuedJob("8", "8", "PENDING", "Dependency", "", "1:00:00", "8", "demo"),
        "9": QueuedJob("9", "9", "RUNNING", "None", "n9", "1:00", "9", "another's"),
    }


def test_a_running_run_says_where_it_is(run: Path) -> None:
    heart = Heartbeat(run, 0).start()
    heart.phase("step", 42)
    heart.end(0)
    line = status_line(run, _queue("RUNNING"))
    assert line == (
        "demo: RUNNING job 7 try 2 n[1,3] step age 0s step 42 loss 2.312 ckpt 40 left 3:12:00 "
        "| 1 failed before | +1 in the chain"
    )


def test_ranks_that_are_slow_or_behind_and_requests_are_shown(run: Path) -> None:
    for rank, (seconds, step) in enumerate(((1.0, 42), (1.0, 42), (1.8, 40))):
        heart = Heartbeat(run, rank)
        for _ in range(3):
            heart.busy(seconds)
        heart.phase("step", step)
        heart._phase_since = ("step", step, heart._phase_since[2] - 20)
        heart.start().end(0)
    (run / "stop-now").touch()
    line = status_line(run, _queue("RUNNING"))
    assert "| slow: rank 2 on " in line and " 1.8×" in line
    assert "| rank 2 on " in line and " stays at step 40" in line and "| stopping" in line


def test_a_waiting_run_says_for_what_and_after_what(run: Path) -> None:
    _end(run, 1, 75, "stopped and saved", step=42, checkpoint=40)
    line = status_line(run, _queue("PENDING", "BeginTime"))
    assert line == (
        "demo: PENDING job 7 (+1 in the chain) (held back a moment after a requeue) "
        "after attempt 2: stopped and saved | step 42 loss 2.312 ckpt 40"
    )


def test_runs_that_ended_say_how(run: Path) -> None:
    record(run, "verdict", job="7", code=7, reason="3 failures in a row")
    assert "demo: GIVEN UP with code 7: 3 failures in a row |" in status_line(run, {})
    (run / "slurm" / "DONE").touch()
    assert status_line(run, {}).startswith("demo: DONE after 2 attempts | step 42")


def test_without_slurm_the_runs_files_answer_and_say_so(run: Path) -> None:
    line = status_line(run, None)
    assert line.startswith("demo: UNKNOWN (job 7 try 2, no end was written)")
    assert line.endswith("(Slurm does not answer; this is from the run's files)")
    assert status_line(run, {}).startswith("demo: NOT IN THE QUEUE")


def test_what_slurm_still_knows_of_a_lost_job_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the controller for some minutes, from the accounting database for ever, or not."""

    def program(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    program("scontrol", "exit 1")
    program("sacct", "echo accounting is disabled >&2; exit 1")
    assert "(job 7 try 2, no end was written) |" in status_line(run, {})
    program("sacct", "echo 'NODE_FAIL|0:0'; echo 'OUT_OF_MEMORY|0:125'")
    assert "no end was written; Slurm says OUT_OF_MEMORY, code 0:125) |" in status_line(run, {})
    program("scontrol", "echo JobId=8 JobState=FAILED Reason=NonZeroExitCode ExitCode=0:9")
    assert "Slurm says FAILED, code 0:9)" in status_line(run, {})


def test_a_run_that_was_cancelled_before_anything_was_recorded_is_told_as_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, "submit", jobs=["7"], nodes=2)
    monkeypatch.setattr("megahybrid.launch.slurm.final_state", lambda job: "CANCELLED, code 0:0")
    line = status_line(tmp_path, {})
    assert line == f"{tmp_path.name}: STOPPED with code 75: cancelled in Slurm"
    monkeypatch.setattr(
        "megahybrid.launch.slurm.final_state", lambda job: "CANCELLED by 0, code 0:0"
    )  # sacct's
    assert status_line(tmp_path, {}) == line
    record(tmp_path, "start", job="7", attempt=0, nodes=["n1"], checkpoint=None)
    assert "STOPPED with code 75: cancelled in Slurm" in status_line(tmp_path, {})
    monkeypatch.setattr("megahybrid.launch.slurm.final_state", lambda job: "NODE_FAIL, code 0:0")
    assert "NOT IN THE QUEUE (job 7 try 1" in status_line(tmp_path, {})


def test_a_time_limit_that_is_over_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\ncase $* in *%A*) echo '7|7|RUNNING|None|n1|INVALID|7|demo' ;; esac\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.queue()["7"].left == "0:00"


def test_between_a_runs_end_and_its_jobs_it_is_not_preparing(run: Path) -> None:
    _end(run, 1, 0, "done", step=42, checkpoint=40)
    line = status_line(run, _queue("RUNNING"))
    assert " ending " in line and " preparing " not in line, line


def test_what_the_batch_shell_said_is_told_where_nothing_began(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megahybrid.launch.slurm.final_state", lambda job: None)
    record(tmp_path, "submit", jobs=["7"], nodes=2)
    (tmp_path / "slurm" / "undecided").write_text("one\nthe batch process on n1 ended with 1\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "7.batch.log").write_text("cd: /nowhere: No such file or directory\n")
    assert " after the batch process on n1 ended with 1" in status_line(
        tmp_path, _queue("PENDING", "BeginTime")
    )
    line = status_line(tmp_path, {})
    assert "NOT IN THE QUEUE (job 7; the batch process on n1 ended with 1)" in line
    assert tail(tmp_path, 5)[1] == "cd: /nowhere: No such file or directory"


def test_a_person_or_an_outer_jobs_variables_do_not_change_a_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megahybrid.launch import slurm

    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\nenv\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    outer = ("SBATCH_PARTITION", "SQUEUE_STATES", "SLURM_TIME_FORMAT")
    for name in (*outer, "SLURM_RESTART_COUNT", "SLURM_CONF", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "theirs")
    assert slurm.sbatch("x") and "theirs" not in slurm.call("sbatch").replace(
        "SLURM_CONF=theirs", ""
    )
    assert not [name for name in outer if name in slurm.call("squeue")]


def test_a_run_that_was_never_submitted_says_so(tmp_path: Path) -> None:
    assert status_line(tmp_path, {}) == f"{tmp_path.name}: NEVER SUBMITTED"


def test_an_attempt_nobody_ended_is_lost_and_its_checkpoint_is_what_the_next_found(
    run: Path,
) -> None:
    record(run, "start", job="7", attempt=2, nodes=["n1"], checkpoint=40)
    lost = attempts(run)[1]
    assert lost.code is None and lost.failed and lost.progressed
    assert lost.checkpoint == 40 and lost.reason.startswith("lost: ")
    record(run, "submit", jobs=["9"], nodes=2)
    assert attempts(run, since_submit=True) == []


def test_a_line_torn_by_a_power_cut_costs_only_itself(run: Path) -> None:
    with open(records_file(run), "a") as file:
        file.write('{"event": "end", "jo')
    record(run, "verdict", job="7", code=0, reason="done")
    assert read_records(run)[-1]["event"] == "verdict"
    assert len(attempts(run)) == 2


def test_the_lead_is_twice_what_saves_steps_and_validations_took(run: Path) -> None:
    assert stop_lead(run, 300) == 300
    _ledger(
        run,
        {"kind": "event", "event": "save", "step": 40, "detail": {"ok": True, "seconds": 200.0}},
        {"kind": "step", "step": 43, "seconds": {"update": 5.0, "evaluate": 30.0}},
    )
    assert stop_lead(run, 300) == 60 + 2 * (200 + 5 + 30) + 1
    assert stop_lead(run / "new", 120) == 120


def test_nodes_tell_their_history(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megahybrid.launch import slurm

    monkeypatch.setattr(slurm, "node_states", lambda nodes: {"n1": "idle"})
    record(run, "bad_node", job="7", node="n2", reason="GPU 3 has 2 uncorrected ECC errors")
    lines = node_lines(run)
    assert lines[0] == "n1: idle | 2 attempts | no failure"
    assert lines[1].startswith("n2: state unknown | 1 attempt | ")
    assert lines[1].endswith("GPU 3 has 2 uncorrected ECC errors")


def test_the_first_real_error_comes_before_its_consequences(run: Path) -> None:
    folder = run / "logs" / "7.1"
    trace = "Traceback (most recent call last):\n  File x\n    y\n"
    (folder / "rank-0000.log").write_text(
        f"begin\n{trace}RuntimeError: Connection closed by peer\n"
    )
    (folder / "rank-0001.log").write_text(f"begin\n{trace}ValueError: the cause\nafterwards\n")
    lines = first_error(run, folder)
    assert lines[0] == "rank 0001 | Traceback (most recent call last):"
    assert lines[-1] == "rank 0001 | ValueError: the cause"
    shown = tail(run, 10)
    assert "rank 0000 (+1) | begin" in shown


def test_a_forecast_counts_tokens_per_hour_steps_and_memory(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    arguments = {"site": str(ROOT / "configs/sites/example.yaml"), "nodes": 8}
    run_file = ROOT / "configs/runs/paper_rnope_swa_8b.yaml"
    job, resolved = plan(
        run_file, [f"directory={directory}", "stages.1.batch_tokens=1048576"], **arguments
    )
    text = "\n".join(forecast(job, resolved))
    assert "8 nodes × 8 GPUs = 64 ranks: tensor 4, data 16, ZeRO stage 1" in text
    assert re.search(r"stage long: [\d.]+ GiB per GPU by plan, 80 GiB there", text)
    assert "no rate measured yet" in text
    assert "stage long ends at 752,877,568,000 tokens" in text
    _ledger(
        directory,
        {
            "kind": "step",
            "step": 9,
            "tokens": 2_877_568_000,
            "tokens_per_second": 1e6,
            "seconds": {"update": 4.0},
        },
    )
    text = "\n".join(forecast(job, resolved))
    assert (
        "3600.00 M tokens per hour as last measured: 208.3 h for 750,000,000,000 of "
        "752,877,568,000 tokens, 9 jobs of this length" in text
    )
    assert "stage long ends at 752,877,568,000 tokens, in 208.3 h" in text
    assert "about 21525 steps and 22 checkpoints within the time limit" in text


@pytest.mark.parametrize(
    "context,line",
    [
        (2, "context groups of 2 ranks stay inside nodes"),
        (
            4,
            "warning: parallel.tensor=4 times 4 context ranks are more than the 8 ranks of a node: "
            "each context group spans 2 neighbouring nodes, over the slower network.",
        ),
        (
            3,
            "warning: parallel.tensor=4 times 3 context ranks neither divides nor is a multiple of "
            "the 8 ranks of a node: some context groups will span more nodes than they need.",
        ),
    ],
)
def test_a_forecast_says_where_context_groups_lie(tmp_path: Path, context: int, line: str) -> None:
    words = [f"directory={tmp_path / 'run'}", "stages.1.batch_tokens=1048576"]
    words.append(f"parallel.context={context}")
    if context == 3:  # rows and micro batches of three parts
        words += ["stages.0.lengths={12288: 1}", "stages.0.micro_batch_tokens=12288"]
        words += ["stages.1.lengths={49152: 1}", "stages.1.micro_batch_tokens=49152"]
        words += [f"stages.{n}.batch_tokens=1572864" for n in (0, 1)]
        words.append("data.sources.chats.plans={49152: rows}")
    run_file = ROOT / "configs/runs/paper_rnope_swa_8b.yaml"
    nodes = 6 if context == 3 else 8
    job, run = plan(run_file, words, site=str(ROOT / "configs/sites/example.yaml"), nodes=nodes)
    lines = forecast(job, run)
    assert f"tensor 4, context {context}, data {nodes * 2 // context}, ZeRO stage 1" in lines[0]
    assert line in lines


def test_check_on_a_site_says_what_the_dry_run_says(capsys) -> None:
    from megahybrid.cli import main

    run_file = str(ROOT / "configs/runs/paper_rnope_swa_8b.yaml")
    site = str(ROOT / "configs/sites/example.yaml")
    assert main(["check", run_file, "--site", site, "--nodes", "2", "--no-files"]) == 0
    said = capsys.readouterr().out
    assert "2 nodes × 8 GPUs = 16 ranks" in said and "GiB per GPU by plan" in said
    assert main(["check", run_file, "--site", site]) == 2
    assert "go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "--nodes=0 is too few. Use 1 or more."),
        ({"nodes": 1, "spares": -1}, "--spares=-1 is too few"),
        ({"nodes": 3}, "is not a multiple of"),
        ({"nodes": 4, "chain": 0, "array": True}, "--array=0 is too few"),
        ({"nodes": 4, "name": "a\nb"}, "name=.* is not one line of at most 200 characters"),
        ({"nodes": 4, "directory": "a\\b"}, "has a backslash"),
    ],
)
def test_an_allocation_that_cannot_be_is_refused_before_it_waits(options, words) -> None:
    overrides = [f"directory={options.pop('directory')}"] if "directory" in options else []
    with pytest.raises(ConfigError, match=words):
        plan(ROOT / "configs/runs/paper_rnope_swa_8b.yaml", overrides, site="example", **options)


def test_a_time_limit_too_short_to_stop_in_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "short.yaml"
    site.write_text("{name: short, time_limit: '5', gpus_per_node: 0, ranks_per_node: 2}")
    with pytest.raises(ConfigError, match="leaves no time to train"):
        plan(ROOT / "configs/runs/demo.yaml", [], site=str(site), nodes=1)


def test_without_slurm_a_submission_says_what_to_do(tmp_path, monkeypatch) -> None:
    from megahybrid.launch.submit import submit

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("data/train", "data/held_out", "data/held_out_long", "tokenizer.model"):
        (tmp_path / "build/demo" / name).mkdir(parents=True)
    job, resolved = plan(
        ROOT / "configs/runs/demo.yaml", [f"directory={tmp_path / 'run'}"],
        site=str(ROOT / "configs/sites/cpu.yaml"), nodes=1,
    )  # fmt: skip
    with pytest.raises(MegahybridError, match="is not installed on this machine"):
        submit(job, resolved)


def test_data_named_by_a_prefix_are_data(tmp_path, monkeypatch) -> None:
    """Foreign token files: the folder has train.bin and train.idx, and no train."""
    from megahybrid.launch.submit import submit

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        (tmp_path / name).touch()
    held_out = "{sample: {path: held_out}, longest: {path: held_out}}"
    job, resolved = plan(
        ROOT / "configs/runs/demo.yaml",
        [f"directory={tmp_path / 'run'}", "data.sources={stdlib: {path: train}}",
         f"data.held_out={held_out}"],
        site=str(ROOT / "configs/sites/cpu.yaml"), nodes=1,
    )  # fmt: skip
    with pytest.raises(MegahybridError, match="is not installed on this machine"):
        submit(job, resolved)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(ConfigError, match="data.sources.stdlib.path=train does not exist"):
        submit(job, resolved)


def test_a_job_that_is_being_signalled_runs_and_its_restarts_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a requeue and the first record of the new attempt, too."""
    from megahybrid.launch import slurm

    (tmp_path / "squeue").write_text(
        '#!/bin/sh\ncase "$*" in *RestartCnt*) echo "7                   3   " ;;\n'
        '*) echo "7|7|SIGNALING|None|n[1-2]|1:00|7|demo" ;; esac\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = tmp_path / "demo"
    record(run, "submit", jobs=["7"], nodes=2)
    record(run, "start", job="7", attempt=2, nodes=["n1", "n2"], checkpoint=None)
    queue = slurm.queue()
    assert (queue["7"].state, queue["7"].restarts) == ("RUNNING", 3)
    # The last attempt left no word: it has failed, and this is the one after it.
    line = status_line(run, queue)
    assert line == "demo: RUNNING job 7 try 4 n[1-2] preparing no ckpt left 1:00 | 1 failed before"
    record(run, "signal", job="7", attempt=2, signal="SIGTERM", seconds_left=900.0)
    assert status_line(run, queue).endswith("left 1:00 | 1 interrupted by Slurm before")
    record(run, "signal", job="7", attempt=2, signal="SIGTERM", seconds_left=-2.0)
    assert status_line(run, queue).endswith("left 1:00 | 1 failed before")
