"""What a run reads, recomputed from its config: one step for the eye, or the whole run as proof.

The order is a function of config and files, so nothing of the run is needed but its config; its
ledger is what the recomputed order is compared with.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.config import RunConfig, load
from megahybrid.config.stages import StagePoint
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import Mixture, RowPlan, State, cursor_crc
from megahybrid.errors import DataError

LEDGER = "ledger.jsonl"
BEGINNINGS = ("start", "resume")


@dataclass(frozen=True)
class Step:
    """One step of a run. state: of the mixture, after it; `number` counts steps done, from 1."""

    number: int
    point: StagePoint
    plans: list[RowPlan]
    state: State


@dataclass(frozen=True)
class Audit:
    """What a run has seen. rows: sha256 over source, first token and length of every span served,
    in order; seen: the same per source; after: `rows` up to each step."""

    run: str
    steps: int
    tokens: dict[str, int]
    epochs: dict[str, float]
    fingerprints: dict[str, str]
    seen: dict[str, str]
    rows: str
    after: list[str]


def load_run(path: str | Path) -> RunConfig:
    """A run file, or the config kept in a run's folder."""
    found = Path(path)
    if found.is_dir():
        found = found / "config.yaml"
        if not found.exists():
            raise DataError(f"{path} is no run: it has no config.yaml. Name a run's folder.")
    return load(found)


def open_mixture(run: RunConfig) -> Mixture:
    """The run's sources, as training opens them."""
    datasets = {
        name: TokenDataset(source.path, vocab_size=run.model.vocab_size)
        for name, source in run.data.sources.items()
    }
    return Mixture(
        datasets,
        run.stages[0].weights,
        seed=run.seed,
        block_tokens=run.data.block_tokens,
        lanes=run.data.lanes,
        exhausted=run.data.exhausted,
    )


def steps_of(run: RunConfig, mixture: Mixture) -> Iterator[Step]:
    """Every step from the beginning, planned and not read."""
    if run.start is not None and run.start.take == "all":
        raise DataError(
            f"start.checkpoint={run.start.checkpoint} gave this run its cursors, so its order does "
            "not begin at the beginning. Look at the run it branched off."
        )
    plan = run.stage_plan
    state = mixture.start()
    tokens = 0
    number = 0
    while not plan.finished(tokens):
        point = plan.at(tokens)
        if point.step_in_stage == 0:
            state = mixture.reweight(state, point.stage.weights)
        plans, state = mixture.plan_step(state, point.length, point.rows)
        tokens += point.batch_tokens
        number += 1
        yield Step(number, point, plans, state)


def find_step(run: RunConfig, mixture: Mixture, stage: str | None, step: int) -> Step:
    """Step `step` (from 1) of a stage by name, or of the run."""
    names = [item.name for item in run.stages]
    if stage is not None and stage not in names:
        raise DataError(f"--stage={stage} is not a stage of the run ({', '.join(names)}).")
    last = 0
    for found in steps_of(run, mixture):
        if stage is not None and found.point.stage.name != stage:
            continue
        last = found.number if stage is None else found.point.step_in_stage + 1
        if last == step:
            return found
    raise DataError(
        f"--step={step} is not a step of {'the run' if stage is None else stage} (1 to {last})."
    )


def audit(directory: str | Path) -> Audit:
    """Recomputes what the ledger's steps have read; raises DataError at the first disagreement."""
    run = load_run(directory)
    ledger = read_steps(Path(directory) / LEDGER)
    mixture = open_mixture(run)
    _check_files(Path(directory), mixture)
    state = mixture.start()
    rows = hashlib.sha256()
    seen = {name: hashlib.sha256() for name in mixture.datasets}
    after: list[str] = []
    for step in steps_of(run, mixture) if ledger else ():
        line = ledger.get(step.number)
        if line is None:
            raise DataError(f"{directory}/{LEDGER} has no step {step.number} (of {max(ledger)}).")
        state = step.state
        crc = cursor_crc(state)
        for what, found, expected in (
            ("cursor_crc", line.get("cursor_crc"), crc),
            ("source_tokens", line.get("source_tokens"), mixture.source_tokens(state)),
            ("length", line.get("length"), step.point.length),
        ):
            if found != expected:
                raise DataError(
                    f"{directory}/{LEDGER} step {step.number}: {what}={found} is not what this "
                    f"config and these files give ({expected}). The data or the config changed."
                )
        for plan in step.plans:
            for start, size in plan.spans:
                raw = struct.pack("<qq", start, size)
                rows.update(plan.source.encode() + b"\0" + raw)
                seen[plan.source].update(raw)
        after.append(rows.hexdigest())
        if step.number == max(ledger):
            break
    return Audit(
        run=str(directory),
        steps=len(after),
        tokens=mixture.source_tokens(state) if after else {},
        epochs=mixture.epochs(state) if after else {},
        fingerprints={name: data.fingerprint for name, data in mixture.datasets.items()},
        seen={name: digest.hexdigest() for name, digest in seen.items()},
        rows=rows.hexdigest(),
        after=after,
    )


def _check_files(directory: Path, mixture: Mixture) -> None:
    """The files must be those that the run's checkpoints name."""
    for path in sorted(directory.glob("checkpoints/*/manifest.json")):
        try:
            sources = json.loads(path.read_bytes())["train_state"]["data"]["sources"]
            kept = {name: source["fingerprint"] for name, source in sources.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a checkpoint without a mixture's state, or none at all, proves nothing here
        for name, fingerprint in kept.items():
            dataset = mixture.datasets.get(name)
            if dataset is not None and dataset.fingerprint != fingerprint:
                raise DataError(
                    f"data.sources.{name} at {dataset.path} has manifest "
                    f"{dataset.fingerprint[:12]}, not {fingerprint[:12]} as {path.parent} says. "
                    "Name the files that the run has read."
                )


def first_difference(first: Audit, second: Audit) -> int | None:
    """The first step after which two runs have not read the same; None while both go on alike."""
    if {n: first.fingerprints[n] for n in first.tokens} != {
        n: second.fingerprints.get(n) for n in second.tokens
    }:
        return 1
    for number, (ours, theirs) in enumerate(zip(first.after, second.after, strict=False), 1):
        if ours != theirs:
            return number
    return None


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """The ledger's steps by number, as the last attempt left them."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Name a run's folder.") from None
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), 1):
        try:
            value = json.loads(line)
            step = int(value["step"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} line {number} is no line of a ledger (damaged).") from None
        if value.get("kind") == "step":
            steps[step] = value
        elif value.get("event") in BEGINNINGS:
            steps = {done: kept for done, kept in steps.items() if done <= step}
    return steps
