"""The ownership of a run directory: one process's at a time, and one model's for good."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megahybrid.checkpoint import durable
from megahybrid.errors import CheckpointError, StorageError

LOCK_NAME = "owner.lock"
MODEL_NAME = "model_fingerprint"
BEAT_SECONDS = 10.0
# Longer than a network file system or a paused machine may be silent.
STALE_AFTER_SECONDS = 300.0


def check_model(run_directory: Path | str, fingerprint: str, *, claim: bool = True) -> None:
    """Make the directory this model's, or raise CheckpointError where it is another's.

    To be called by the directory's owner, before anything is built; without `claim` it only looks.
    """
    path = Path(run_directory) / MODEL_NAME
    try:
        found = path.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        if not claim:
            return
        os.makedirs(path.parent, exist_ok=True)
        temporary = path.with_name(f".{MODEL_NAME}.tmp")
        durable.write(temporary, [memoryview(f"{fingerprint}\n".encode())])
        durable.rename(temporary, path)
        return
    if found != fingerprint:
        found = " ".join(found.split())[:100]
        raise CheckpointError(
            f"directory={run_directory} holds a run of another model "
            f"({found}; this one is {fingerprint}). Use another directory, or the model it had."
        )


class RunLock:
    """The lock on a run directory, as a context manager: the right to write to it.

    `owner.lock` names the process; a thread renews its time every few seconds, so a process that
    computes or compiles for long stays the owner. A second process is refused while the owner lives
    and takes over from one that is dead: on the same machine its process is looked up, from another
    machine the lock's age decides.
    """

    def __init__(
        self,
        run_directory: Path | str,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_after_seconds: float = STALE_AFTER_SECONDS,
    ) -> None:
        self.path = Path(run_directory) / LOCK_NAME
        self.took_over: str | None = None
        self._beat_seconds = beat_seconds
        self._stale_after_seconds = stale_after_seconds
        self._token = uuid.uuid4().hex
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-directory-owner", daemon=True)

    def __enter__(self) -> "RunLock":
        os.makedirs(self.path.parent, exist_ok=True)
        with _one_at_a_time(self.path.with_name(f".{LOCK_NAME}.guard")) as now:
            found = _read(self.path)
            if found is not None:
                self._refuse_if_alive(found, now)
                self.took_over = _words(found)
            self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # A lock that cannot be removed is known as a dead process's; what ended us is what counts.
        with suppress(OSError), _one_at_a_time(self.path.with_name(f".{LOCK_NAME}.guard")):
            if (_read(self.path) or {}).get("token") == self._token:
                self.path.unlink(missing_ok=True)

    def check_free(self) -> None:
        """Raise CheckpointError when a process holds the lock now.

        Takes nothing: entering decides.
        """
        found = _read(self.path)
        if found is not None:
            self._refuse_if_alive(found, time.time())

    def check(self) -> None:
        """Raise CheckpointError when the directory was taken over, StorageError when it is gone.

        To be called at each step and before each save, which would make another one in its place.
        """
        try:
            os.stat(self.path.parent)
        except FileNotFoundError:
            raise StorageError(
                f"directory={self.path.parent} is gone (deleted, renamed, or no longer mounted) "
                "while this run trained. Bring it back, then give the same command again."
            ) from None
        except OSError:
            pass  # a file system that is away for a moment is no reason to give up the run
        if self._lost:
            this = _words({"pid": os.getpid(), "host": socket.gethostname()})
            raise CheckpointError(
                f"directory={self.path.parent} was taken over by {_words(_read(self.path) or {})} "
                f"(this is {this}). Let one of them go on."
            )

    def _refuse_if_alive(self, found: dict[str, Any], now: float) -> None:
        age = now - self.path.stat().st_mtime
        if found.get("host") == socket.gethostname():
            start = _start_of(found.get("pid"))
            alive = start is not None and start == found.get("process_start")
            advice = "Wait until it ends, or stop it"
        else:
            alive = age < self._stale_after_seconds
            advice = f"Wait until it ends, or {self._stale_after_seconds:.0f} s after it died"
        if alive:
            raise CheckpointError(
                f"directory={self.path.parent} is in use by {_words(found)} (last heartbeat "
                f"{max(age, 0):.0f} s ago). {advice}, or use another directory."
            )

    def _write(self) -> None:
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_start": _start_of(os.getpid()),
                "started_unix": time.time(),
                # The launcher knows whether this job still lives when its machine is gone.
                "job": os.environ.get("SLURM_JOB_ID"),
                "token": self._token,
            }
        )
        temporary = self.path.with_name(f".{LOCK_NAME}.tmp")
        durable.write(temporary, [memoryview(text.encode())])
        durable.rename(temporary, self.path)

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            # A file system that is away for a moment is no reason to give up the run.
            with suppress(OSError):
                if (_read(self.path) or {}).get("token") == self._token:
                    os.utime(self.path)
                else:
                    self._lost = True
                    return


@contextmanager
def _one_at_a_time(guard: Path) -> Iterator[float]:
    """Let one process look at the lock and change it; yields the file system's own time.

    Its time, because the clocks of two machines may differ by more than a lock lives.
    """
    handle = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # Some network file systems have no locks; the owner's file alone must then do.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.utime(handle)
        yield os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the contents of a lock.

    None where there is none, empty where it cannot be understood.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _start_of(pid: Any) -> str | None:
    """Return when a process of this machine began, in the kernel's words.

    None when there is no such process. A number alone would not do: after a reboot another process
    may have it.
    """
    if not isinstance(pid, int):
        return None
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    # A zombie keeps its entry until its parent asks, but writes no more.
    return None if fields[0] in "ZX" else fields[19]


def _words(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', 'an unknown machine')}"
