"""What a run reads, recomputed from its config: one step for the eye, or the whole run as proof.

The order is a function of config and files, so nothing of the run is needed but its config; its
ledger is what the recomputed order is compared with.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.config import RunConfig, load
from megahybrid.config.stages import StagePoint
from megahybrid.data.mixture import Mixture, RowPlan, State, cursor_crc, open_mixture
from megahybrid.data.read_files import refuse_other_files
from megahybrid.errors import DataError
from megahybrid.ledger import (
    LEDGER_NAME,
    Ledger,
    RewindEvent,
    RunFacts,
    StepLine,
    read_ledger,
)


@dataclass(frozen=True)
class Step:
    """One step of a run. state: of the mixture, after it; `number` counts steps done, from 1."""

    number: int
    point: StagePoint
    plans: list[RowPlan]
    state: State


@dataclass(frozen=True)
class Audit:
    """The tokens that a run has seen, from `first_step` on. seen: sha256 over first token and
    length of every span served of a source, in order; by_step: the same for a step, with its
    sources; rows: of all steps together."""

    run: str
    steps: int
    first_step: int
    tokens: dict[str, int]
    targets: dict[str, int]
    epochs: dict[str, float]
    fingerprints: dict[str, str]
    seen: dict[str, str]
    rows: str
    by_step: dict[int, bytes]


def load_run(path: str | Path) -> RunConfig:
    """A run file, or the config kept in a run's folder."""
    found = Path(path)
    if found.is_dir():
        found = found / "config.yaml"
        if not found.exists():
            raise DataError(f"{path} is no run: it has no config.yaml. Name a run's folder.")
    return load(found)


@dataclass(frozen=True)
class Place:
    """The place of a run after `step` steps: what a checkpoint or its beginning knows of it."""

    step: int
    tokens: int
    state: State


def places_of(run: RunConfig, mixture: Mixture, directory: Path | None) -> list[Place]:
    """Places that need no recomputing, ascending: the run's beginning, and its checkpoints.

    Without its beginning where that is another run's checkpoint which is gone. Raises DataError
    when there is none at all.
    """
    found: dict[int, Place] = {}
    for path in sorted(directory.glob("checkpoints/step-*/manifest.json")) if directory else ():
        if (saved := _train_state(path)) is not None and saved["data"]:
            state = mixture.restore(saved["data"])
            found[saved["step"]] = Place(saved["step"], saved["tokens"], state)
    if run.start is None or run.start.take == "weights":
        found[0] = Place(0, 0, mixture.start())
    elif parent := _train_state(_parent(run, directory) / "manifest.json"):
        state = mixture.carried(parent["data"])
        found[parent["step"]] = Place(parent["step"], parent["tokens"], state)
    if not found:
        raise DataError(
            f"start.checkpoint={run.start.checkpoint if run.start else None} gave this run its "
            "cursors and is gone, and the run has no checkpoint of its own. Look at the run it "
            "branched off."
        )
    return [found[step] for step in sorted(found)]


def _parent(run: RunConfig, directory: Path | None) -> Path:
    """The checkpoint that a branch began from: the one its ledger names, else its config's."""
    assert run.start is not None
    if directory is not None and (directory / LEDGER_NAME).exists():
        ledger = directory / LEDGER_NAME
        for _, begins in read_ledger(ledger).of(RunFacts):
            try:
                parent = begins.branched_from()
            except ValueError as error:
                raise DataError(f"{ledger} is damaged ({error}). Restore the file.") from None
            if parent is not None:
                return Path(parent.checkpoint)
    given = Path(run.start.checkpoint)
    own = sorted(given.glob("checkpoints/step-*/manifest.json"))
    return own[-1].parent if own else given


def _train_state(path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint's manifest keeps of training; None where there is none to read."""
    try:
        saved = json.loads(path.read_bytes())["train_state"]
        return {name: saved[name] for name in ("step", "tokens", "data")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def steps_of(
    run: RunConfig,
    mixture: Mixture,
    place: Place | None = None,
    rewinds: Mapping[int, State] | None = None,
) -> Iterator[Step]:
    """Every step after `place` (default: the beginning), planned and not read.

    rewinds: cursors that the run went on from instead of its own, after the step they stand at.
    """
    place = place or Place(0, 0, mixture.start())
    plan, tokens, number, state = run.stage_plan, place.tokens, place.step, place.state
    while not plan.finished(tokens):
        if rewinds and number in rewinds:
            state = mixture.restore(rewinds[number])
        point = plan.at(tokens)
        state = mixture.reweight(state, point.stage.weights)
        plans, state = mixture.plan_step(state, point.length, point.rows)
        tokens += point.batch_tokens
        number += 1
        yield Step(number, point, plans, state)


def rewinds_of(ledger: Ledger) -> dict[int, State]:
    """The cursors that a run went on from after a spike, by the step it went back to."""
    return {line.step: rewind.data for line, rewind in ledger.of(RewindEvent) if rewind.data}


def find_step(
    run: RunConfig, mixture: Mixture, stage: str | None, step: int, directory: Path | None = None
) -> Step:
    """Step `step` (from 1) of a stage by name, or of the run; from the nearest place before it."""
    names = [item.name for item in run.stages]
    if stage is not None and stage not in names:
        raise DataError(f"--stage={stage} is not a stage of the run ({', '.join(names)}).")
    places = places_of(run, mixture, directory)
    number, tokens = places[0].step, places[0].tokens
    first = last = 0
    plan = run.stage_plan
    while not plan.finished(tokens):
        point = plan.at(tokens)
        tokens += point.batch_tokens
        number += 1
        if stage is None or point.stage.name == stage:
            last = number if stage is None else point.step_in_stage + 1
            first = first or last
            if last == step:
                break
    else:
        raise DataError(
            f"--step={step} is not a step of {'the run' if stage is None else stage} "
            f"({first} to {last})."
        )
    ledger = directory / LEDGER_NAME if directory else None
    rewinds = rewinds_of(read_ledger(ledger)) if ledger and ledger.exists() else {}
    place = max((item for item in places if item.step < number), key=lambda item: item.step)
    return next(item for item in steps_of(run, mixture, place, rewinds) if item.number == number)


def audit(directory: str | Path) -> Audit:
    """Recomputes what the ledger's steps have read; raises DataError at the first disagreement."""
    run = load_run(directory)
    ledger = read_ledger(Path(directory) / LEDGER_NAME)
    lines = {line.step: line for line in ledger.steps}
    mixture = open_mixture(run)
    _check_files(Path(directory), mixture)
    place = places_of(run, mixture, Path(directory))[0]
    state = place.state
    rows = hashlib.sha256()
    seen = {name: hashlib.sha256() for name in mixture.datasets}
    by_step: dict[int, bytes] = {}
    for step in steps_of(run, mixture, place, rewinds_of(ledger)) if lines else ():
        line = lines.get(step.number)
        if line is None:
            raise DataError(f"{directory}/{LEDGER_NAME} has no step {step.number}.")
        state = step.state
        crc = cursor_crc(state)
        for what, found, expected in (
            ("cursor_crc", line.cursor_crc, crc),
            ("source_tokens", line.source_tokens, mixture.source_tokens(state)),
            ("length", line.length, step.point.length),
            ("source_targets", line.source_targets, _told(mixture.source_targets(state), line)),
        ):
            if found != expected:
                raise DataError(
                    f"{directory}/{LEDGER_NAME} step {step.number}: {what}={found} is not what "
                    f"this config and these files give ({expected}). The data or the config "
                    "changed."
                )
        whole = hashlib.blake2b(digest_size=16)
        for plan in step.plans:
            for start, size in plan.spans:
                raw = struct.pack("<qq", start, size)
                whole.update(plan.source.encode() + b"\0" + raw)
                seen[plan.source].update(raw)
        by_step[step.number] = whole.digest()
        rows.update(whole.digest())
        if step.number >= max(lines):
            break
    return Audit(
        run=str(directory),
        steps=len(by_step),
        first_step=place.step + 1,
        tokens=mixture.source_tokens(state) if by_step else {},
        targets=mixture.source_targets(state) if by_step else {},
        epochs=mixture.epochs(state) if by_step else {},
        # Of a source with plans, those of its dataset: spans are tokens of that, whatever the plan.
        fingerprints={name: data.fingerprint for name, data in mixture.datasets.items()},
        seen={name: digest.hexdigest() for name, digest in seen.items()},
        rows=rows.hexdigest(),
        by_step=by_step,
    )


def _told(targets: dict[str, int], line: StepLine) -> dict[str, int]:
    """The counts of the sources that a ledger's line has: an attempt that goes on from a checkpoint
    of an older version tells none of what that had begun to read."""
    return {name: found for name, found in targets.items() if name in line.source_targets}


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
            if dataset is not None:
                found = mixture.fingerprint(name)
                says = (f"as {path.parent} says", "Name the files that the run has read")
                refuse_other_files(name, dataset.path, fingerprint, found, says)


def first_difference(first: Audit, second: Audit) -> int | None:
    """The first step that two runs both have and have not read the same in; None for none."""
    common = sorted(first.by_step.keys() & second.by_step.keys())
    if common and {n: first.fingerprints[n] for n in first.tokens} != {
        n: second.fingerprints.get(n) for n in second.tokens
    }:
        return common[0]
    return next((n for n in common if first.by_step[n] != second.by_step[n]), None)


def epochs_in_words(epochs: Mapping[str, float], name: str) -> str:
    """ "0.1234", or "8192: 0.1234, 65536: 0.0412" of a source with plans by length."""
    if name in epochs:
        return f"{epochs[name]:.4f}"
    start = f"{name}.plans."
    found = {key.removeprefix(start): n for key, n in epochs.items() if key.startswith(start)}
    return ", ".join(f"{length}: {n:.4f}" for length, n in found.items()) or "0.0000"
