"""`Site`: what is true of one cluster, whatever runs there. Never part of a run file."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from megahybrid.config import limits
from megahybrid.config.base import JOB_NAME, LINE, TIME_LIMIT, Frozen, Name, did_you_mean
from megahybrid.config.loader import load
from megahybrid.config.packaged import known_names, named
from megahybrid.errors import ConfigError

Line = Annotated[str, StringConstraints(pattern=LINE)]
JobName = Annotated[str, StringConstraints(pattern=JOB_NAME)]
TimeLimit = Annotated[str, StringConstraints(pattern=TIME_LIMIT)]
SITES = Path("configs/sites")


class Container(Frozen):
    """An image that ranks run in."""

    kind: Literal["pyxis", "apptainer", "none"] = Field(
        default="pyxis",
        description="pyxis: by srun's own options, where a cluster has the plugin; apptainer: by "
        "`apptainer exec`, with --nv where nodes have GPUs; none: no container",
    )
    image: Line | None = Field(
        default=None, description="pyxis: --container-image; apptainer: a .sif file"
    )
    mounts: list[Line] = Field(
        default=[], description="source:target each: --container-mounts, or --bind"
    )
    options: list[Line] = Field(
        default=[], description="further options of srun, or of apptainer exec"
    )

    @model_validator(mode="after")
    def _check_image(self) -> "Container":
        if self.kind == "none" and (self.image or self.mounts or self.options):
            raise ValueError(
                "kind=none has no use for image, mounts or options. Remove them, or name a kind: "
                "pyxis or apptainer."
            )
        if self.kind != "none" and not self.image:
            raise ValueError(
                f"image is missing (kind={self.kind}). Name the image, or use kind: none."
            )
        return self


class PhaseLimits(Frozen):
    """Seconds that a rank may stay in one phase before it counts as hung."""

    start: float = Field(default=1800, gt=0, description="until all ranks have met and restored")
    compile: float = Field(default=1800, gt=0, description="the first step of a stage")
    data: float = Field(default=600, gt=0, description="waiting for the next batch")
    step: float = Field(default=600, gt=0, description="one optimizer step")
    evaluate: float = Field(default=7200, gt=0, description="one validation")
    save: float = Field(default=3600, gt=0, description="one checkpoint")


class Watchdog(Frozen):
    """Limits after which a job that Slurm thinks alive is ended and started again."""

    limits: PhaseLimits = Field(default=PhaseLimits(), description="seconds by phase")
    silent: float = Field(default=120, gt=0, description="seconds that a rank may give no sign")
    every: float = Field(default=5, gt=0, description="seconds between two looks")
    slow_ratio: float = Field(default=1.3, gt=1, description="times the median: a slow rank")
    after_stop: float = Field(
        default=900, gt=0, description="seconds to save and leave once a stop is asked for"
    )


class NodeCheck(Frozen):
    """Questions to every node before ranks start on it."""

    enabled: bool = Field(default=True, description="false: no check")
    seconds: float = Field(default=120, gt=0, description="a node that takes longer is bad")
    free_disk_gib: float = Field(default=1, ge=0, description="on the node's temporary folder")
    free_memory_gib: float = Field(default=1, ge=0, description="of the node itself")
    clock_skew_seconds: float = Field(default=30, gt=0, description="against the batch host")
    idle_gpu_mib: int = Field(default=1000, ge=0, description="in use on a GPU that is idle")
    command: Line | None = Field(
        default=None, description="the site's own check, a shell line; where it fails is a bad node"
    )
    pairs: bool = Field(
        default=True, description="neighbouring nodes reduce a tensor with each other; false: no"
    )
    pair_seconds: float = Field(
        default=90, gt=0, description="for that and for importing torch; longer is a failure"
    )
    pair_ratio: float = Field(
        default=4, gt=1, description="times slower than the median pair: a bad node"
    )
    nvidia_smi: bool = Field(default=True, description="ask it about the GPUs; false: do not")


class Caps(Frozen):
    """Limits at which the launcher gives a run up."""

    failures_in_a_row: int = Field(default=3, ge=1, description="attempts that ended badly")
    without_checkpoint: int = Field(
        default=3, ge=1, description="attempts with no newer checkpoint"
    )
    node_exclusions: int = Field(default=4, ge=0, description="requeues to get rid of a bad node")


class Site(Frozen):
    """One cluster: its partition and account, its nodes, and how a rank is started on them."""

    name: Name = Field(description="how the site is called")
    partition: Line | None = Field(default=None, description="--partition")
    account: Line | None = Field(default=None, description="--account")
    qos: Line | None = Field(default=None, description="--qos")
    reservation: Line | None = Field(default=None, description="--reservation")
    constraint: Line | None = Field(default=None, description="--constraint")
    time_limit: TimeLimit = Field(description="--time of one job: minutes, H:MM:SS or D-HH:MM:SS")
    gpus_per_node: Annotated[int, limits.RANKS] = Field(
        ge=0, description="GPUs of a node; 0: ranks compute on CPUs"
    )
    ranks_per_node: Annotated[int, limits.RANKS] | None = Field(
        default=None, ge=1, description="default: one per GPU, or one"
    )
    gpu_memory_gib: float | None = Field(default=None, gt=0, description="of one GPU, for check")
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        default="gpus-per-node", description="the option that asks for GPUs"
    )
    cpus_per_rank: Annotated[int, limits.CPUS] = Field(
        default=1, ge=1, description="--cpus-per-task"
    )
    memory: Line | None = Field(default="0", description="--mem; 0: all of the node")
    exclusive: bool = Field(default=True, description="whole nodes")
    directives: list[Line] = Field(
        default=[], description="further #SBATCH options: --mail-type=END"
    )
    modules: list[Line] = Field(default=[], description="loaded by `module load`")
    prologue: list[Line] = Field(default=[], description="shell lines before anything starts")
    environment: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")], str] = Field(
        default={}, description="variables of every rank: NCCL_SOCKET_IFNAME and the like"
    )
    python: list[Line] = Field(default=["python3"], min_length=1, description="the interpreter")
    container: Container | None = Field(default=None, description="null: no container")
    launcher: Literal["srun", "torchrun", "deepspeed"] = Field(
        default="srun",
        description="srun: one task per rank; torchrun: one agent per node, static rendezvous; "
        "deepspeed: its launcher on each node, from a hostfile, without ssh",
    )
    exclude: list[Line] = Field(default=[], description="nodes never used")
    stop_lead_seconds: int = Field(
        default=300, ge=60, description="least time between the warning and the time limit"
    )
    watchdog: Watchdog = Field(default=Watchdog(), description="hangs")
    node_check: NodeCheck = Field(default=NodeCheck(), description="nodes before training")
    caps: Caps = Field(default=Caps(), description="when to give up")

    @model_validator(mode="after")
    def _check_ranks(self) -> "Site":
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} is more than gpus_per_node="
                f"{self.gpus_per_node}. Start one rank per GPU at most."
            )
        return self

    @property
    def ranks(self) -> int:
        """Return the number of ranks of one node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def job_seconds(self) -> int:
        """Return the time limit in seconds."""
        return seconds_of(self.time_limit)


def seconds_of(limit: str) -> int:
    """Return Slurm's D-HH:MM:SS, H:MM:SS, MM:SS or minutes in seconds."""
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, parts[0], 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def load_site(name: str, folder: Path = SITES) -> Site:
    """Return the site of that name under configs/sites/, in the working directory or else in
    megahybrid itself, or the site of the file of that path."""
    path: Path | None = Path(name)
    if Path(name).suffix not in (".yaml", ".yml"):
        path = named(name, folder) if re.fullmatch(r"[A-Za-z0-9_-]+", name) else None
    if path is None:
        known = known_names(folder)
        raise ConfigError(
            f"--site={name} is no file of {folder} (there are: {', '.join(known) or 'none'})."
            f"{did_you_mean(name, known)} Name one of them, or give the path of a site file."
        )
    return load(path, type=Site)
