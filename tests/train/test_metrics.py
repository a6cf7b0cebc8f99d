"""Metrics: pair counts against the mask itself, FLOPs against the published table, time left."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.config.attention import AttentionScheme, Nope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.train.metrics import (
    StepClock,
    StepFlops,
    TimeLeft,
    attended_pairs,
    memory_gib,
    mfu,
    peak_flops_per_second,
    training_seconds,
)


def model_1b() -> ModelConfig:
    plan = LayerPlan(
        num_layers=16,
        pattern=["full"],
        schemes={"full": AttentionScheme(position=Nope(kind="nope"))},
    )
    return ModelConfig(
        vocab_size=131_072, hidden_size=2048, intermediate_size=8192, num_heads=16,
        num_kv_heads=4, head_dim=128, layer_plan=plan,
    )  # fmt: skip


def pairs_of_the_dense_mask(starts: np.ndarray, window: int | None) -> int:
    seq = starts.shape[1]
    query, key = np.arange(seq)[:, None], np.arange(seq)[None, :]
    seen = (key <= query) & (key >= starts[:, :, None])
    if window is not None:
        seen = seen & (key > query - window)
    return int(seen.sum())


@st.composite
def document_starts(draw: st.DrawFn) -> np.ndarray:
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    rows = []
    for _ in range(batch):
        row = [0]
        for i in range(1, seq):
            row.append(i if draw(st.booleans()) else row[-1])
        rows.append(row)
    return np.array(rows, dtype=np.int64)


@given(document_starts(), st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=4))
def test_pairs_are_those_of_the_dense_mask(starts: np.ndarray, windows: list[int | None]) -> None:
    expected = sum(pairs_of_the_dense_mask(starts, window) for window in windows)
    assert attended_pairs(starts, windows) == expected
    assert attended_pairs(torch.from_numpy(starts), windows) == expected


def test_pairs_do_not_overflow_and_do_not_depend_on_how_rows_are_chunked() -> None:
    starts = np.zeros((40, 131_072), dtype=np.int64)
    row = 131_072 * 131_073 // 2
    assert attended_pairs(starts, [None] * 16) == 16 * 40 * row


@pytest.mark.parametrize(
    ("window", "gigaflops_per_token"), [(None, 9.06), (4096, 8.76)], ids=["full", "hybrid"]
)
def test_flops_of_the_1b_shape_at_8k_are_those_of_the_published_table(
    window: int | None, gigaflops_per_token: float
) -> None:
    windows = [window, window, window, None] * 4
    flops = StepFlops.from_model(model_1b(), windows).of(np.zeros((1, 8192), dtype=np.int64))
    assert flops / 8192 / 1e9 == pytest.approx(gigaflops_per_token, abs=0.005)


def test_mfu_is_the_share_of_the_peak_of_all_devices() -> None:
    peak = peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16")
    assert peak == 989e12
    assert mfu(flops=989e12, seconds=1.0, peak=peak, devices=2) == 0.5


@pytest.mark.parametrize(
    ("name", "precision"), [("cpu", "bf16"), ("NVIDIA H100 80GB HBM3", "fp32")]
)
def test_mfu_is_none_where_no_peak_is_published(name: str, precision: str) -> None:
    assert mfu(1e12, 1.0, peak_flops_per_second(name, precision), devices=1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_device_is_found_by_the_narrowest_name(name: str, peak: float) -> None:
    assert peak_flops_per_second(name, "bf16") == peak


def test_phases_and_other_add_up_to_the_lap() -> None:
    begin = time.perf_counter()
    clock = StepClock()
    with clock.phase("data"):
        time.sleep(0.02)
    with clock.phase("save"):
        time.sleep(0.03)
    time.sleep(0.01)
    seconds = clock.lap()
    assert set(seconds) == {"data", "forward_backward", "update", "save", "evaluate", "other"}
    assert seconds["data"] >= 0.02 and seconds["save"] >= 0.03 and seconds["other"] >= 0.01
    assert sum(seconds.values()) <= time.perf_counter() - begin
    assert training_seconds(seconds) == pytest.approx(seconds["data"] + seconds["other"])
    assert clock.lap()["data"] == 0.0


def test_time_left_weighs_a_later_stage_by_its_cost_per_token() -> None:
    left = TimeLeft(segments=[(1000, 1.0), (2000, 3.0)])
    assert left.update(0, now=0.0) is None
    assert left.update(500, now=5.0) == pytest.approx((500 * 1.0 + 1000 * 3.0) / 100)
    assert left.update(2000, now=40.0) == 0.0


def test_time_left_follows_the_pace_of_the_last_minutes() -> None:
    left = TimeLeft(segments=[(10_000, 1.0)], window_seconds=10.0)
    for second in range(100):
        left.update(second, now=float(second))
    slow = left.update(100, now=100.0)
    for second in range(1, 21):
        fast = left.update(100 + 100 * second, now=100.0 + second)
    assert slow == pytest.approx(9900)
    assert fast == pytest.approx((10_000 - 2100) / 100)


def test_a_resumed_run_has_no_pace_until_its_second_report() -> None:
    left = TimeLeft(segments=[(1000, 1.0)])
    assert left.update(900, now=0.0) is None
    assert left.update(950, now=1.0) == pytest.approx(1.0)


def test_memory_of_a_process_is_a_plausible_number_of_gibibytes() -> None:
    assert 0.01 < memory_gib("cpu") < 1000
