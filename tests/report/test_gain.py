"""Context gain on the page: from the ledger and from the command, with what is unsure hollow."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megahybrid.ledger import ContextGainEvent, EventLine, PositionBucket
from megahybrid.ledger.records import from_json
from megahybrid.report.evaluation_files import EvaluationFile, newest_evaluations
from megahybrid.report.gain_charts import gain_in_words, gain_parts, newest_gains
from megahybrid.report.page import content, read_runs
from megahybrid.report.parts import Chart, Missing
from megahybrid.report.position_charts import _buckets_table, _curve, _line, loss_at
from megahybrid.report.record import Evaluation, RunRecord, read_record
from megahybrid.train.ledger import LedgerWriter
from tests.report.synthetic_answers import gain, write_answers
from tests.report.synthetic_run import BATCH, write_run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def record(plain: Path) -> RunRecord:
    return read_record(plain)


def told_at(step: int, *gains: dict[str, Any]) -> EvaluationFile:
    result = {"stage": "long", "context_gain": list(gains)}
    return EvaluationFile("context_gain", "held_out", step, result)


def test_buckets_of_few_documents_are_hollow_and_without_a_line(record: RunRecord) -> None:
    (chart,) = gain_parts([record], [[told_at(196, gain(4096))]])
    assert isinstance(chart, Chart) and chart.table is not None
    line, hollow = chart.figure["data"]
    assert line["y"] == [0.05, None] and hollow["y"] == [None, 0.1]
    assert hollow["mode"] == "markers" and hollow["marker"]["symbol"].endswith("-open")
    assert line["error_y"]["array"] == [0.025, None] == line["error_y"]["arrayminus"]
    assert "8,192–16,383, 3 documents" in hollow["text"]
    assert chart.table.rows[0][-2] == pytest.approx(0.08 * 24_576 / 0.693147 / 90_000, rel=1e-4)
    assert [row[6] for row in chart.table.rows] == [20, 20, 3]


def test_the_newest_step_is_drawn_and_the_commands_own_result(plain: Path) -> None:
    run = plain.parent / "told"
    write_run(run)
    with LedgerWriter(run / "ledger.jsonl") as writer:
        for step, context in ((171, 64), (196, 1024), (196, 4096)):
            event = from_json(ContextGainEvent, gain(context))
            writer.write(EventLine.of(event, step=step, stage="long", tokens=step * BATCH))
    record = read_record(run)
    assert [one.told.context for one in newest_gains(record, [])] == [1024, 4096]
    again = told_at(196, gain(4096) | {"gain": 0.5})
    assert [one.told.gain for one in newest_gains(record, [again])] == [0.08, 0.5]
    later = told_at(200, gain(2048))
    assert [one.told.context for one in newest_gains(record, [again, later])] == [2048]
    assert "gain-told-longest" in content(read_runs([run]))[1]


def test_what_was_not_measured_is_said_with_the_command_for_it(record: RunRecord) -> None:
    (missing,) = gain_parts([record], [[]])
    assert isinstance(missing, Missing)
    assert missing.command == f"megahybrid evaluate {record.directory} --context-gain"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "the last 4,096 tokens makes a token of “longest” easier by 0.080 nats (+0.060 to"),
        ({"low": -0.1, "high": -0.06, "gain": -0.08}, "harder by 0.080 nats (-0.100 to -0.060"),
        ({"low": -0.1}, "by no amount that can be told from none"),
        ({"documents": 7}, None),
        ({"low": None, "high": None}, None),
        ({"gain": float("nan")}, None),
    ],
)
def test_words_are_for_what_is_sure(
    record: RunRecord, changed: dict[str, Any], words: str | None
) -> None:
    found = gain_in_words(newest_gains(record, [told_at(196, gain(4096) | changed)]))
    assert (found is None) if words is None else (found is not None and words in found)


def test_a_damaged_result_is_one_line(plain: Path) -> None:
    run = write_answers(write_run(plain.parent / "damaged"))
    path = run / "evaluations" / "step-00000196.context_gain.held_out.json"
    path.write_text(json.dumps({"context_gain": [gain(1024) | {"stride": 0}]}))
    with pytest.raises(Exception, match=r"damaged \(context_gain.stride"):
        newest_evaluations(run)


def bucket(start: int, stop: int, documents: int, loss: float) -> PositionBucket:
    return PositionBucket(start, stop, 9 * documents, loss, documents, loss - 0.1, loss + 0.1)


def test_a_curve_is_of_the_same_documents_and_what_few_reach_is_hollow_and_unsaid() -> None:
    same = (bucket(0, 512, 9, 3.0), bucket(512, 1024, 9, 2.5))
    every = (bucket(0, 512, 40, 4.0), bucket(512, 1024, 20, 3.5), bucket(1024, 2048, 3, 5.0))
    one = Evaluation("a", "documents", "s", 1, 1, 2048, 4.0, 1, every, same)
    line, hollow = _line(_curve(one), "after s", "#000000", "circle")
    assert line["y"] == [3.0, 2.5, None] and hollow["y"] == [None, None, 5.0]
    assert line["error_y"]["array"][:2] == pytest.approx([0.1, 0.1])
    assert (loss_at(one, 1024), loss_at(one, 2048)) == (2.5, None)
    few = tuple(replace(each, documents=7) for each in same)
    assert loss_at(replace(one, same_documents=few), 1024) is None
    line, hollow = _line(_curve(replace(one, same_documents=few)), "after s", "#000000", "circle")
    assert line["y"] == [None] * 3 and hollow["y"] == [3.0, 2.5, 5.0]
    assert [row[3] for row in _buckets_table(one).rows] == [9, 9, 3]
