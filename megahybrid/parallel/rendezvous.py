"""This process's rank, and where the ranks meet, by torchrun's or Slurm's variables.

Imports no torch, so that the command line can ask before it starts anything heavy.
"""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megahybrid.errors import MeshError

LAUNCHER = "MEGAHYBRID_LOCAL_LAUNCH"  # holds our launcher's process id in the ranks it starts
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID")


@dataclass(frozen=True)
class Rendezvous:
    """One process's place in the world and the address of the store where all ranks meet.

    `store_elsewhere` is true when a launcher (torch's agent) already serves the store, so that no
    rank may bind the port; `attempt` then keeps the keys of successive restarts apart.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    source: str
    store_elsewhere: bool = False
    attempt: str = "0"


def first_host(node_list: str) -> str:
    """First host name of a compressed Slurm node list such as `node[01-04,07]`."""
    if "[" not in node_list and "," not in node_list:
        return node_list
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise MeshError(
            f"SLURM_STEP_NODELIST={node_list} could not be expanded ({' '.join(command)}: "
            f"{error}). Set MASTER_ADDR to the host of rank 0."
        ) from error
    hosts = shown.stdout.split()
    if not hosts:
        raise MeshError(
            f"SLURM_STEP_NODELIST={node_list} names no host. Set MASTER_ADDR to the host of rank 0."
        )
    return hosts[0]


def find_rendezvous(
    environment: Mapping[str, str], expand: Callable[[str], str] = first_host
) -> Rendezvous | None:
    """The place of this process, or None when no launcher started it.

    torchrun's variables win over Slurm's. A Slurm batch script itself also sees SLURM_PROCID=0 and
    SLURM_NTASKS, but is no rank: only a process that srun started has a step's variables.
    Raises MeshError when a launcher set only some of its variables.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    in_step = any(name in environment for name in ("SLURM_STEP_ID", "SLURM_STEP_NODELIST"))
    if "SLURM_PROCID" in environment and (in_step or environment["SLURM_PROCID"] != "0"):
        return _from_slurm(environment, expand)
    return None


def _from_torchrun(environment: Mapping[str, str]) -> Rendezvous:
    _require(environment, _TORCHRUN, "torchrun")
    rendezvous = Rendezvous(
        rank=_integer(environment, "RANK"),
        world_size=_integer(environment, "WORLD_SIZE"),
        local_rank=_integer(environment, "LOCAL_RANK"),
        address=environment["MASTER_ADDR"],
        port=_integer(environment, "MASTER_PORT"),
        source="torchrun",
        store_elsewhere=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
    return _checked(rendezvous, "RANK", "WORLD_SIZE")


def _from_slurm(environment: Mapping[str, str], expand: Callable[[str], str]) -> Rendezvous:
    _require(environment, _SLURM, "srun")
    # A step may run on fewer nodes than the job holds (spares): the step's own list comes first.
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    address = environment.get("MASTER_ADDR") or (expand(nodes) if nodes else None)
    if address is None:
        raise MeshError(
            "MASTER_ADDR is missing, and so are SLURM_STEP_NODELIST and SLURM_JOB_NODELIST "
            f"(SLURM_PROCID={environment['SLURM_PROCID']}). Start the ranks with srun, or set "
            "MASTER_ADDR to the host of rank 0."
        )
    if "MASTER_PORT" in environment:
        port = _integer(environment, "MASTER_PORT")
    else:
        port = 20000 + _integer(environment, "SLURM_JOB_ID") % 10000
    rendezvous = Rendezvous(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=_integer(environment, "SLURM_NTASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        address=address,
        port=port,
        source="srun",
        attempt=environment.get("SLURM_RESTART_COUNT", "0"),
    )
    return _checked(rendezvous, "SLURM_PROCID", "SLURM_NTASKS")


def _require(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        found = ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
        raise MeshError(
            f"{', '.join(missing)} missing from the environment ({found or 'none'} found). "
            f"Start the ranks with {launcher}, which sets {', '.join(names)}, or unset them all to "
            "run one process."
        )


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        value = int(environment[name])
    except ValueError:
        value = -1
    if value < 0:
        raise MeshError(f"{name}={environment[name]} is not a whole number of 0 or more. Unset it.")
    return value


def _checked(rendezvous: Rendezvous, rank_name: str, size_name: str) -> Rendezvous:
    if rendezvous.rank >= rendezvous.world_size:
        raise MeshError(
            f"{rank_name}={rendezvous.rank} does not fit {size_name}={rendezvous.world_size}. "
            f"Ranks run from 0 to {rendezvous.world_size - 1}."
        )
    return rendezvous
