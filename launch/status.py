"""`megahybrid launch status`: one line per run, from the queue, the heartbeats and the records."""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megahybrid.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_MISTAKE
from megahybrid.heartbeat import Beat, heartbeat_file, read_beats, slow_ranks
from megahybrid.launch import slurm
from megahybrid.launch.interruption import Interruption
from megahybrid.launch.job import DONE, FOLDER, SAVE_NOW, STOP_NOW, UNDECIDED, read_job
from megahybrid.launch.records import (
    AttemptRecord,
    attempts,
    jobs,
    newest_checkpoint,
    newest_ledger_lines,
    read_records,
)
from megahybrid.launch.script import is_of_version_0_1
from megahybrid.launch.slurm import QueuedJob, SlurmError
from megahybrid.ledger import StepLine

BEHIND_SECONDS = 10.0
# Codes that say nothing against a node: its ranks ended in order, or met a mistake of the user's.
_ORDERLY = (EXIT_DONE, EXIT_RESUME, EXIT_USER_MISTAKE)
# Reasons of Slurm that say nothing to somebody who waits.
_REASONS = {
    "BeginTime": "held back a moment after a requeue",
    "Dependency": "waits for the job before it",
    "Resources": "waits for free nodes",
    "Priority": "waits behind other jobs",
    "None": "new",
}


def status_line(run_directory: Path, queue: Mapping[str, QueuedJob] | None) -> str:
    """Return a line that says what the run is doing now.

    `queue` is None where Slurm did not answer.
    """
    ours = jobs(run_directory)
    if not ours:
        return f"{run_directory.name}: NEVER SUBMITTED{_progress(run_directory)}"
    history = attempts(run_directory)
    last = history[-1] if history else None
    found = [one for one in (queue or {}).values() if one.job in ours or one.array in ours]
    active = next((one for one in found if one.state not in ("PENDING",)), None)
    pending = [one for one in found if one.state == "PENDING"]
    if active is not None:
        return _running(run_directory, active, history, len(pending))
    verdict, undecided = _verdict(run_directory), _undecided(run_directory)
    if pending:
        first = pending[0]
        why = _REASONS.get(first.reason, first.reason)
        if is_of_version_0_1(run_directory):
            why += "; of megahybrid 0.1, it will end at once: cancel it and submit again"
        before = ""
        if last is not None:
            told = last.reason or undecided or "lost, its batch process gone"
            before = f" after attempt {len(history)}: {told}"
        elif undecided:
            before = f" after {undecided}"
        more = f" (+{len(pending) - 1} in the chain)" if len(pending) > 1 else ""
        return (
            f"{run_directory.name}: PENDING job {first.task}{more} ({why})"
            f"{before}{_progress(run_directory)}"
        )
    if (run_directory / FOLDER / DONE).exists():
        return f"{run_directory.name}: DONE after {_times(len(history))}{_progress(run_directory)}"
    where = "" if queue is not None else " (Slurm does not answer; this is from the run's files)"
    if verdict is not None:
        wanted = verdict["code"] == EXIT_RESUME or verdict["reason"].endswith("on request")
        word = "STOPPED" if wanted else "GIVEN UP"
        return (
            f"{run_directory.name}: {word} with code {verdict['code']}: {verdict['reason']}"
            f"{_progress(run_directory)}{where}"
        )
    ended = f"job {ours[-1]}"
    if last is not None:
        ended = f"job {last.job} try {last.attempt + 1}, {last.reason or 'no end was written'}"
    if undecided:
        ended += f"; {undecided}"
    if is_of_version_0_1(run_directory):
        ended += "; its batch script is of megahybrid 0.1: submit again"
    state = "NOT IN THE QUEUE" if queue is not None else "UNKNOWN"
    if queue is not None and (final_state := slurm.final_state(ours[-1])):
        if final_state.startswith("CANCELLED"):  # nobody was there to record it
            reason = Interruption.CANCELLED
            return (
                f"{run_directory.name}: STOPPED with code {EXIT_RESUME}: {reason}"
                f"{_progress(run_directory)}"
            )
        ended += f"; Slurm says {final_state}"
    return f"{run_directory.name}: {state} ({ended}){_progress(run_directory)}{where}"


def _running(run: Path, job: QueuedJob, history: Sequence[AttemptRecord], waiting: int) -> str:
    parts = [f"{run.name}: {job.state} job {job.task}"]
    last = history[-1] if history else None
    here = last is not None and last.job == job.job  # the records' last start is the queue's
    if here and last and job.restarts is not None and job.state == "RUNNING":
        here = last.attempt == job.restarts  # else it has begun again, and recorded nothing yet
    going = here and last is not None and not last.ended
    number = last.attempt if going and last else job.restarts
    if number is not None and (going or job.state == "RUNNING"):
        parts.append(f"try {number + 1}")
    parts.append(job.nodes)
    beats = read_beats(run, f"{last.job}.{last.attempt}") if last and going else {}
    line = _newest_step(run)
    over = job.state == "COMPLETING" or (here and last is not None and bool(last.ended))
    parts += _phase(run, beats) if going or not over else ["ending"]
    if line is not None:
        parts.append(f"step {line.step}")
        parts.append(f"loss {line.loss:.4g}" if line.loss is not None else "loss not finite")
    checkpoint = newest_checkpoint(run)
    parts.append(f"ckpt {checkpoint}" if checkpoint is not None else "no ckpt")
    parts.append(f"left {job.left}")
    parts += _trouble(run, beats, waiting, history[:-1] if going else history)
    return " ".join(part for part in parts if part)


def _phase(run: Path, beats: Mapping[int, Beat]) -> list[str]:
    """Return the phase of most ranks, and how old the oldest sign of life is."""
    if not beats:
        return ["preparing"]
    phases = Counter(beat.phase for beat in beats.values())
    (phase, _), *_ = phases.most_common(1)
    return [phase, f"age {max(_ages(run, beats).values(), default=0.0):.0f}s"]


def _ages(run: Path, beats: Mapping[int, Beat]) -> dict[int, float]:
    """Seconds since each rank's last sign of life."""
    now, ages = time.time(), {}
    for rank in beats:
        with contextlib.suppress(OSError):
            ages[rank] = max(0.0, now - heartbeat_file(run, rank).stat().st_mtime)
    return ages


def _trouble(
    run: Path, beats: Mapping[int, Beat], waiting: int, before: Sequence[AttemptRecord]
) -> list[str]:
    parts = []
    ratio = 1.3
    with contextlib.suppress(OSError, ValueError):
        ratio = read_job(run / FOLDER / "job.json").site.watchdog.slow_ratio
    for beat, times in slow_ranks(beats, ratio)[:2]:
        parts.append(f"| slow: rank {beat.rank} on {beat.host} {times:.1f}×")
    ages = _ages(run, beats)
    silent = [rank for rank, age in ages.items() if age > BEHIND_SECONDS]
    for host in sorted({beats[rank].host for rank in silent if beats[rank].exit_code is None})[:3]:
        names = ", ".join(str(rank) for rank in silent if beats[rank].host == host)
        parts.append(f"| no sign of rank {names} on {host}")
    # Beats are some seconds apart, so a rank counts as behind only when it stays where it is.
    begun = [beat for beat in beats.values() if beat.phase != "start"]
    last = max((beat.step for beat in begun), default=0)
    stuck = [b for b in begun if b.step < last and b.phase_seconds > BEHIND_SECONDS]
    for behind in sorted(stuck, key=lambda beat: beat.step)[:1]:
        parts.append(f"| rank {behind.rank} on {behind.host} stays at step {behind.step}")
    if (run / STOP_NOW).exists():
        parts.append("| stopping")
    if (run / SAVE_NOW).exists():
        parts.append("| a save is asked for")
    failures = sum(attempt.failed for attempt in before)
    if failures:
        parts.append(f"| {failures} failed before")
    sent_away = sum(not attempt.counts for attempt in before)
    if sent_away:
        parts.append(f"| {sent_away} interrupted by Slurm before")
    if waiting:
        parts.append(f"| +{waiting} in the chain")
    return parts


def _progress(run: Path) -> str:
    line = _newest_step(run)
    checkpoint = newest_checkpoint(run)
    parts = []
    if line is not None:
        parts.append(f"step {line.step}")
        if line.loss is not None:
            parts.append(f"loss {line.loss:.4g}")
    if checkpoint is not None:
        parts.append(f"ckpt {checkpoint}")
    return f" | {' '.join(parts)}" if parts else ""


def _newest_step(run: Path) -> StepLine | None:
    lines = newest_ledger_lines(run)
    return next((line for line in lines if isinstance(line, StepLine)), None)


def _verdict(run: Path) -> dict | None:
    """The last decision not to go on, if nothing was submitted since."""
    found = None
    for line in read_records(run):
        if line.get("event") == "verdict":
            found = line
        elif line.get("event") in ("submit", "start"):
            found = None
    return found if found is None or found["code"] != EXIT_DONE else None


def _undecided(run: Path) -> str:
    """Return the batch shell's words on a batch process that ended without a decision."""
    with contextlib.suppress(OSError, IndexError):
        return (run / FOLDER / UNDECIDED).read_text().splitlines()[-1]
    return ""


def _times(number: int) -> str:
    return "1 attempt" if number == 1 else f"{number} attempts"


def read_queue() -> dict[str, QueuedJob] | None:
    """The queue, or None where Slurm does not answer."""
    try:
        return slurm.queue()
    except SlurmError:
        return None


def node_lines(run_directory: Path) -> list[str]:
    """`megahybrid launch nodes`: every node that the run met, its state now and its failures."""
    met: dict[str, list[str]] = {}
    attempts_on: Counter[str] = Counter()
    for attempt in attempts(run_directory):
        for node in attempt.nodes:
            met.setdefault(node, [])
            attempts_on[node] += 1
    for line in read_records(run_directory):
        if line.get("event") == "end" and line.get("node") and line.get("code") not in _ORDERLY:
            met.setdefault(line["node"], []).append(f"{_day(line['time_unix'])} {line['reason']}")
        if line.get("event") in ("bad_node", "hang", "slow_rank"):
            what = line.get("reason") or f"rank {line.get('rank')} slow {line.get('times')}×"
            met.setdefault(line["node"], []).append(f"{_day(line['time_unix'])} {what}")
    try:
        states = slurm.node_states(sorted(met))
    except SlurmError:
        states = {}
    lines = []
    for node, history in sorted(met.items()):
        state = states.get(node, "state unknown")
        told = "; ".join(history[-5:]) or "no failure"
        lines.append(f"{node}: {state} | {_times(attempts_on[node])} | {told}")
    beats = read_beats(run_directory)
    costs = [beat.busy_seconds for beat in beats.values() if beat.busy_seconds]
    if costs:
        lines.append(f"the ranks' timed piece of work: median {statistics.median(costs):.3f} s")
    return lines or [f"{run_directory} has met no node yet"]


def _day(unix: float) -> str:
    return time.strftime("%m-%d %H:%M", time.localtime(unix))
