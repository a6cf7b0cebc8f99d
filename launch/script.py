"""The batch script: text that is a function of a `Job` alone. Nothing is read or written here.

The script asks for nodes, prepares a shell and starts `python -m launch.supervise`, which starts
the ranks, watches them and decides what comes next: shell traps that call programs were aborted by
two signals at once, a Python process is not. The shell hands signals on, and puts the job back into
the queue where that process was killed.
"""

import shlex

from launch.job import DECIDED, Job


def batch_script(job: Job) -> str:
    """What `sbatch` is given. Every value is quoted: a name with `; $(…)` stays a name."""
    site = job.site
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {option}" for option in directives(job)]
    lines += [
        "",
        f"# {one_line(job.run_directory)}: {job.nodes} × {site.ranks} ranks"
        + (f", {job.spares} spare" if job.spares else "")
        + f". Written by `megahybrid launch submit`, site {site.name}, commit {job.commit}.",
        "# What comes after a stop, a failure or a hang is decided by launch/supervise.py.",
        # Without -u: modules and conda read variables that are not set.
        "set -eo pipefail",
        'ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"',
        "ulimit -c 0",
    ]
    if site.modules:
        # A batch shell is no login shell and may not know them yet.
        lines.append("type module >/dev/null 2>&1 || . /etc/profile || true")
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += [
        f"cd {shlex.quote(job.work_directory)}",
        *site.prologue,
        *_supervised(job),
    ]
    return "\n".join(lines) + "\n"


def _supervised(job: Job) -> list[str]:
    """`wait` comes back for every signal, so it is asked until the process is gone. That it left
    the file says that its code was its own decision."""
    logs = shlex.quote(f"{job.run_directory}/logs")
    return [
        "# Slurm signals this shell alone.",
        """trap 'kill -USR1 "$supervisor" || true' USR1""",
        """trap 'kill -TERM "$supervisor" || true' TERM""",
        f"{shlex.join(job.site.python)} -m launch.supervise {shlex.quote(job.file)} &",
        "supervisor=$!",
        "while true; do",
        '  wait "$supervisor" && code=0 || code=$?',
        '  kill -0 "$supervisor" 2>/dev/null || break',
        "done",
        f'decided={logs}/"$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}/{DECIDED}"',
        'if [ "$code" -gt 128 ] && [ ! -e "$decided" ]; then',
        '  echo "the batch process was killed (code $code): back into the queue"',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]


def directives(job: Job) -> list[str]:
    """The options of sbatch, quoted for the lines of a script (its own rules, not the shell's)."""
    site = job.site
    log = f"{job.run_directory.replace('%', '%%')}/logs/%{'A_%a' if job.array else 'j'}.batch.log"
    options: list[tuple[str, str | int | None]] = [
        ("--job-name", job.name),
        ("--partition", site.partition),
        ("--account", site.account),
        ("--qos", site.qos),
        ("--reservation", site.reservation),
        ("--constraint", site.constraint),
        ("--nodes", job.nodes + job.spares),
        ("--ntasks-per-node", site.ranks),
        ("--cpus-per-task", site.cpus_per_rank),
        *_gpus(job),
        ("--mem", site.memory),
        ("--time", site.time_limit),
        ("--signal", f"B:USR1@{job.lead_seconds}"),
        ("--output", log),
        ("--open-mode", "append"),
        ("--exclude", ",".join(job.exclude) or None),
        ("--array", f"1-{job.array}%1" if job.array else None),
        ("--dependency", "singleton" if job.chain > 1 else None),
    ]
    lines = [f"{name}={quoted(str(value))}" for name, value in options if value is not None]
    lines += ["--exclusive"] if site.exclusive else []
    return [*lines, "--requeue", *site.directives]


def _gpus(job: Job) -> list[tuple[str, str | int | None]]:
    count = job.site.gpus_per_node
    if not count or job.site.gpu_request == "none":
        return []
    if job.site.gpu_request == "gres":
        return [("--gres", f"gpu:{count}")]
    return [("--gpus-per-node", count)]


def quoted(value: str) -> str:
    """A value for an #SBATCH line. sbatch knows both kinds of quotes and joins neighbours, as a
    shell does, but ends an unquoted word at a blank or a #."""
    return shlex.quote(value)


def one_line(text: str) -> str:
    """Text for a comment: it cannot end the line."""
    return " ".join(text.split())
