"""A real Slurm on this machine, for tests: its own daemons on its own ports, in a folder that goes.

All nodes are slurmd processes of one host (no namespaces are needed), so they share its name and
its processes. Needs root and Debian's or another build of Slurm with several slurmd per host.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

# Debian puts daemons where an ordinary user's PATH does not look.
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    for program in ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue"):
        if shutil.which(program, path=_PATH) is None:
            return f"{program} is not installed"
    return None


class Cluster:
    """`nodes` nodes t1, t2, … that run jobs as root; a context manager."""

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"t{number}" for number in range(1, nodes + 1)]
        # Paths of Unix sockets are short, and munge wants folders that nobody else can write to.
        self.folder = Path(tempfile.mkdtemp(prefix="mh-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] = _PATH
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_configuration()
            self._start("munged", *self._munge())
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged's socket", 20)
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in self.nodes:
                self.power_on(node)
            self._until(lambda: self._idle() == set(self.nodes), "idle nodes", 90)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends jobs, then the daemons this object started; removes the folder."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.call("scancel", "--state=RUNNING,PENDING", "-u", "root", timeout=15)
            self._until(lambda: not self.call("squeue", "-h"), "an empty queue", 30)
        for name in [*self.nodes, "slurmctld", "munged"]:
            self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def power_on(self, node: str) -> None:
        """Boots a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def is_on(self, node: str) -> bool:
        """Whether a node's daemon runs."""
        return self._processes[node].poll() is None

    def state(self, node: str) -> str:
        """A node's state in sinfo's words."""
        return self.call("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T").strip()

    def power_off(self, node: str) -> None:
        """Takes a node's daemon and every process of the jobs on it away in one stroke."""
        slurmd = self._processes[node]
        for pid in self._of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slurmd.wait(10)

    def unplug(self, node: str) -> None:
        """Nothing of a node is heard any more, though all of it is there."""
        for pid in self._of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def plug(self, node: str) -> None:
        """What was silent goes on as if nothing had been."""
        for pid in self._of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _of(self, node: str) -> list[int]:
        slurmd = self._processes[node].pid
        return [slurmd, *_descendants(slurmd), *self._steps(node)]

    def jobs_processes(self) -> list[int]:
        """Every process of a job on any node."""
        return [pid for node in self.nodes for pid in self._steps(node)]

    def _steps(self, node: str) -> list[int]:
        """Every process of the jobs on a node. slurmstepd leaves slurmd's tree; the environment of
        what it started says on which node, and of which cluster, it is."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if not path.read_bytes().startswith(b"slurmstepd"):
                    continue
                step = int(path.parent.name)
                below = _descendants(step)
                ours = {
                    "SLURMD_NODENAME": node,
                    "SLURM_CONF": self.environment["SLURM_CONF"],
                }
                if any(ours.items() <= _environment(pid).items() for pid in below):
                    found += [step, *below]
        return found

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "a") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        below = _descendants(process.pid)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in [*below, *(self._steps(name) if name in self.nodes else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _idle(self) -> set[str]:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return set(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", timeout=10).split())
        return set()

    def _until(self, true: object, what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {seconds} s")
            time.sleep(0.2)

    def _munge(self) -> list[str]:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        return [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        ]

    def _write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        base = free_ports(len(self.nodes) + 1)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        lines = [
            "ClusterName=mh",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={base}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # cred_expire is also how long a requeued job is held back.
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=15",
            "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none",
            # A node may claim more CPUs and memory than the machine has.
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd.%n.log",
            "SlurmdTimeout=10",
            "MessageTimeout=10",
            "TCPTimeout=3",
            "KillWait=5",
            "ReturnToService=1",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=0,"
            "bf_interval=2",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
        ]
        for number, node in enumerate(self.nodes, start=1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={base + number} "
                "CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 "
                "RealMemory=100000 State=UNKNOWN"
            )
        everything = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE DefaultTime=60 State=UP"
        lines += [
            f"PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF {everything}",
            f"PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 {everything}",
            f"PartitionName=high PriorityTier=100 PreemptMode=OFF {everything}",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        # From 23.11 on Slurm looks for cgroups unless told not to.
        version = subprocess.run(
            ["slurmd", "-V"], env=self.environment, capture_output=True, text=True
        ).stdout.split()[-1]
        if tuple(int(part) for part in version.split(".")[:2]) >= (23, 11):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def free_ports(number: int) -> int:
    """The first of `number` neighbouring free ports."""
    for base in range(23000 + os.getpid() % 4000, 32000, number):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + number):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base
    raise OSError("no free ports")


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = path.read_text().rpartition(")")[2].split()
            found.setdefault(int(fields[1]), []).append(int(path.parent.name))
    return found


def _descendants(pid: int) -> list[int]:
    children, found, open_ = _children(), [], [pid]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}
