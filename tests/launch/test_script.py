"""The batch script: read by people, quoted everywhere, a function of the job alone."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megahybrid.config import load
from megahybrid.config.parsing import parse
from megahybrid.config.site import Site, load_site, seconds_of
from megahybrid.errors import ConfigError
from megahybrid.launch.job import Job, read_job
from megahybrid.launch.script import batch_script, is_of_version_0_1
from megahybrid.launch.step import check_step, hostfile_text, step_environment, train_step

ROOT = Path(__file__).parents[2]
NAME = "a name; $(touch pwned) `touch pwned` 'x' \"y\" #z\\"
SITE = parse(
    Site,
    {
        "name": "big",
        "partition": "gpu",
        "account": "team a",
        "qos": "long",
        "time_limit": "2-00:00:00",
        "gpus_per_node": 8,
        "cpus_per_rank": 12,
        "modules": ["cuda/12.8", "x; touch pwned"],
        "prologue": ["source .venv/bin/activate"],
        "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "$(touch pwned)"},
        "python": ["python"],
        "directives": ["--mail-type=END"],
    },
)


def _job(**changes) -> Job:
    facts = {
        "name": NAME,
        "run_directory": "/data/my runs/100%/demo",
        "run_file": "/data/my runs/100%/demo/slurm/run.yaml",
        "file": "/data/my runs/100%/demo/slurm/job.json",
        "work_directory": "/home/me/mega hybrid",
        "commit": "0123456789ab",
        "site": SITE,
        "nodes": 4,
        "spares": 1,
        "exclude": ("n7", "n9"),
        "lead_seconds": 420,
        "programs": ("/home/me/mega hybrid/.venv/bin",),
        "slurm_programs": "/opt/slurm/bin",
        "python_path": "/home/me/mega hybrid",
    }
    return Job(**{**facts, **changes})


def test_the_script_is_the_one_that_people_have_read() -> None:
    assert batch_script(_job()) == (Path(__file__).parent / "golden_batch.sh").read_text()


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_no_value_is_run_as_a_command(tmp_path: Path, shell: str) -> None:
    """The script with its last commands replaced by harmless ones, run for real."""
    text = batch_script(_job(work_directory=str(tmp_path)))
    text = text.replace("set -eo pipefail", "module() { :; }").replace("python -m", "echo -m")
    text = text.replace("source .venv/bin/activate", ":")
    done = subprocess.run([shell, "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "-m megahybrid.launch.supervise /data/my runs/100%/demo/slurm/job.json" in done.stdout
    assert not list(tmp_path.iterdir())


ENDINGS: dict[str, tuple[str, int, list[str]]] = {
    "killed": ("mkdir -p logs/5.0 && touch logs/5.0/began; kill -9 $$", 137, ["requeue 5"]),
    "no room for its records": ("exit 74", 74, []),
    "decided": ("mkdir -p logs/5.0 && touch logs/5.0/decided; exit 75", 75, []),
    "a user's mistake": ("exit 2", 2, []),
    "done": ("exit 0", 0, []),
    "ended by Slurm": ("kill -TERM $PPID; sleep 0.3; kill -9 $$", 137, []),
    "no such process": ("", 127, ["requeue 5", "update JobId=5 ExcNodeList=n9,n[3-4],n1"]),
    "a python that breaks": ("exit 1", 1, ["requeue 5", "update JobId=5 ExcNodeList=n9,n[3-4],n1"]),
    "a node that cannot start it": (
        "nowhere",
        1,
        ["requeue 5", "update JobId=5 ExcNodeList=n9,n[3-4],n1"],
    ),
}


PREEMPTED = "PreemptTime=2026-05-04T10:20:33 StartTime=2026-05-04T10:20:29"
ENDED: dict[str, tuple[str, list[str]]] = {
    "cancelled": ("JobState=COMPLETING Restarts=0 PreemptTime=None StartTime=2026-05-04", []),
    "preempted by a cancel": (f"JobState=COMPLETING Restarts=0 {PREEMPTED}", ["requeue 5"]),
    "preempted and put back": (f"JobState=COMPLETING Restarts=1 {PREEMPTED}", []),
    "preempted and waiting": (f"JobState=PENDING Restarts=0 {PREEMPTED}", []),
    "cancelled, and preempted once before": (
        "JobState=COMPLETING Restarts=0 PreemptTime=2026-05-04T10:20:33 "
        "StartTime=2026-05-04T11:20:29",
        [],
    ),
    "Slurm does not answer": ("", []),
}


@pytest.mark.parametrize("how", ENDED)
def test_ended_before_its_process_a_job_comes_back_only_where_slurm_preempted_it(
    how: str, tmp_path: Path
) -> None:
    fields, said = ENDED[how]
    site = SITE.model_copy(update={"modules": [], "prologue": ["kill -TERM $$"]})
    script = batch_script(
        _job(run_directory=str(tmp_path), work_directory=str(tmp_path), site=site)
    )
    shown = f"case $* in -o*) {f'echo JobId=5 {fields} X=y' if fields else 'exit 1'} ;;"
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\n{shown} *) echo "$@" >>calls ;; esac\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "logs").mkdir()
    facts = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5"}
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        facts.pop(name, None)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=facts, capture_output=True)
    assert done.returncode == 143, done.stderr
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == said
    assert (tmp_path / "logs/5.0/TERM").exists()


@pytest.mark.parametrize(
    ("name", "early"),
    [("USR1", True), ("USR1", False), ("TERM", False)],  # a TERM ends the site's own lines
    ids=["USR1-in-the-sites-own-lines", "USR1", "TERM"],
)
def test_a_signal_before_the_process_listens_is_heard(
    name: str, early: bool, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    process = tmp_path / "process"
    process.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        + ("" if early else f"os.kill(os.getppid(), signal.SIG{name})\n")
        + f"time.sleep(0.5)\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom megahybrid.launch.attempt import Attempt\n"
        "from megahybrid.launch.events import JobEvents\n"
        "from megahybrid.launch.job import read_job\n"
        "events = JobEvents(Attempt(read_job(Path(sys.argv[-1])), '5', 0, os.environ))\n"
        "events.listen()\nprint(events.signals)\n"
    )
    process.chmod(0o755)
    prologue = [f"kill -{name} $$"] if early else []
    site = SITE.model_copy(update={"modules": [], "prologue": prologue, "python": [str(process)]})
    folders = {"run_directory": str(tmp_path), "work_directory": str(tmp_path)}
    job = _job(**folders, file=str(tmp_path / "job.json"), site=site)
    Path(job.file).write_text(job.model_dump_json())
    facts = os.environ | {"SLURM_JOB_ID": "5"}
    for one in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        facts.pop(one, None)
    done = subprocess.run(
        ["bash", "-c", batch_script(job)], env=facts, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == [f"['SIG{name}']"], done.stderr


@pytest.mark.parametrize("how", ENDINGS)
def test_what_nobody_decided_goes_back_into_the_queue_three_times(how: str, tmp_path: Path) -> None:
    body, code, said = ENDINGS[how]
    there = tmp_path / "nowhere" if body == "nowhere" else tmp_path
    folders = {"run_directory": str(tmp_path), "work_directory": str(there)}
    site = SITE.model_copy(update={"modules": [], "prologue": [], "python": ["./process"]})
    script = batch_script(_job(**folders, site=site, exclude=("n9",)))
    (tmp_path / "slurm").mkdir()
    shown = 'case $* in -o*) echo "JobId=5 ExcNodeList=n9,n[3-4] X=y";; *) echo "$@" >>calls;; esac'
    for name, text in (("process", body), ("scontrol", shown)):
        if text:
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    facts = os.environ | path | {"SLURM_JOB_ID": "5", "SLURMD_NODENAME": "n1"}
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        facts.pop(name, None)

    def run() -> list[str]:
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=facts, capture_output=True)
        assert done.returncode == code
        calls = tmp_path / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    assert run() == said
    if said:
        for _ in range(3):
            calls = run()
        assert calls == said * 3
        assert len((tmp_path / "slurm/undecided").read_text().splitlines()) == 4


def test_a_profile_that_brings_modules_keeps_the_submitting_python_on_the_path(
    tmp_path: Path,
) -> None:
    """Debian's /etc/profile sets PATH anew."""
    profile = tmp_path / "profile"
    profile.write_text('PATH=/usr/bin:/bin\nmodule() { PATH="/of-$2:$PATH"; }\n')
    site = SITE.model_copy(update={"modules": ["cuda"], "prologue": ['echo "$PATH"; exit 0']})
    text = batch_script(_job(work_directory=str(tmp_path), run_directory=str(tmp_path), site=site))
    text = text.replace("/etc/profile", str(profile))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    path = "/of-cuda:/home/me/mega hybrid/.venv/bin:/usr/bin:/bin:/opt/slurm/bin"
    assert done.stdout.splitlines() == [path], done.stderr


@pytest.mark.parametrize("name", ["two\nlines", "", "x" * 201, "nul\0"])
def test_a_name_that_would_end_its_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        _job(name=name)


def test_an_array_and_a_chain_ask_slurm_for_one_at_a_time() -> None:
    assert "#SBATCH --array=1-5%1\n" in batch_script(_job(array=5))
    assert "#SBATCH --dependency=singleton\n" in batch_script(_job(chain=3))
    assert "--dependency" not in batch_script(_job())


def test_a_job_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(_job().model_dump_json())
    assert read_job(tmp_path / "job.json") == _job()


def test_a_step_forgets_the_shape_of_the_job_and_its_port_is_its_own() -> None:
    outer = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "40", "SLURM_NTASKS_PER_NODE": "8", "X": "1"}
    first = step_environment(_job(), outer, ["n1", "n2"], 0, Path("/logs"))
    second = step_environment(_job(), outer, ["n1", "n2"], 1, Path("/logs"))
    assert "SLURM_NTASKS" not in first and first["X"] == "1"
    assert first["MASTER_ADDR"] == "n1" and first["MASTER_PORT"] != second["MASTER_PORT"]
    assert (
        step_environment(_job(), {**outer, "MASTER_ADDR": "10.0.0.1"}, ["n1"], 0, Path("/logs"))[
            "MASTER_ADDR"
        ]
        == "10.0.0.1"
    )


def _environment() -> dict[str, str]:
    return step_environment(_job(), {"SLURM_JOB_ID": "12"}, ["n1", "n2"], 0, Path("/a%b"))


def test_srun_starts_one_task_per_rank_on_exactly_the_nodes_that_are_fit() -> None:
    command = train_step(_job(), ["n1", "n3"], _environment())
    assert command[:8] == [
        "srun",
        "--nodes=2",
        "--nodelist=n1,n3",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--cpus-per-task=12",
        "--export=ALL",
        "--kill-on-bad-exit=1",
    ]
    assert "--output=/a%%b/rank-%4t.log" in command
    assert command[-5:] == ["python", "-m", "megahybrid", "train", _job().run_file]


def test_torchrun_gets_one_agent_per_node_and_static_rendezvous() -> None:
    job = _job(site=SITE.model_copy(update={"launcher": "torchrun"}))
    command = train_step(job, ["n1", "n3"], _environment())
    assert "--ntasks=2" in command and "--cpus-per-task=96" in command
    assert command[-3:-1] == ["bash", "-c"]
    assert '--node_rank="$SLURM_NODEID"' in command[-1]
    assert "--rdzv-backend=static" in command[-1] and "--nproc-per-node=8" in command[-1]


def test_deepspeeds_launcher_gets_a_hostfile_and_starts_one_nodes_ranks() -> None:
    job = _job(site=SITE.model_copy(update={"launcher": "deepspeed"}))
    command = train_step(job, ["n1", "n3"], _environment())
    assert "--ntasks=2" in command and command[-3:-1] == ["bash", "-c"]
    assert "--hostfile=/a%b/hostfile --no_ssh " in command[-1]
    assert f"--module megahybrid train '{job.run_file}'" in command[-1]
    assert hostfile_text(job, ["n1", "n3"]) == "n1 slots=8\nn3 slots=8\n"


def test_every_node_is_checked_by_one_task() -> None:
    command = check_step(_job(), ["n1", "n2", "n3"], Path("/logs/nodes"), 5.0)
    assert "--ntasks=3" in command and "--gpus=8" in command and "--kill-on-bad-exit=0" in command


def test_a_container_wraps_the_ranks() -> None:
    site = parse(
        Site,
        {
            "name": "boxed",
            "time_limit": "1:00:00",
            "gpus_per_node": 8,
            "container": {"image": "/images/a b.sqsh", "mounts": ["/data:/data", "/home:/home"]},
        },
    )
    command = train_step(_job(site=site), ["n1"], _environment())
    assert "--container-image=/images/a b.sqsh" in command
    assert "--container-mounts=/data:/data,/home:/home" in command


def _boxed(**container: Any) -> Site:
    plain = {"name": "boxed", "time_limit": "1:00:00", "gpus_per_node": 8}
    return parse(Site, plain | {"container": container})


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_apptainer_stands_before_the_ranks_own_command(launcher: str) -> None:
    image = "/images/a b.sif"
    site = _boxed(
        kind="apptainer", image=image, mounts=["/data:/data", "/x"], options=["--cleanenv"]
    )
    job = _job(site=site.model_copy(update={"launcher": launcher}))
    command = train_step(job, ["n1"], _environment())
    inside = command.index("apptainer")
    assert command[inside:][:6] == [
        "apptainer", "exec", "--nv", "--bind=/data:/data,/x", "--cleanenv", image,
    ]  # fmt: skip
    assert all(word.startswith("--") for word in command[1:inside])
    own = command[inside + 6 :]
    if launcher == "torchrun":
        assert own[:2] == ["bash", "-c"]
    else:
        assert own == ["python3", "-m", "megahybrid", "train", job.run_file]
    without = train_step(_job(site=_boxed(kind="none")), ["n1"], _environment())
    assert not [word for word in without if "container" in word or word == "apptainer"]
    on_cpus = site.model_copy(update={"gpus_per_node": 0, "ranks_per_node": 1})
    assert "--nv" not in train_step(_job(site=on_cpus), ["n1"], _environment())


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"kind": "apptainer"}, "image is missing (kind=apptainer)"),
        ({}, "image is missing (kind=pyxis)"),
        ({"kind": "none", "image": "/a.sif"}, "kind=none has no use for image, mounts or options"),
        ({"kind": "docker", "image": "/a"}, "container.kind"),
    ],
)
def test_a_container_that_cannot_be_meant_is_one_line(container: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as told:
        _boxed(**container)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("1440", 86400),
        ("90", 5400),
        ("10:30", 630),
        ("1:00:00", 3600),
        ("2-00:00:00", 172800),
        ("1-12", 129600),
    ],
)
def test_slurms_time_limits_are_understood(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sites").glob("*.yaml")), ids=str)
def test_the_sites_that_come_with_the_project_are_valid(path: Path) -> None:
    assert load(path, type=Site).name == path.stem


def test_an_unknown_site_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--site=exampel .*Did you mean 'example'\?"):
        load_site("exampel", ROOT / "configs/sites")


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks_per_node=9 is more than gpus_per_node=8"):
        parse(
            Site,
            {"name": "x", "time_limit": "60", "gpus_per_node": 8, "ranks_per_node": 9},
        )


def test_a_script_of_version_0_1_is_told_from_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    assert not is_of_version_0_1(tmp_path)
    here = Path(__file__).parent
    for name, old in (("older_batch.sh", True), ("golden_batch.sh", False)):
        (tmp_path / "slurm/batch.sh").write_text((here / name).read_text())
        assert is_of_version_0_1(tmp_path) is old
