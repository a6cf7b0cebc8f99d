"""Effective training time under failures: Young and Daly's interval, and a seeded simulation.

    python -m benchmarks.failure_arithmetic [--save-seconds S --stall-seconds S …] [--json]

The default is Llama 3 405B (arXiv 2407.21783, sec. 3.3.4 and table 5): 54 days on 16,384 GPUs, 419
unexpected interruptions. What is not published is an assumption, an option and printed. Recovery is
compared with each of our features and without it.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

HOUR = 3600.0
DAY = 24 * HOUR

BYTES_PER_PARAMETER = 12  # weight and two moments, fp32
# Measured by benchmarks/checkpoint_io.py on the 2-core development machine: 384 MiB of one rank
# were safe on disk and checked after 0.38 s, and training waited for 6.7 % of that.
RANK_RATE = 384 * 2**20 / 0.382
STALL_SHARE = 0.067
SHARED_RATE = 2e12  # Llama 3's storage, sustained (arXiv 2407.21783, sec. 3.3.1)


@dataclass(frozen=True)
class Cluster:
    """What fails, and how often."""

    days: float = 54.0
    failures: int = 419  # unexpected interruptions in these days
    # "approximately 78 % are attributed to confirmed or suspected hardware issues".
    hardware: float = 0.78
    # Assumed: a tenth of all failures shows as silence instead of an end.
    hangs: float = 0.10
    # Assumed: a faulty node that is used again fails again, after this long on average.
    relapse_seconds: float = 0.25 * HOUR

    @property
    def mean_seconds(self) -> float:
        """Mean time between failures of the whole job."""
        return self.days * DAY / self.failures


@dataclass(frozen=True)
class Recovery:
    """What a run does about it. The first three are measured, the others assumed."""

    save_seconds: float  # from the beginning of a save to a checkpoint that can be resumed from
    stall_seconds: float  # of these, training stands still
    start_seconds: float  # Slurm, imports, meeting, verifying and loading, first step
    interval_seconds: float | None = None  # between saves; None: Daly's
    requeue: bool = True  # False: a person looks
    person_seconds: float = 1.0 * HOUR  # until a person has seen it and submitted again
    watchdog: bool = True  # False: the collective's time-out notices
    hang_seconds: float = 600.0  # the watchdog's limit of a step
    timeout_seconds: float = 1800.0  # torch's default of a collective
    notice_seconds: float = 30.0  # until Slurm has seen that a node is gone
    check: bool = True  # nodes are checked before a start, bad ones replaced
    check_seconds: float = 30.0
    caught: float = 0.9  # of faulty nodes, by the check


def daly(stall: float, mean: float) -> float:
    """Daly's interval between the ends of saves (2006, eq. 37, in the range stall < 2 mean).

    Young's first-order interval is sqrt(2 · stall · mean); this one adds higher orders.
    """
    if stall >= 2 * mean:
        return mean
    x = stall / (2 * mean)
    return math.sqrt(2 * stall * mean) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def save_seconds(parameters: float, ranks: int, rank_rate: float, shared_rate: float) -> float:
    """Of a whole checkpoint: every rank writes its share, the storage takes them all."""
    total = BYTES_PER_PARAMETER * parameters
    return max(total / ranks / rank_rate, total / shared_rate)


def young(stall: float, mean: float) -> float:
    """Young's interval (1974)."""
    return math.sqrt(2 * stall * mean)


def interval_of(recovery: Recovery, cluster: Cluster) -> float:
    """The interval in use: chosen, or Daly's; never shorter than a save takes."""
    chosen = recovery.interval_seconds or daly(recovery.stall_seconds, cluster.mean_seconds)
    return max(chosen, recovery.save_seconds)


def simulate(cluster: Cluster, recovery: Recovery, seed: int) -> float:
    """Useful share of the cluster's days: training that no failure threw away."""
    draw = random.Random(seed)
    end, now, useful = cluster.days * DAY, 0.0, 0.0
    interval = interval_of(recovery, cluster)
    faulty = False
    while now < end:
        mean = cluster.relapse_seconds if faulty else cluster.mean_seconds
        life = draw.expovariate(1 / mean)
        ran = min(life, end - now)
        useful += _kept(ran, interval, recovery, complete=life >= end - now)
        now += ran
        if now >= end:
            break
        hung = draw.random() < cluster.hangs
        faulty = faulty or draw.random() < cluster.hardware
        now += _recover(recovery, draw, hung)
        if faulty and recovery.check and draw.random() < recovery.caught:
            faulty = False
        elif faulty and not recovery.requeue:
            faulty = False  # a person who restarts looks at the node
        elif faulty and draw.random() < 0.5:
            faulty = False  # the scheduler happens to give other nodes
    return useful / (cluster.days * DAY)


def _kept(ran: float, interval: float, recovery: Recovery, *, complete: bool) -> float:
    """Training seconds of an attempt of `ran` seconds that a later one can build on."""
    period = interval + recovery.stall_seconds
    periods, rest = divmod(ran, period)
    if complete:
        return periods * interval + min(rest, interval)
    # The newest save may not have been ready yet when the failure came.
    late = recovery.save_seconds - recovery.stall_seconds
    if periods and rest < late:
        periods -= 1
    return periods * interval


def _recover(recovery: Recovery, draw: random.Random, hung: bool) -> float:
    """Seconds from a failure to the first step of the next attempt."""
    if hung:
        seconds = recovery.hang_seconds if recovery.watchdog else recovery.timeout_seconds
    else:
        seconds = recovery.notice_seconds
    if not recovery.requeue:
        seconds += draw.expovariate(1 / recovery.person_seconds)
    if recovery.check:
        seconds += recovery.check_seconds
    return seconds + recovery.start_seconds


def variants(recovery: Recovery) -> dict[str, Recovery]:
    """Everything, each feature left out, and nothing."""
    hourly = {"interval_seconds": HOUR}
    synchronous = {"stall_seconds": recovery.save_seconds}
    without: Mapping[str, Mapping] = {
        "everything": {},
        "without requeue (a person restarts)": {"requeue": False},
        "without the watchdog": {"watchdog": False},
        "without the node check": {"check": False},
        "without saving beside the training": synchronous,
        "saving every hour": hourly,
        "without any of these": {
            "requeue": False,
            "watchdog": False,
            "check": False,
            **synchronous,
            **hourly,
        },
    }
    return {name: replace(recovery, **changes) for name, changes in without.items()}


def effective(cluster: Cluster, recovery: Recovery, seeds: Sequence[int]) -> tuple[float, float]:
    """Mean useful share over the seeds, and its standard error."""
    shares = [simulate(cluster, recovery, seed) for seed in seeds]
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return statistics.fmean(shares), error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=float, default=54.0)
    parser.add_argument("--failures", type=int, default=419)
    parser.add_argument("--parameters", type=float, default=405e9)
    parser.add_argument("--ranks", type=int, default=16_384)
    parser.add_argument(
        "--rank-rate", type=float, default=RANK_RATE, help="bytes per second that a rank saves"
    )
    parser.add_argument(
        "--shared-rate", type=float, default=SHARED_RATE, help="that the storage takes from all"
    )
    parser.add_argument("--save-seconds", type=float, help="instead of parameters and rates")
    parser.add_argument("--stall-seconds", type=float, help="that training waits for a save")
    parser.add_argument("--start-seconds", type=float, default=300.0, help="to the first step")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    cluster = Cluster(days=asked.days, failures=asked.failures)
    save = asked.save_seconds or save_seconds(
        asked.parameters, asked.ranks, asked.rank_rate, asked.shared_rate
    )
    recovery = Recovery(save, asked.stall_seconds or STALL_SHARE * save, asked.start_seconds)
    seeds = range(asked.seeds)
    shares = {name: effective(cluster, one, seeds) for name, one in variants(recovery).items()}
    if asked.json:
        facts = {"cluster": asdict(cluster), "recovery": asdict(recovery), "shares": shares}
        print(json.dumps(facts, indent=2))
        return
    mean = cluster.mean_seconds
    print(f"a save takes {save:.1f} s, of which training waits {recovery.stall_seconds:.2f} s")
    print(f"mean time between failures {mean / HOUR:.2f} h over {cluster.days:g} days")
    print(
        f"interval between saves: "
        f"Young {young(recovery.stall_seconds, mean) / 60:.1f} min, "
        f"Daly {daly(recovery.stall_seconds, mean) / 60:.1f} min"
    )
    print(f"effective training time, mean of {asked.seeds} seeds:")
    for name, (share, error) in shares.items():
        interval = interval_of(variants(recovery)[name], cluster)
        print(f"  {name:38} {share:6.1%} ± {error:.1%}   saves every {interval / 60:.1f} min")


if __name__ == "__main__":
    main()
