"""wandb: everything arrives offline; one that hangs or raises neither slows nor stops a run."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megahybrid.ledger import EventLine, SuiteEvent
from megahybrid.ledger.records import from_json
from megahybrid.report.tracker_page import tracked
from megahybrid.train.listeners import Listeners, WandbListener
from megahybrid.train.listeners.scalars import event_scalars
from megahybrid.train.listeners.wandb_listener import stable_id
from tests.report.synthetic_answers import write_answers
from tests.report.synthetic_run import write_run
from tests.train.listeners.example import EVALUATION, Memory, run_info, step_line

BLOCK, HEADER = 32768, 7


def read_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: a LevelDB log, 32 KiB blocks of chunks (crc, length, type)."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    offset, pieces = HEADER, b""
    while offset + HEADER <= len(content):
        if BLOCK - offset % BLOCK < HEADER:
            offset += BLOCK - offset % BLOCK
            continue
        length, kind = (
            int.from_bytes(content[offset + 4 : offset + 6], "little"),
            content[offset + 6],
        )
        if offset + HEADER + length > len(content):
            return  # still being written
        pieces += content[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def finished_records(path: Path) -> list[Any]:
    """All of a file's records: wandb's own process writes the last ones after finish() returns."""
    until = time.monotonic() + 60
    while True:
        records = list(read_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < until, "wandb has not finished its file"
        time.sleep(0.1)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in finished_records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                if inner:  # tables and pictures are mappings
                    row.setdefault(name, {})["/".join(inner)] = value
                else:
                    row[name] = value
            rows.append(row)
    return rows


class Stub(ModuleType):
    """Stands in for the wandb module; `init` and `log` do what the test says."""

    def __init__(self, init: Any = None, log: Any = None, logged_in: bool = True) -> None:
        super().__init__("wandb")
        self.rows: list[dict[str, Any]] = []
        self.inits: list[dict[str, Any]] = []
        self._init, self._log, self._logged_in = init, log, logged_in

    def Settings(self, **options: Any) -> Any:
        return SimpleNamespace(**options)

    def setup(self, settings: Any) -> None: ...

    def login(self, **_: Any) -> bool:
        return self._logged_in

    def init(self, **options: Any) -> "Stub":
        self.inits.append(options)
        if self._init:
            self._init()
        return self

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        if self._log:
            self._log()
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def train_with(
    stub: Stub, directory: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 20, **options: Any
) -> tuple[Memory, float]:
    """Runs some steps; what the others heard, and the slowest step's seconds in the listeners."""
    monkeypatch.setitem(sys.modules, "wandb", stub)  # type: ignore[arg-type]
    memory = Memory()
    wandb = WandbListener(
        **{"mode": "online", "project": "p", "start_seconds": 0.1, "finish_seconds": 0.2, **options}
    )
    listeners = Listeners([memory, wandb])
    listeners.on_start(run_info(directory))
    slowest = 0.0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        listeners.on_step(step_line(step))
        slowest = max(slowest, time.perf_counter() - begin)
        time.sleep(0.002)
    listeners.on_end("done")
    return memory, slowest


def failures(memory: Memory) -> list[str]:
    return [e.detail["reason"] for e in memory.events if e.event == "listener_failed"]


def test_an_offline_run_holds_every_step_through_stages_and_restarts(tmp_path: Path) -> None:
    for first, last in ((1, 8), (9, 16)):
        listeners = Listeners([WandbListener("offline", "megahybrid-tests")])
        listeners.on_start(run_info(tmp_path, step=first - 1))
        for step in range(first, last + 1):
            listeners.on_step(step_line(step))
        listeners.on_event(EVALUATION)
        listeners.on_end("done")
        time.sleep(1.1)  # wandb names an offline folder by the second
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.stem for path in files} == {f"run-{stable_id(tmp_path)}"}
    rows = [row for path in files for row in rows_of(path)]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["tokens"] for row in steps] == [100 * step for step in range(1, 17)]
    assert steps[3]["train/loss"] == pytest.approx(4.6)
    assert [row["held_out/stdlib/loss"] for row in rows if "held_out/stdlib/loss" in row] == [
        4.25, 4.25,
    ]  # fmt: skip


def test_the_id_is_drawn_once_per_directory(tmp_path: Path) -> None:
    assert stable_id(tmp_path / "a") == stable_id(tmp_path / "a")
    assert stable_id(tmp_path / "a") != stable_id(tmp_path / "b")


def test_all_rows_arrive_and_the_outcome_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub()
    memory, _ = train_with(stub, tmp_path, monkeypatch)
    assert [row["step"] for row in stub.rows] == list(range(1, 21))
    assert stub.exit_code == 0
    assert (stub.inits[0]["id"], stub.inits[0]["resume"]) == (stable_id(tmp_path), "allow")
    assert failures(memory) == []


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_hanging_wandb_slows_no_step_and_is_reported_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    released = threading.Event()
    stub = Stub(**{where: lambda: released.wait(60)})
    begin = time.perf_counter()
    memory, slowest = train_with(stub, tmp_path, monkeypatch)
    released.set()
    assert slowest < 20 and time.perf_counter() - begin < 40, "it hangs for a minute"
    assert len(failures(memory)) == 1
    assert "did not finish within 0.2 s" in failures(memory)[0]
    assert len(memory.steps) == 20


def test_a_queue_that_fills_up_ends_tracking_with_one_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    stub = Stub(init=lambda: released.wait(60))
    memory, slowest = train_with(stub, tmp_path, monkeypatch, queue_rows=5)
    released.set()
    assert slowest < 20, "it hangs for a minute"
    assert failures(memory) == [
        "wandb has not taken the last 5 rows. The run goes on; the ledger has everything."
    ]
    assert len(memory.steps) == 20


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_raising_wandb_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse() -> None:
        raise ConnectionError("503\n  from the server")

    memory, _ = train_with(Stub(**{where: refuse}), tmp_path, monkeypatch)
    assert failures(memory) == [
        "wandb: 503 from the server. The run goes on; the ledger has everything."
    ]
    assert len(memory.steps) == 20


def test_a_missing_key_is_reported_and_never_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(logged_in=False)
    memory, _ = train_with(stub, tmp_path, monkeypatch)
    assert "no API key" in failures(memory)[0]
    assert stub.inits == []


def test_a_missing_wandb_is_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, _ = train_with(None, tmp_path, monkeypatch)  # type: ignore[arg-type]
    assert "wandb cannot be imported" in failures(memory)[0]
    assert len(memory.steps) == 20


SUITE: dict = {"suite": "needles", "seconds": 1.0, "tasks": {
    "single": {"kind": "needle", "exact": {"64": 0.5}, "token_accuracy": {"64": 0.75}},
    "ruler": {"kind": "ruler", "score": {"vt/64": 0.25}},
}}  # fmt: skip
SAMPLE: dict = {"by_kind": {"global": {
    "mass": {"begin": 0.25, "end": 0.75}, "entropy_bits": 3.0, "sink": 0.125,
    "logit_by_lag": [1.0, None],
}}}  # fmt: skip


def test_suites_and_samples_are_numbers_by_name() -> None:
    def scalars(event: str, detail: dict) -> dict[str, float]:
        line = EventLine(event=event, step=1, stage="short", tokens=100, detail=detail)
        return event_scalars(line)

    assert scalars("suite", SUITE) == {
        "suite/needles/single/exact/64": 0.5,
        "suite/needles/single/token_accuracy/64": 0.75,
        "suite/needles/ruler/score/vt/64": 0.25,
    }
    assert scalars("attention", SAMPLE) == {
        "attention/global/entropy_bits": 3.0,
        "attention/global/sink": 0.125,
        "attention/global/mass_begin": 0.25,
        "attention/global/mass_end": 0.75,
    }
    assert scalars("gate", {"ok": True}) == {}


def test_an_offline_run_holds_the_reports_tables_and_pictures(tmp_path: Path) -> None:
    run = write_answers(write_run(tmp_path / "demo"))
    memory = Memory()
    wandb = WandbListener("offline", "megahybrid-tests", finish_seconds=240, track=tracked)
    listeners = Listeners([memory, wandb])
    listeners.on_start(run_info(run))
    listeners.on_step(step_line(196))
    listeners.on_event(from_json(SuiteEvent, SUITE | {"suite": "long"}))
    listeners.on_end("done")
    assert failures(memory) == []
    rows = [row for path in run.glob("wandb/offline-run-*/run-*.wandb") for row in rows_of(path)]
    (during,) = [row for row in rows if any(name.startswith("suite/needle") for name in row)]
    (final,) = [row for row in rows if any(name.startswith("report/") for name in row)]
    assert final["tokens"] == 19600
    assert {kind_of(value) for value in final.values()} >= {"table-file", "image-file"}, final
    tables = {name for name, value in (during | final).items() if kind_of(value) == "table-file"}
    pictures = {name for name, value in (during | final).items() if kind_of(value) == "image-file"}
    assert {"suite/needle-demo-long-single", "report/training/loss"} <= tables
    assert {"suite/needle_long_single", "report/loss", "report/heads_needle_needle"} <= pictures
    table = final["report/retrieval/needle-demo-long-single"]
    (written,) = run.glob(f"wandb/offline-run-*/files/{table['path']}")
    kept = json.loads(written.read_text())
    assert kept["columns"][:4] == ["length", "depth %", "trials", "exact"]
    assert kept["data"][0][:4] == [1024, 0, 4, 1]
    image = final["report/loss"]
    assert next(run.glob(f"wandb/offline-run-*/files/{image['path']}")).stat().st_size > 10_000


def test_pictures_that_cannot_be_drawn_cost_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no ink")

    stub = Stub()
    memory, _ = train_with(stub, tmp_path, monkeypatch, track=fails, finish_seconds=20)
    assert [row["step"] for row in stub.rows if "step" in row] == list(range(1, 21))
    assert stub.exit_code == 0
    assert "not all tables and pictures: no ink. Send them with" in failures(memory)[0]


def kind_of(value: Any) -> Any:
    return value.get("_type") if isinstance(value, dict) else None
