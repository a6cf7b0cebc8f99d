"""`Job`: all that one submission needs to know, written beside its batch script."""

from pathlib import Path

from megahybrid.config.base import Frozen
from megahybrid.config.parsing import parse_json
from megahybrid.config.site import JobName, Line, Site

FOLDER = "slurm"  # in the run's directory: scripts, jobs, attempts
DONE = "DONE"  # in FOLDER: the run is complete, no further attempt is wanted
BEGAN = "began"  # in an attempt's logs: its batch process was started
DECIDED = "decided"  # in an attempt's logs: its batch process ended as it wanted to
UNDECIDED = "undecided"  # in FOLDER: a line for each end of a batch process since one began well
STOP_NOW = "stop-now"  # in the run's directory: save, then end, and do not come back
SAVE_NOW = "save-now"  # in the run's directory: save and go on; the run removes the file


class Job(Frozen):
    """One submission of a run. Paths are absolute, and the same on every node."""

    name: JobName  # in Slurm's queue
    run_directory: Line
    run_file: Line  # the resolved run file
    file: Line  # where this value is kept
    work_directory: Line  # where relative paths of the run file begin
    commit: Line  # of the code, with +changes if there were any
    site: Site
    nodes: int  # that compute
    spares: int = 0  # nodes that stand by for bad ones
    exclude: tuple[Line, ...] = ()  # nodes not to be used
    chain: int = 1  # jobs in a row
    array: int | None = None  # the chain as an array of so many
    lead_seconds: int  # between Slurm's warning and the time limit
    # In place of the submitter's environment, which does not ride along.
    programs: tuple[Line, ...] = ()  # folders first on PATH: of the python that submitted
    slurm_programs: Line | None = None  # the folder of Slurm's commands, last on PATH
    python_path: Line | None = None  # where the code is, if only PYTHONPATH said so
    train: tuple[Line, ...] = ("-m", "megahybrid", "train")  # what a rank runs on the run file

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.site.ranks

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.run_directory)


def read_job(path: Path) -> Job:
    """The job that `submit` wrote."""
    return parse_json(Job, path.read_text())
