"""What this machine can carry, without importing torch: its GPUs, or its cores and memory."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SECONDS = 20
SHARE = 0.8  # of the memory: the rest is the libraries' own, and others'
# Of one core in fp32. A model of 2 M parameters took a second of a core with AVX-512 for some 2,400
# tokens of 13.5 MFLOP, 33 GFLOP/s; less than half of it is promised, so that older machines and
# several cores end in time as well.
CORE_FLOPS = 15e9


@dataclass(frozen=True)
class Machine:
    """Ranks that can train here, and the bytes that each may use."""

    device: Literal["cpu", "cuda"]
    ranks: int
    bytes_each: int
    cores: int

    @property
    def room(self) -> int:
        """Bytes that a rank's training may take."""
        return int(SHARE * self.bytes_each)

    @property
    def words(self) -> str:
        """ "2 CPU cores with 14.2 GiB free"."""
        gib = f"{self.bytes_each / 2**30:.1f} GiB"
        if self.device == "cpu":
            return f"{self.cores} CPU core{'s' * (self.cores != 1)} with {gib} free"
        return f"{self.ranks} GPU{'s' * (self.ranks != 1)} of {gib}"


def this_machine() -> Machine:
    """Look at the machine that the command runs on."""
    cores = len(os.sched_getaffinity(0))
    gpus = _gpu_bytes()
    if gpus:
        return Machine("cuda", len(gpus), min(gpus), cores)
    return Machine("cpu", 1, _free_bytes(), cores)


def _gpu_bytes() -> list[int]:
    """The memory of each GPU that is visible; none where no driver answers."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.split() if done.returncode == 0 else []
    found = [int(line) * 2**20 for line in lines if line.isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len([n for n in visible.split(",") if n.strip()])]


def _free_bytes() -> int:
    """Memory that a process could still have: of the machine, or of its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return free
    return min(free, int(limit) - int(used)) if limit.isdigit() else free
