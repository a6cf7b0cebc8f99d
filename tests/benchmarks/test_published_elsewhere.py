"""The figures of data, checkpoints and the soak are those of the files that their pages name."""

import statistics

import pytest

from tests.benchmarks.test_published import ROOT, read


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


@pytest.mark.parametrize(
    "ours,peer,told",
    [
        ("megahybrid", "megatron-core GPTDataset", "megatron-core's GPTDataset"),
        ("megahybrid", "datasets, numpy format", "`datasets`, numpy format"),
        (
            "megahybrid, host part of a GPU step",
            "megatron-core GPTDataset",
            "GPTDataset",
        ),
        (
            "megahybrid, tensors of a CPU step",
            "megatron-core GPTDataset",
            "GPTDataset",
        ),
    ],
)
def test_rows_served(ours: str, peer: str, told: str) -> None:
    rates = read("data_serving_cpu")["rows_per_cpu_second"]
    a, b = (statistics.median(rates[name]) for name in (ours, peer))
    assert f"| {round(a, -2):,.0f} | {told} {round(b, -2):,.0f} | {a / b:.1f}× |" in page("data")


@pytest.mark.parametrize(
    "peer,told",
    [
        ("datasets.map and save", "`datasets.map` and save"),
        ("Pool, line by line", "a Pool, line by line"),
    ],
)
def test_tokenizing(peer: str, told: str) -> None:
    found = read("data_prepare_cpu")["tokenize"]
    seconds = found["wall_and_cpu_seconds"]
    rates = [
        found["megabytes"] / statistics.median(cpu for _, cpu in seconds[name])
        for name in ("megahybrid data tokenize", peer)
    ]
    row = f"| {rates[0]:.2f} | {told} {rates[1]:.2f} | {rates[0] / rates[1]:.1f}× |"
    assert row in page("data"), row


def test_verifying_and_opening() -> None:
    found = read("data_prepare_cpu")
    gigabytes, seconds = found["verify"]["gigabytes"], found["verify"]["cpu_seconds"]
    a, b = (gigabytes / statistics.median(times) for times in seconds.values())
    assert f"| `verify`, GB | {a:.2f} | sha256sum {b:.2f} | {a / b:.1f}× |" in page("data")
    first, mib = (statistics.median(c) for c in zip(*found["open"]["seconds_and_mib"], strict=True))
    assert f"| {first:.2f} s, {mib:.0f} MiB |" in page("data")


def test_checkpoints() -> None:
    found, text = read("checkpoint_io_cpu"), page("checkpoint_format")
    for line, value in (
        ("torch.save and fsync", f"{found['save, against torch.save with fsync']:.1f}"),
        ("waits for no disk", f"{found['save, against torch.save alone']:.2f}"),
        ("load with verification", f"{found['load with verification, against torch.load']:.2f}"),
        ("with its reading back", f"{100 * found['stall, of the whole save']:.1f} %"),
        (
            "the time until it is published",
            f"{100 * found['stall, of the save until it is published']:.0f} %",
        ),
    ):
        (row,) = (r for r in text.splitlines() if r.startswith("|") and line in r)
        assert row.split(" | ")[1] == value, row
    assert f"{found['mebibytes']:.0f} MiB, one process" in text
    assert f"--rounds {found['rounds']}`" in text


def test_the_soak() -> None:
    found, text = read("soak_cpu"), page("faults")
    executed, useful = found["steps executed"], found["steps that hold"]
    assert f"{found['faults']} faults, five of each kind, {executed:,} steps executed" in text
    assert f"{useful:,} of\nthem useful (**{found['useful']:.1%}**)".replace("%", " %") in text
    assert found["losses that differ from the undisturbed run"] == 0
    told = {
        "a rank is killed": "a rank killed",
        "the launcher is killed": "the launcher killed",
        "asked to stop": "asked to stop, saved",
        "a rank hangs": "a rank stopped;",
    }
    for kind, times in found["seconds from fault to next step"].items():
        assert times["times"] == 5
        (row,) = (r for r in text.splitlines() if r.startswith(f"| {told[kind]}"))
        assert row.endswith(f"| {times['median']} | {times['longest']} |"), row
