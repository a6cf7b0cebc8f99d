"""The batch script: text that is a function of a `Job` alone.

The script asks for nodes, prepares a shell and starts `python -m megahybrid.launch.supervise`:
this starts the ranks, watches them and decides what comes next: shell traps that call programs were
aborted by two signals at once, a Python process is not. The shell hands signals on, and puts the
job back into the queue where that process was killed or could not be started.

The submitter's environment does not ride along: a job that starts again in a week must not depend
on what somebody had set once. Slurm gives the login environment of the node; the script adds where
the submitting python, its code and Slurm's commands are, then what the site file says.
"""

import shlex
from pathlib import Path

from megahybrid.errors import EXIT_DONE, EXIT_STORAGE, EXIT_USER_MISTAKE
from megahybrid.launch.job import BEGAN, DECIDED, FOLDER, UNDECIDED, Job

# Slurm signals the batch shell alone. That its process left the file DECIDED says that its code was
# its own decision, and BEGAN that this node could start it. Where neither can be written the
# process says so by a code of its own, having put the job back itself.
_ENDING = f"""\
attempt=$logs/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}
task=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
task=${{task:-$SLURM_JOB_ID}}
supervisor= starting= ended=
hand_on() {{
  # A process that does not listen yet looks for the file.
  : 2>/dev/null >"$attempt/$1" || true
  [ -z "$supervisor" ] || kill "-$1" "$supervisor" || true
}}
put_back_preempted() {{
  # Where Slurm preempts by a cancel, and at once, nobody else does.
  fields=" $(scontrol -o show job "$task") " || return
  when=${{fields#* PreemptTime=}} began=${{fields#* StartTime=}}
  when=${{when%% *}} began=${{began%% *}}
  case $fields in *" JobState=PENDING "*) return ;; esac
  case $fields in *" Restarts=${{SLURM_RESTART_COUNT:-0}} "*) ;; *) return ;; esac
  case $when in [0-9]*) ;; *) return ;; esac
  [[ $when < $began ]] || scontrol requeue "$task"  # else it was an earlier start of the job
}}
finish() {{
  code=$?
  set +e
  trap '' USR1 TERM  # a requeue ends what is left of this shell
  case $code in {EXIT_DONE}|{EXIT_USER_MISTAKE}|{EXIT_STORAGE}) return ;; esac
  if [ -e "$attempt/{DECIDED}" ]; then return; fi
  if [ -n "$ended" ]; then put_back_preempted; return; fi
  why="the batch process on $SLURMD_NODENAME ended with $code and decided nothing"
  [ -e "$attempt/{BEGAN}" ] ||
    why="the batch process could not be started on $SLURMD_NODENAME (code $code)"
  echo "$why"
  if echo "$why" >>"$undecided"; then
    times=$(wc -l <"$undecided")
  else
    times=$((${{SLURM_RESTART_COUNT:-0}} + 1))
  fi
  [ "$times" -le 3 ] || return
  scontrol requeue "$task" || {{ sleep 60; scontrol requeue "$task"; }}
  if [ ! -e "$attempt/{BEGAN}" ]; then
    # Beside the nodes that the job was kept off before.
    others=$(scontrol -o show job "$task" | sed -n 's/.* ExcNodeList=\\([^ (]*\\).*/\\1/p')
    scontrol update "JobId=$task" "ExcNodeList=${{others:+$others,}}$SLURMD_NODENAME"
  fi
}}
trap finish EXIT
trap 'hand_on USR1' USR1
trap 'ended=1; hand_on TERM; [ -n "$starting" ] || exit 143' TERM
mkdir "$attempt" 2>/dev/null || true
"""


def batch_script(job: Job) -> str:
    """Return the script for `sbatch`. Every value is quoted: a name with `; $(…)` stays a name."""
    site = job.site
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {option}" for option in directives(job)]
    lines += [
        "",
        f"# {one_line(job.run_directory)}: {job.nodes} × {site.ranks} ranks"
        + (f", {job.spares} spare" if job.spares else "")
        + f". Written by `megahybrid launch submit`, site {site.name}, commit {job.commit}.",
        "# What comes after a stop, a failure or a hang is decided by launch/supervise.py. This",
        "# shell hands signals on to it; where nobody decided (it was killed, or this node could",
        "# not start it) the job goes back into the queue, three times in a row at most.",
        f"logs={shlex.quote(f'{job.run_directory}/logs')}",
        f"undecided={shlex.quote(f'{job.run_directory}/{FOLDER}/{UNDECIDED}')}",
        *_ENDING.splitlines(),
        # Without -u: modules and conda read variables that are not set.
        "set -eo pipefail",
        'ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"',
        "ulimit -c 0",
    ]
    if site.modules:
        # A batch shell is no login shell and may not know them yet. A profile may set PATH anew.
        lines.append("type module >/dev/null 2>&1 || . /etc/profile || true")
    lines += _environment(job)
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += [
        f"cd {shlex.quote(job.work_directory)}",
        *site.prologue,
        "starting=1",
        # Not to be ended by a signal before it can take one.
        f"(trap '' USR1 TERM; exec {shlex.join(site.python)} -m megahybrid.launch.supervise "
        f"{shlex.quote(job.file)}) &",
        "supervisor=$!",
        "while true; do",  # `wait` comes back for every signal
        '  wait "$supervisor" && code=0 || code=$?',
        '  kill -0 "$supervisor" 2>/dev/null || exit "$code"',
        "done",
    ]
    return "\n".join(lines) + "\n"


def is_of_version_0_1(run_directory: Path) -> bool:
    """Say whether the run's batch script starts `launch.supervise`, which has another name since
    0.2: such a job ends at once."""
    try:
        text = (run_directory / FOLDER / "batch.sh").read_text(errors="replace")
    except OSError:
        return False
    return " -m launch.supervise " in text


def _environment(job: Job) -> list[str]:
    """Return the lines that stand in for the submitter's environment; modules, variables and shell
    lines of the site come after them and win."""
    first = "".join(f"{shlex.quote(folder)}:" for folder in job.programs)
    last = f":{shlex.quote(job.slurm_programs)}" if job.slurm_programs else ""
    lines = [
        '[ -n "$HOME" ] || export HOME=~',
        # Else a step that the site's own lines start would see nothing of this environment.
        "unset SLURM_EXPORT_ENV SLURM_GET_USER_ENV",
        f'export PATH={first}"${{PATH:-/usr/local/bin:/usr/bin:/bin}}"{last}',
    ]
    if job.python_path:
        lines.append(f"export PYTHONPATH={shlex.quote(job.python_path)}")
    return lines


def directives(job: Job) -> list[str]:
    """Return the options of sbatch, quoted for the lines of a script (by its own rules)."""
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
        ("--export", "NONE"),
        ("--chdir", job.work_directory),
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
    """Quote a value for an #SBATCH line. sbatch knows both kinds of quotes and joins neighbours, as
    a shell does, but ends an unquoted word at a blank or a #."""
    return shlex.quote(value)


def one_line(text: str) -> str:
    """Return text for a comment: it cannot end the line."""
    return " ".join(text.split())
