"""A run directory that looks like a real one, made without training anything."""

import itertools
import math
import random
from pathlib import Path

from megahybrid.config import load
from megahybrid.config.base import dump_yaml
from megahybrid.ledger import EventLine, StepLine
from megahybrid.train.ledger import LedgerWriter

DEMO = Path(__file__).parents[2] / "configs" / "runs" / "demo.yaml"
BATCH = 16_384
STAGES = (("short", 256, 122), ("medium", 1024, 49), ("long", 4096, 25))  # name, length, steps
KINDS = ("embedding", "attention", "mlp", "norm")


def write_run(
    directory: Path, mfu: float | None = None, crash_at: int | None = None, sampled: bool = False
) -> Path:
    """A whole run of the demo's shape; with `crash_at`, one that died there and went on from 20
    steps before; `sampled`: with its attention, and a gate."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_yaml(load(DEMO)))
    (directory / "samples.txt").write_text("def read(self, <size>):\n    return self & size\n")
    ledger = directory / "ledger.jsonl"
    if crash_at is not None:
        with LedgerWriter(ledger) as writer:
            _attempt(writer, 0, crash_at, mfu)
    with LedgerWriter(ledger) as writer:
        _attempt(writer, max(0, crash_at - 20) if crash_at else 0, None, mfu)
        if sampled:
            for step in (100, 150):
                writer.write(_event("attention", step, "medium", _sample(step)))
            gate = {"gate": "loss on sample", "value": 3.1, "bound": "at most 4", "ok": True}
            writer.write(_event("gate", 171, "medium", gate))
        writer.write(_event("end", sum(s[2] for s in STAGES), "long", {"outcome": "done"}))
    return directory


def _attempt(writer: LedgerWriter, after: int, until: int | None, mfu: float | None) -> None:
    facts = {"world_size": 2, "tensor": 2, "data": 1, "zero_stage": 1, "device": "cpu",
             "precision": "fp32", "torch": "2.13.0"}  # fmt: skip
    writer.write(_event("resume" if after else "start", after, "short", facts))
    step = 0
    for index, (name, length, count) in enumerate(STAGES):
        for in_stage in range(count):
            step += 1
            if step <= after:
                continue
            if until is not None and step > until:
                return
            writer.write(_step(step, name, length, in_stage / count, index, mfu))
            if step % 50 == 0 or in_stage == count - 1:
                _evaluate(writer, step, name, length, index, far=in_stage == count - 1)


def _step(
    step: int, stage: str, length: int, progress: float, index: int, mfu: float | None
) -> StepLine:
    draw = random.Random(step)
    loss = _smooth_loss(step) + draw.gauss(0, 0.08)
    norm = (0.4 + 3 / math.sqrt(step)) * math.exp(draw.gauss(0, 0.25))
    speed = (9000, 8100, 6200)[index] * math.exp(draw.gauss(0, 0.04))
    if step == 1:
        speed /= 6  # the first step compiles and warms up
    skipped = step == 60
    return StepLine(
        step=step,
        stage=stage,
        tokens=step * BATCH,
        length=length,
        source_tokens={"stdlib": step * BATCH},
        cursor_crc=draw.getrandbits(32),
        learning_rate=min(step / 12, 1.0) * (3e-3 - 2.9e-3 * step * BATCH / 3.21e6),
        loss=None if skipped else loss,
        gradient_norm=None if skipped else norm,
        gradient_norm_by_kind={
            kind: None if skipped else norm * share
            for kind, share in zip(KINDS, (0.5, 0.6, 0.7, 0.05), strict=True)
        },
        skipped=skipped,
        tokens_per_second=speed,
        mfu=None if mfu is None else mfu * speed / 9000,
        memory_gib=0.9 + 0.1 * index,
        seconds={"data": 0.01, "forward_backward": BATCH / speed, "update": 0.05, "other": 0.01},
        time_unix=1.7e9 + 2 * step,
    )


def _evaluate(
    writer: LedgerWriter, step: int, stage: str, length: int, index: int, far: bool
) -> None:
    for held_out, shift in (("sample", 0.08), ("longest", 0.35)):
        kinds = [("stream", length)] + ([("documents", 16_384)] if far else [])
        for rows, longest in kinds:
            buckets = _buckets(step, shift, longest, index, short=held_out == "sample")
            known = [b for b in buckets if b["loss"] is not None]
            tokens = sum(b["tokens"] for b in known)
            detail = {
                "set": held_out, "rows": rows, "stage": stage, "step": step, "length": longest,
                "loss": sum(b["loss"] * b["tokens"] for b in known) / tokens, "tokens": tokens,
                "by_position": buckets,
            }  # fmt: skip
            writer.write(_event("evaluate", step, stage, detail))


def _buckets(step: int, shift: float, longest: int, index: int, short: bool) -> list[dict]:
    edges = [0, 1]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    trained = STAGES[index][1]
    buckets = []
    for start, stop in itertools.pairwise(edges):
        middle = math.sqrt((start + 1) * stop)
        loss = _smooth_loss(step) + shift + 2.2 * middle**-0.35 - 0.3
        if middle > trained:
            loss += 0.25 * math.log2(middle / trained) ** 1.2
        empty = short and start >= 8192
        buckets.append(
            {"start": start, "stop": stop, "tokens": 0 if empty else 1000 + stop - start,
             "loss": None if empty else loss}
        )  # fmt: skip
    return buckets


def _sample(step: int) -> dict:
    mass = {"begin": 0.2, "needle": 0.0, "context": 0.5, "end": 0.3}
    part = {"mass": mass, "entropy_bits": 5.0 - step / 100, "max_logit": 3.0, "distance": 40.0,
            "sink": 0.1}  # fmt: skip
    return {"tokens": 256, "queries": 32, "by_kind": {"local": part, "global": part}}


def _smooth_loss(step: int) -> float:
    return 3.1 + 5.2 * math.exp(-step / 25) + 0.9 * math.exp(-step / 110)


def _event(event: str, step: int, stage: str, detail: dict) -> EventLine:
    return EventLine(event=event, step=step, stage=stage, tokens=step * BATCH, detail=detail)
