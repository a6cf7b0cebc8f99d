"""Events of the ledger as records: what was written before comes out the same to the byte."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from megahybrid import ledger
from megahybrid.errors import MegahybridError
from megahybrid.ledger import (
    AnnealEvent,
    AttentionEvent,
    AttentionFigures,
    ConfigChangeEvent,
    DamagedEvent,
    EndEvent,
    EvaluateEvent,
    EventLine,
    ExhaustedEvent,
    GateEvent,
    KernelsEvent,
    KnownEvent,
    ListenerFailedEvent,
    OtherEvent,
    PositionBucket,
    RecomputeEvent,
    RepeatDiffersEvent,
    ResumeEvent,
    RewindEvent,
    SaveEvent,
    SkipEvent,
    StageEvent,
    StartEvent,
    StepLine,
    SuiteEvent,
    TaskScores,
    TurnLoss,
    WarningEvent,
    damage,
    encode,
    newest_lines,
    parse,
    read_ledger,
)

WRITTEN = Path(__file__).parents[1] / "version_0_1/files/run/ledger.jsonl"
MASS = {"begin": 0.25, "needle": 0.0, "context": 0.5, "end": 0.25}
PARENT = {"checkpoint": "a/checkpoints/step-00000004", "step": 4, "tokens": 64, "take": "all"}

# One event of each kind, and its `detail` as version 0.1.0 wrote it.
EXAMPLES: list[tuple[KnownEvent, str]] = [
    (
        StartEvent(world_size=2, device="cpu", torch="2.13.0", kernels={"full": "sdpa"}),
        '{"world_size":2,"device":"cpu","torch":"2.13.0","kernels":{"full":"sdpa"}}',
    ),
    (
        ResumeEvent(world_size=2, device="cpu", parent=PARENT),
        '{"world_size":2,"device":"cpu","parent":{"checkpoint":"a/checkpoints/step-00000004",'
        '"step":4,"tokens":64,"take":"all"}}',
    ),
    (
        ConfigChangeEvent(field="optimizer.clip_norm", before="1.0", now="0.5"),
        '{"field":"optimizer.clip_norm","before":"1.0","now":"0.5"}',
    ),
    (
        StageEvent(
            index=0,
            kernels={"device": "cpu"},
            self_test_seconds=1.5,
            repeatable={"config": "a", "layout": "b", "anew": False},
        ),
        '{"index":0,"kernels":{"device":"cpu"},"self_test_seconds":1.5,'
        '"repeatable":{"config":"a","layout":"b","anew":false}}',
    ),
    (
        KernelsEvent(length=64, full="sdpa 1.000 ms", blocks="plain: no compiler"),
        '{"length":64,"full":"sdpa 1.000 ms","blocks":"plain: no compiler"}',
    ),
    (
        RecomputeEvent(layers="full 1, none 1", policies=("full", "none")),
        '{"layers":"full 1, none 1","policies":["full","none"]}',
    ),
    (
        AnnealEvent(changes={"local.window": 640}, self_test_seconds=0.5),
        '{"local.window":640,"self_test_seconds":0.5}',
    ),
    (
        EvaluateEvent(
            set="held",
            stage="short",
            step=4,
            rows="stream",
            loss=None,
            tokens=9,
            length=64,
            by_position=(PositionBucket(0, 1, 9, 2.5), PositionBucket(1, 2, 0, None)),
        ),
        '{"set":"held","stage":"short","step":4,"rows":"stream","loss":null,"tokens":9,'
        '"length":64,"by_position":[{"start":0,"stop":1,"tokens":9,"loss":2.5},'
        '{"start":1,"stop":2,"tokens":0,"loss":null}]}',
    ),
    (
        EvaluateEvent(
            set="chats", loss=0.5, tokens=9, length=64, by_turn=(TurnLoss(1, 6, 0.25),)
        ),
        '{"set":"chats","loss":0.5,"tokens":9,"length":64,"by_position":[],'
        '"by_turn":[{"turn":1,"tokens":6,"loss":0.25}]}',
    ),
    (
        SuiteEvent(
            suite="all",
            seconds=1.0,
            tasks={
                "one": TaskScores(kind="needle", exact={"64": 0.5}, token_accuracy={"64": 0.75}),
                "two": TaskScores(kind="ruler", score={"vt/64": 0.25}),
            },
            path="run/evaluations/a.json",
        ),
        '{"suite":"all","seconds":1.0,"tasks":{"one":{"kind":"needle","exact":{"64":0.5},'
        '"token_accuracy":{"64":0.75}},"two":{"kind":"ruler","score":{"vt/64":0.25}}},'
        '"path":"run/evaluations/a.json"}',
    ),
    (
        AttentionEvent(
            tokens=64,
            queries=32,
            lag_edges=[0, 1],
            by_kind={
                "local": AttentionFigures(
                    mass=MASS,
                    entropy_bits=3.0,
                    max_logit=2.0,
                    distance=9.5,
                    sink=0.25,
                    logit_by_lag=(1.0, None),
                )
            },
            layers=[{"kind": "local", "mass": MASS}],
            seconds=0.5,
        ),
        '{"tokens":64,"queries":32,"lag_edges":[0,1],"by_kind":{"local":{"mass":{"begin":0.25,'
        '"needle":0.0,"context":0.5,"end":0.25},"entropy_bits":3.0,"max_logit":2.0,'
        '"distance":9.5,"sink":0.25,"logit_by_lag":[1.0,null]}},"layers":[{"kind":"local",'
        '"mass":{"begin":0.25,"needle":0.0,"context":0.5,"end":0.25}}],"seconds":0.5}',
    ),
    (
        GateEvent(gate="loss on held", value=None, bound="at most 3", ok=False),
        '{"gate":"loss on held","value":null,"bound":"at most 3","ok":false}',
    ),
    (
        SaveEvent(ok=False, saved_step=3, bytes=0, seconds=0.0, checked_seconds=0.0,
                  stall_seconds=0.0, error="File too large"),
        '{"ok":false,"saved_step":3,"bytes":0,"seconds":0.0,"checked_seconds":0.0,'
        '"stall_seconds":0.0,"error":"File too large"}',
    ),
    (
        SaveEvent(ok=True, saved_step=4, bytes=9, seconds=1.0, checked_seconds=1.5,
                  stall_seconds=0.5, path="a", removed=("b",), warning="c"),
        '{"ok":true,"saved_step":4,"bytes":9,"seconds":1.0,"checked_seconds":1.5,'
        '"stall_seconds":0.5,"path":"a","removed":["b"],"warning":"c"}',
    ),
    (SkipEvent(reason="not finite", in_a_row=1), '{"reason":"not finite","in_a_row":1}'),
    (
        RewindEvent(from_step=9, reason="spike", times=1, data={"lanes": [[0, 1]]}),
        '{"from_step":9,"reason":"spike","times":1,"data":{"lanes":[[0,1]]}}',
    ),
    (ExhaustedEvent(source="books", epochs=1.1005), '{"source":"books","epochs":1.1005}'),
    (
        RepeatDiffersEvent(step=8, attempt=1, field="loss", before=None, now=2.5, bound=0.0),
        '{"step":8,"attempt":1,"field":"loss","before":null,"now":2.5,"bound":0.0}',
    ),
    (WarningEvent(message="a folder was renamed"), '{"message":"a folder was renamed"}'),
    (
        ListenerFailedEvent(listener="WandbListener", reason="no API key"),
        '{"listener":"WandbListener","reason":"no API key"}',
    ),
    (EndEvent(outcome="done"), '{"outcome":"done"}'),
    (EndEvent(outcome="failed", error="no space"), '{"outcome":"failed","error":"no space"}'),
]  # fmt: skip


def line_of(event: KnownEvent) -> EventLine:
    return EventLine.of(event, step=4, stage="short", tokens=64)


def text_of(name: str, detail: Any) -> bytes:
    line = {"kind": "event", "event": name, "step": 4, "stage": "short", "tokens": 64}
    return json.dumps(line | {"detail": detail}).encode()


def test_every_kind_of_event_has_an_example() -> None:
    assert {type(event) for event, _ in EXAMPLES} == set(get_args(KnownEvent))
    names = [kind.name for kind in get_args(KnownEvent)]
    assert len(set(names)) == len(names)
    assert {kind.__name__ for kind in get_args(KnownEvent)} <= set(ledger.__all__)


@pytest.mark.parametrize(("event", "text"), EXAMPLES, ids=lambda each: getattr(each, "name", ""))
def test_an_event_is_written_as_before_and_comes_back(event: KnownEvent, text: str) -> None:
    line = line_of(event)
    head = f'{{"kind":"event","event":"{event.name}","step":4,"stage":"short","tokens":64,"detail":'
    assert encode(line).decode().startswith(head + text)
    again = parse(encode(line).rstrip())
    assert isinstance(again, EventLine) and again == line and again.content == event
    assert encode(again) == encode(line)


def test_every_line_that_0_1_0_wrote_comes_out_the_same_to_the_byte() -> None:
    """Also by way of its record, so that no field of a kind is forgotten."""
    kinds = set()
    for text in WRITTEN.read_bytes().splitlines():
        line = parse(text)
        written = json.dumps(json.loads(text), separators=(",", ":")).encode() + b"\n"
        assert encode(line) == written
        if isinstance(line, EventLine):
            kinds.add(type(line.content))
            assert not isinstance(line.content, OtherEvent | DamagedEvent)
            assert json.dumps(line.content.detail()) == json.dumps(line.detail)
    assert kinds >= {StartEvent, StageEvent, SaveEvent, EvaluateEvent, ExhaustedEvent}


def test_fields_that_a_newer_version_added_are_kept_and_passed_over() -> None:
    detail = {"source": "a", "epochs": 2, "invented_later": {"x": 1}}
    line = parse(text_of("exhausted", detail))
    assert isinstance(line, EventLine)
    assert line.content == ExhaustedEvent(source="a", epochs=2) and line.detail == detail


@pytest.mark.parametrize(
    ("name", "detail"),
    [("invented_later", {"a": 1}), ("skip", {"reason": ["other", "now"]}), ("save", {})],
)
def test_what_this_version_does_not_know_is_kept_as_it_is(name: str, detail: Any) -> None:
    line = parse(text_of(name, detail))
    assert isinstance(line, EventLine)
    assert line.content == OtherEvent(name) and line.detail == detail and damage(line) is None


@pytest.mark.parametrize(
    ("name", "detail", "wrong"),
    [
        ("evaluate", {"set": "a", "loss": 1.0, "tokens": 1}, "length: field required"),
        ("gate", {"gate": "a", "value": "low", "bound": "b", "ok": True}, "value: "),
        ("start", {"world_size": -1}, "world_size: "),
        ("attention", {"by_kind": {"local": 5}}, "by_kind.local: "),
        ("evaluate", {"set": "a", "loss": 1.0, "tokens": 1, "length": 8,
                      "by_position": [{"start": 0}]}, "by_position.0.stop: field required"),
    ],
)  # fmt: skip
def test_an_event_that_a_page_draws_says_what_is_wrong_with_it(
    name: str, detail: Any, wrong: str
) -> None:
    line = parse(text_of(name, detail))
    assert isinstance(line, EventLine) and isinstance(line.content, DamagedEvent)
    told = damage(line)
    assert told is not None and told.startswith(wrong)


@pytest.mark.parametrize(
    ("name", "detail"),
    [("evaluate", {"set": [1]}), ("evaluate", {"set": "a", "loss": "low"}), ("suite", {"suite": 5}),
     ("rewind", {"data": [1]})],
)  # fmt: skip
def test_a_field_that_decides_how_a_run_goes_on_must_be_right(
    tmp_path: Path, name: str, detail: Any
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(text_of(name, detail) + b"\n" + text_of("end", {"outcome": "done"}) + b"\n")
    with pytest.raises(MegahybridError, match=rf"ledger\.jsonl:1 is not a .*\(event {name}"):
        read_ledger(path)


def test_the_newest_lines_come_first_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert list(newest_lines(path)) == []
    lines = WRITTEN.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"nothing\n" + lines[3] + b'{"kind":"st')
    found = list(newest_lines(path))
    assert [line.step for line in found] == [2, 1, 0, 0]
    assert isinstance(found[0], StepLine)


def test_records_are_frozen() -> None:
    for kind in get_args(KnownEvent):
        assert is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert fields(kind)
