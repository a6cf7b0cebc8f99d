"""The page's sections, in the order in which a reader new to the run would ask."""

from collections.abc import Sequence
from typing import Any

from megahybrid.config.base import dump_yaml
from megahybrid.ledger import EndEvent, EventLine, GateEvent, StepLine
from megahybrid.report.answer_charts import by_length_parts, harness_parts, needle_parts
from megahybrid.report.attention_charts import attention_parts
from megahybrid.report.data_charts import data_parts
from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.gain_charts import gain_parts
from megahybrid.report.model_strip import strip_part
from megahybrid.report.over_time import suite_curves, telemetry_charts
from megahybrid.report.parts import Cell, Heading, Listing, Missing, Note, Part, Section, Table
from megahybrid.report.position_charts import position_parts
from megahybrid.report.record import RunRecord
from megahybrid.report.summary import duration, is_fault
from megahybrid.report.training_charts import stage_table, training_parts

Records = Sequence[RunRecord]


def sections(
    records: Records, results: Sequence[list[EvaluationFile]], every: Sequence[list[EvaluationFile]]
) -> list[Section]:
    """Draw everything that the runs have, with notes about what they lack. `results` are the newest
    results of each run, `every` all of them."""
    found = list(zip(records, results, strict=True))
    several = len(records) > 1
    plan = [part for record in records for part in strip_part(record, several)]
    return [
        Section(
            "model", "The model",
            "Each block is one layer; its colour is its kind. A local layer reads a sliding window "
            "of recent tokens, a global one the whole text. NoPE layers get no information about "
            "positions; RoPE layers get it as a rotation.", plan,
        ),
        Section(
            "training", "Training",
            "Everything is drawn over the tokens seen so far. Shaded bands are stages: stretches "
            "under one recipe, each usually with longer rows than the one before.",
            [*training_parts(records), stage_table(records)],
        ),
        Section(
            "position", "How far it sees",
            "If a model uses what stands far back, tokens deep in a document are easier to "
            "predict. A curve that turns up shows where its view ends.",
            [*gain_parts(records, results), *position_parts(records, results)],
        ),
        Section(
            "retrieval", "What it finds",
            "Questions whose answer stands somewhere in a long text: the harder proof that a "
            "distant token is not only seen but used.",
            [*needle_parts(found), *by_length_parts(found), *suite_curves(records, every),
             *harness_parts(found)],
        ),
        Section(
            "attention", "What its heads look at",
            "Attention weights of the question's and the answer's tokens, exact, averaged over "
            "examples. They sum to one for every token.",
            [*attention_parts(found), *telemetry_charts(records)],
        ),
        Section(
            "data", "What it was fed",
            "Counted from the steps that were taken, not from the recipe.", data_parts(records),
        ),
        Section(
            "faults", "Faults and restarts",
            "Every attempt at the run, and every event that is not the ordinary course of one, "
            "from the ledger; also those that a restart made void.",
            _fault_parts(records),
        ),
        Section(
            "environment", "Environment and config",
            "What it ran on, and the whole run file as it was resolved.",
            [part for record in records for part in _environment(record, several)],
        ),
    ]  # fmt: skip


def not_measured(all_sections: Sequence[Section]) -> list[Missing]:
    """Collect what the parts of the page lack."""
    return [part for section in all_sections for part in section.parts if isinstance(part, Missing)]


def _fault_parts(records: Records) -> list[Part]:
    attempts: list[list[Cell]] = []
    faults: list[list[Cell]] = []
    for record in records:
        lines = record.every_line
        for attempt in sorted({line.attempt for line in lines}):
            mine = [line for line in lines if line.attempt == attempt]
            events = [one for one in mine if isinstance(one, EventLine)]
            began = next((one for one in events if one.begins), mine[0])
            ends = [one.content for one in events if isinstance(one.content, EndEvent)]
            outcome = ends[-1].outcome if ends else None
            if outcome is None:
                last = attempt == lines[-1].attempt
                outcome = "running, or cut short" if last else "cut short"
            attempts.append([
                record.name, attempt, began.step, mine[-1].step,
                sum(isinstance(one, StepLine) for one in mine), outcome,
                duration(mine[-1].time_unix - mine[0].time_unix),
            ])  # fmt: skip
        for line in lines:
            if isinstance(line, EventLine) and is_fault(line):
                faults.append([
                    record.name, line.attempt, line.step, line.stage,
                    line.event.replace("_", " "), _detail(line.detail),
                ])  # fmt: skip
    head = ("run", "attempt", "from step", "to step", "steps taken", "outcome", "wall time")
    parts: list[Part] = [Table(head, attempts, "Attempts")]
    gates: list[list[Cell]] = [
        [
            record.name, line.stage, line.step, gate.gate, gate.value, gate.bound,
            "passed" if gate.ok else "not passed",
        ]
        for record in records for line, gate in record.ledger.of(GateEvent)
    ]  # fmt: skip
    if gates:
        columns = ("run", "stage", "step", "gate", "value", "asked", "verdict")
        parts.append(Table(columns, gates, "Gates"))
    if faults:
        names = ("run", "attempt", "step", "stage", "event", "detail")
        parts.append(Table(names, faults, "Events"))
    else:
        parts.append(Note("No update was skipped, nothing warned or failed."))
    return parts


def _detail(detail: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in detail.items() if isinstance(value, str | int | float)
    )


def _environment(record: RunRecord, several: bool) -> list[Part]:
    beginnings = [line for line in record.ledger.events if line.begins]
    facts = dict(beginnings[-1].detail) if beginnings else {}
    rows: list[list[Cell]] = [
        [name.replace("_", " "), value if isinstance(value, str | int | float) else _flat(value)]
        for name, value in facts.items()
    ]
    memory = [line.memory_gib for line in record.steps if line.memory_gib is not None]
    if memory:
        rows.append(["peak memory of rank 0, GiB", round(max(memory), 3)])
    rows.append(["folder", str(record.directory)])
    parts: list[Part] = [Heading(record.name)] if several else []
    parts.append(Table(("fact", "value"), rows, "" if several else "Environment"))
    if record.config:
        parts.append(Listing("The run file, complete", dump_yaml(record.config), folded=True))
    if record.samples:
        parts.append(Listing("A sample", record.samples.strip()))
    else:
        parts.append(
            Missing(
                f"a sample of its text ({record.name})", "the run's folder has no samples.txt",
                f'megahybrid sample {record.directory} --prompt "…" | '
                f"tee {record.directory}/samples.txt",
            )
        )  # fmt: skip
    return parts


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(one)}" for name, one in value.items())
    return str(value)
