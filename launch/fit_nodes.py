"""The choice of nodes that are fit: each is looked at by itself, then they talk in pairs."""

import json
import subprocess
import time
from collections.abc import Sequence

from megahybrid.launch.attempt import Attempt
from megahybrid.launch.events import JobEvents
from megahybrid.launch.pairs import find_bad_nodes, read_answers, rounds
from megahybrid.launch.policy import task_ends
from megahybrid.launch.slurm import SlurmError
from megahybrid.launch.step import check_step, pair_step


def fit_nodes(
    attempt: Attempt, nodes: Sequence[str], events: JobEvents
) -> tuple[list[str], dict[str, str]]:
    """Return the nodes that are fit, and what is wrong with the others.

    The others are logged and recorded. Raises Stopped where a check was ended from outside: that
    says nothing of a node.
    """
    check = attempt.job.site.node_check
    if not check.enabled:
        return list(nodes), {}
    bad = _alone(attempt, nodes, events)
    good = [node for node in nodes if node not in bad]
    if check.pairs and len(good) > 1:
        bad |= _in_pairs(attempt, good, events)
    for node, reason in bad.items():
        attempt.log(f"bad node {node}: {reason}")
        attempt.try_record("bad_node", node=node, reason=reason)
    return [node for node in nodes if node not in bad], bad


def _alone(attempt: Attempt, nodes: Sequence[str], events: JobEvents) -> dict[str, str]:
    seconds = attempt.job.site.node_check.seconds
    folder = attempt.logs / "nodes"
    command = check_step(attempt.job, nodes, folder, time.time())
    _wait(attempt, attempt.start(command, nodes, "node-check.log"), seconds, events)
    bad: dict[str, str] = {}
    for node in nodes:
        try:
            problems = json.loads((folder / f"{node}.json").read_text())["problems"]
        except (OSError, ValueError, KeyError):
            how = task_ends((attempt.logs / "node-check.log").read_text(errors="replace"))
            problems = [f"gave no answer ({how.get(node, f'in {seconds:.0f} s')})"]
        if problems:
            bad[node] = "; ".join(problems)
    if bad or events.signals:
        events.check("nodes were checked")
    if len(bad) == len(nodes) and not any(folder.glob("*.json")):
        raise SlurmError(f"no node could be checked ({_last_line(attempt, 'node-check.log')})")
    return bad


def _in_pairs(attempt: Attempt, nodes: Sequence[str], events: JobEvents) -> dict[str, str]:
    check = attempt.job.site.node_check
    folder = attempt.logs / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rounds.json").write_text(json.dumps(rounds(nodes)))
    command = pair_step(attempt.job, nodes, folder)
    # Each round may take its time, and torch is imported on nodes that see its files for the first
    # time.
    seconds = 3 * check.pair_seconds + 60
    _wait(attempt, attempt.start(command, nodes, "pair-check.log"), seconds, events)
    answers = read_answers(folder)
    worked = {answer.pair for answer in answers if answer.gib_per_second is not None}
    if events.signals or any(pair not in worked for part in rounds(nodes) for pair in part):
        events.check("pairs of nodes were checked")
    if not answers:
        raise SlurmError(f"no pair of nodes answered ({_last_line(attempt, 'pair-check.log')})")
    verdict = find_bad_nodes(nodes, answers, check.pair_ratio)
    attempt.log(verdict.summary)
    if verdict.no_pair_error is not None:
        raise SlurmError(
            f"no two nodes reach each other ({verdict.no_pair_error}). Look at the network, the "
            "python of the site file and its NCCL_SOCKET_IFNAME, or set node_check.pairs: false "
            "there."
        )
    return verdict.bad


def _last_line(attempt: Attempt, log: str) -> str:
    lines = (attempt.logs / log).read_text().strip().splitlines()[-1:]
    return " ".join(lines) or "srun said nothing"


def _wait(attempt: Attempt, process: subprocess.Popen, seconds: float, events: JobEvents) -> None:
    """Wait until a short step ends, at most `seconds`.

    The wait is over too when something ends the attempt itself.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not events.signals:
        time.sleep(0.1)
    if process.poll() is None and events.terminated:
        process.kill()  # Slurm ends the step, and soon us
        process.wait()
    elif process.poll() is None:
        attempt.kill(process)
