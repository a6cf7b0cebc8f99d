"""`megahybrid launch submit`: check, write the script and all it needs, hand it to sbatch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megahybrid
from megahybrid.config import RunConfig, check_run, dump_yaml, load
from megahybrid.config.explain import show
from megahybrid.config.limits import NODES
from megahybrid.config.missing_data import dataset_exists, making_command
from megahybrid.config.parsing import parse
from megahybrid.config.site import load_site
from megahybrid.errors import ConfigError
from megahybrid.heartbeat import write_whole
from megahybrid.launch import slurm
from megahybrid.launch.job import DONE, FOLDER, STOP_NOW, UNDECIDED, Job
from megahybrid.launch.records import jobs, read_records, record, stop_lead
from megahybrid.launch.script import batch_script
from megahybrid.run_folder import refuse_foreign_run_folder

_SYSTEM = (Path("/usr/bin"), Path("/bin"))  # on every PATH, and not to be put before others


def plan(
    run_file: Path,
    overrides: Sequence[str],
    *,
    site: str,
    nodes: int,
    name: str | None = None,
    spares: int = 0,
    exclude: Sequence[str] = (),
    chain: int = 1,
    array: bool = False,
) -> tuple[Job, RunConfig]:
    """Return the job and the resolved run, checked against each other. Write nothing."""
    jobs_asked = ("array" if array else "chain", chain, 1)
    for option, value, least in (("nodes", nodes, 1), ("spares", spares, 0), jobs_asked):
        if value < least:
            raise ConfigError(f"--{option}={value} is too few. Use {least} or more.")
        if value > NODES:
            raise ConfigError(
                f"--{option}={show(value)} is more than {NODES:,} (a line of the plan for each). "
                "Use fewer."
            )
    facts = load_site(site)
    run = load(run_file, overrides)
    directory = run.run_directory(run_file).absolute()
    refuse_foreign_run_folder(directory)
    # The script lies in the run's folder and may be read on nodes with another working directory.
    run = run.model_copy(update={"directory": str(directory)})
    check_run(run, nodes * facts.ranks)
    seconds = facts.job_seconds
    lead = stop_lead(directory, facts.stop_lead_seconds)
    if lead * 2 > seconds:
        raise ConfigError(
            f"time_limit={facts.time_limit} of site {facts.name} leaves no time to train: the run "
            f"needs {lead} s to stop in time (stop_lead_seconds={facts.stop_lead_seconds}, and "
            "what its last saves took). Ask for more time."
        )
    if "\\" in str(directory):
        raise ConfigError(
            f"directory={directory} has a backslash, with which Slurm fills in no job numbers in "
            "the names of logs. Use another name."
        )
    folder = directory / FOLDER
    job = {
        "name": name or directory.name[:200],
        "run_directory": str(directory),
        "run_file": str(folder / "run.yaml"),
        "file": str(folder / "job.json"),
        "work_directory": os.getcwd(),
        "commit": _commit(),
        "site": facts,
        "nodes": nodes,
        "spares": spares,
        "exclude": tuple(sorted({*exclude, *facts.exclude})),
        "chain": 1 if array else chain,
        "array": chain if array else None,
        "lead_seconds": lead,
        **_environment(),
    }
    return parse(Job, job), run


def submit(job: Job, run: RunConfig) -> list[str]:
    """Write script, resolved run file and job into the run's folder, then submit. Return the
    numbers of the jobs."""
    _refuse_second(job)
    _refuse_missing(run)
    script = write(job, run)
    folder = job.directory / FOLDER
    for path in (job.directory / STOP_NOW, folder / DONE, folder / UNDECIDED):
        path.unlink(missing_ok=True)
    numbers = [slurm.sbatch(str(script)) for _ in range(job.chain)]
    record(
        job.directory,
        "submit",
        jobs=numbers,
        nodes=job.nodes,
        spares=job.spares,
        chain=job.array or job.chain,
        site=job.site.name,
        commit=job.commit,
    )
    return numbers


def write(job: Job, run: RunConfig) -> Path:
    """Write the files of one submission; those of the one before keep a number."""
    folder = job.directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (job.directory / "logs").mkdir(exist_ok=True)
    number = sum(line.get("event") == "submit" for line in read_records(job.directory)) + 1
    texts = {
        "run.yaml": dump_yaml(run),
        "job.json": job.model_dump_json(indent=2) + "\n",
        "batch.sh": batch_script(job),
    }
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text() != text:
            path.rename(folder / f"{path.stem}.{number - 1}{path.suffix}")
        write_whole(path, text)
    return folder / "batch.sh"


def _refuse_second(job: Job) -> None:
    running = [number for number in jobs(job.directory) if number in slurm.queue()]
    if running:
        raise ConfigError(
            f"directory={job.run_directory} has job {', '.join(running)} in the queue already. "
            "Two jobs must not write to one run: `megahybrid launch cancel` it first, or use "
            "another directory."
        )


def _refuse_missing(run: RunConfig) -> None:
    """Refuse data that are not there: nodes see the same disks, and nobody should wait for that."""
    for field, path in run.data.datasets():
        if not dataset_exists(path):
            command = making_command(path)
            prepare = "Prepare the data" if command is None else f"Make it with `{command}`"
            raise ConfigError(
                f"{field}={path} does not exist (seen from {os.getcwd()}). {prepare}, correct "
                "the path, or submit from the folder it is relative to."
            )


def _environment() -> dict[str, object]:
    """Return where a job finds the python that submits it, this code and Slurm's commands."""
    python, sbatch = Path(sys.executable).parent, shutil.which("sbatch")
    code = Path(megahybrid.__file__).resolve().parents[1]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        "programs": () if python in _SYSTEM else (str(python),),
        "slurm_programs": str(Path(sbatch).absolute().parent) if sbatch else None,
        "python_path": str(code) if any(x and Path(x).resolve() == code for x in named) else None,
    }


def _commit() -> str:
    """Return the commit of the code, marked where it was changed since."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ("git", "-C", str(here), *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        changed = "+changes" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return "unknown"
