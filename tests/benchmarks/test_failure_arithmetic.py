"""The arithmetic of failures against what can be known without it."""

from dataclasses import replace

import pytest

from benchmarks.failure_arithmetic import (
    Cluster,
    Recovery,
    daly,
    effective,
    interval_of,
    save_seconds,
    simulate,
    variants,
    young,
)

RECOVERY = Recovery(save_seconds=60.0, stall_seconds=60.0, start_seconds=300.0, check=False)
PLAIN = Cluster(hardware=0.0, hangs=0.0)


def test_without_failures_only_the_stalls_are_lost() -> None:
    share = simulate(replace(PLAIN, failures=1, days=54e-3), RECOVERY, seed=1)
    interval = interval_of(RECOVERY, replace(PLAIN, failures=1, days=54e-3))
    quiet = Recovery(60.0, 60.0, 300.0, interval_seconds=interval)
    assert simulate(Cluster(days=30, failures=1, hardware=0, hangs=0), quiet, 3) == pytest.approx(
        interval / (interval + 60), rel=0.05
    )
    assert 0 <= share <= 1


def test_the_simulation_meets_dalys_expected_time() -> None:
    """Daly (2006, eq. 20): time per useful second is M/t · e^(R/M) · (e^((t+s)/M) - 1)."""
    import math

    mean, stall, restart = PLAIN.mean_seconds, 60.0, 330.0
    interval = interval_of(RECOVERY, PLAIN)
    expected = interval / (mean * math.exp(restart / mean) * math.expm1((interval + stall) / mean))
    share, error = effective(PLAIN, RECOVERY, range(60))
    assert abs(share - expected) < 4 * error + 0.002


def test_dalys_interval_is_the_best_of_its_neighbours() -> None:
    shares = {
        factor: effective(
            PLAIN,
            replace(RECOVERY, interval_seconds=factor * interval_of(RECOVERY, PLAIN)),
            range(60),
        )[0]
        for factor in (0.3, 1.0, 3.0)
    }
    assert shares[1.0] > shares[0.3] and shares[1.0] > shares[3.0]


def test_young_and_daly_agree_where_saves_are_cheap() -> None:
    assert daly(1.0, 1e6) == pytest.approx(young(1.0, 1e6), rel=2e-3)
    assert daly(300.0, 100.0) == 100.0


def test_every_feature_is_worth_something_and_the_seed_decides() -> None:
    recovery = Recovery(2.4, 0.27, 300.0)
    shares = {
        name: effective(Cluster(), one, range(30))[0] for name, one in variants(recovery).items()
    }
    assert max(shares, key=lambda name: shares[name]) == "everything"
    assert min(shares, key=lambda name: shares[name]) == "without any of these"
    assert simulate(Cluster(), recovery, 7) == simulate(Cluster(), recovery, 7)


def test_a_save_is_bound_by_the_rank_or_by_the_storage() -> None:
    assert save_seconds(1e9, 1, 12e9, 1e15) == 1.0
    assert save_seconds(1e9, 1000, 12e9, 1.2e9) == 10.0
