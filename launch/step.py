"""The srun commands of a job step, as pure functions, and the environment they run in."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_never

from megahybrid.heartbeat import LOGS
from megahybrid.launch.job import Job

# The batch script's own: a step of another shape must not inherit them.
_OF_THE_JOB = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
    "SLURM_NNODES",
    "SLURM_CPUS_PER_TASK",
    "SLURM_EXCLUDE",
    "SLURM_MEM_PER_NODE",
    "SLURM_EXPORT_ENV",  # of the job: its steps see the whole of its environment
    "SLURM_GET_USER_ENV",
)


def step_environment(
    job: Job, environment: Mapping[str, str], nodes: Sequence[str], attempt: int, logs: Path
) -> dict[str, str]:
    """Return the environment of srun and the ranks.

    The port differs from attempt to attempt, so that one left over from the last attempt does no
    harm; MASTER_ADDR from the site file stays.
    """
    kept = {name: value for name, value in environment.items() if name not in _OF_THE_JOB}
    number = int(environment["SLURM_JOB_ID"])
    return kept | {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or nodes[0],
        "MASTER_PORT": str(20000 + (13 * number + 101 * attempt) % 10000),
        **({"PAIR_ADDRESS": environment["MASTER_ADDR"]} if environment.get("MASTER_ADDR") else {}),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        LOGS: str(logs),
    }


def train_step(job: Job, nodes: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command that starts every rank on `nodes` and ends with the first that fails."""
    logs = environment[LOGS]
    per_node = job.site.ranks if job.site.launcher == "srun" else 1
    log = "rank-%4t.log" if job.site.launcher == "srun" else "node-%4t.log"
    return [
        *_srun(job, nodes, per_node),
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--open-mode=append",
        f"--output={logs.replace('%', '%%')}/{log}",
        *_container(job),
        *(_rank(job) if job.site.launcher == "srun" else _agent(job, nodes, environment)),
    ]


def check_step(job: Job, nodes: Sequence[str], folder: Path, now: float) -> list[str]:
    """The command that looks at every node, one task each; nobody's failure ends the others."""
    check = job.site.node_check
    gpus = job.site.gpus_per_node if check.nvidia_smi else 0
    return [
        *_srun(job, nodes, 1),
        "--kill-on-bad-exit=0",
        "--wait=0",
        *job.site.python,
        "-m",
        "megahybrid.launch.node_check",
        f"--output={folder}",
        f"--run-directory={job.run_directory}",
        f"--gpus={gpus}",
        f"--free-disk-gib={check.free_disk_gib}",
        f"--free-memory-gib={check.free_memory_gib}",
        f"--idle-gpu-mib={check.idle_gpu_mib}",
        f"--clock-skew-seconds={check.clock_skew_seconds}",
        f"--now={now}",
        *([f"--command={check.command}"] if check.command else []),
    ]


def pair_step(job: Job, nodes: Sequence[str], folder: Path) -> list[str]:
    """Return the command in which nodes talk to each other in pairs, one task each.

    It runs with the ranks' own libraries.
    """
    return [
        *_srun(job, nodes, 1),
        "--kill-on-bad-exit=0",
        "--wait=0",
        *_container(job),
        *job.site.python,
        "-m",
        "megahybrid.parallel.pair_check",
        f"--folder={folder}",
        f"--seconds={job.site.node_check.pair_seconds}",
    ]


def _srun(job: Job, nodes: Sequence[str], per_node: int) -> list[str]:
    cpus = job.site.cpus_per_rank * (job.site.ranks // per_node)
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * per_node}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={cpus}",
        "--export=ALL",  # where a site's default is none, ranks would not know where to meet
    ]


def _container(job: Job) -> list[str]:
    """What stands between srun's options and a command that is to run in the site's image."""
    container = job.site.container
    if container is None:
        return []
    mounts = ",".join(container.mounts)
    match container.kind:
        case "pyxis":
            bound = [f"--container-mounts={mounts}"] if mounts else []
            return [f"--container-image={container.image}", *bound, *container.options]
        case "apptainer":
            bound = [f"--bind={mounts}"] if mounts else []
            gpus = ["--nv"] if job.site.gpus_per_node else []
            assert container.image is not None
            return ["apptainer", "exec", *gpus, *bound, *container.options, container.image]
        case "none":
            return []
        case _:
            assert_never(container.kind)


def _rank(job: Job) -> list[str]:
    return [*job.site.python, *job.train, job.run_file]


def _agent(job: Job, nodes: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the command of torchrun or DeepSpeed's launcher, started once per node.

    Only a shell on the node knows the node's number.
    """
    torchrun = job.site.launcher == "torchrun"
    before, after = _torchrun(job, nodes) if torchrun else _deepspeed(job, environment)
    address = [
        f"--master_addr={environment['MASTER_ADDR']}",
        f"--master_port={environment['MASTER_PORT']}",
    ]
    first = shlex.join([*job.site.python, "-m", *before, *address])
    return ["bash", "-c", f'exec {first} --node_rank="$SLURM_NODEID" {shlex.join(after)}']


def _torchrun(job: Job, nodes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Static rendezvous: ranks follow the order of nodes, and no agent complains at a good end."""
    shape = [f"--nnodes={len(nodes)}", f"--nproc-per-node={job.site.ranks}"]
    once = ["--rdzv-backend=static", "--max-restarts=0"]
    return ["torch.distributed.run", *shape, *once], [*job.train, job.run_file]


def _deepspeed(job: Job, environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return DeepSpeed's launcher, kept from ssh, and the script with its arguments.

    Over ssh it would start ranks outside of the job, where no signal and no kill of ours goes,
    without the site's environment. It would give each rank an option that ours do not know.
    """
    runner = ["deepspeed.launcher.runner", f"--hostfile={hostfile(environment)}", "--no_ssh"]
    script = ["--module", *job.train[1:]] if job.train[0] == "-m" else job.train
    return [*runner, "--no_local_rank"], [*script, job.run_file]


def hostfile(environment: Mapping[str, str]) -> str:
    """Return the path where DeepSpeed's runner finds its hosts."""
    return f"{environment[LOGS]}/hostfile"


def hostfile_text(job: Job, nodes: Sequence[str]) -> str:
    """Return the text of a hostfile: one host a line, with its ranks."""
    return "".join(f"{node} slots={job.site.ranks}\n" for node in nodes)
