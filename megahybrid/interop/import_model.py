"""`megahybrid import`: a Hugging Face folder becomes a checkpoint that a run can start from."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from megahybrid.checkpoint.fingerprint import NO_FACTS, model_fingerprint
from megahybrid.checkpoint.fragments import Fragment, whole
from megahybrid.checkpoint.names import published_path
from megahybrid.checkpoint.reader import Reader
from megahybrid.checkpoint.writer import Snapshot, save
from megahybrid.config import RunConfig, counting, load, parse
from megahybrid.config.base import dump, dump_yaml
from megahybrid.config.explain import show
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.packaged import located
from megahybrid.data.dataset import TokenDataset
from megahybrid.errors import EXIT_DONE, ConfigError, InteropError, MegahybridError
from megahybrid.evaluate.loss import HeldOutLoss
from megahybrid.evaluate.progress import EvaluationProgress
from megahybrid.evaluate.table import position_table
from megahybrid.interop import surgery
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.table import ARCHITECTURES, Table, of_model_type
from megahybrid.interop.architectures.tensor_names import TensorName
from megahybrid.interop.export import require_transformers
from megahybrid.interop.hf_weights import Band, ForeignWeights, LargestValues, check_tensors
from megahybrid.interop.logit_proof import our_model, proof_in_words, prove, quiet
from megahybrid.interop.model_card import scheme_in_words
from megahybrid.interop.publish import published
from megahybrid.interop.shards import row_bands
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.state import TrainState
from megahybrid.train.validation import HeldOutSets, evaluation_loss

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
NEW_LENGTH = 4096  # of the rows of a run file that is written here, at most


def import_model(
    folder: Path,
    run_file: Path,
    out: Path | None = None,
    *,
    plan_file: Path | None = None,
    data: Path | None = None,
    table: Table = ARCHITECTURES,
) -> int:
    """Write `out`, a run's folder with one checkpoint of step 0, and print what it holds. Left out,
    it is what `run_file` starts from, or a folder beside the run's own.

    `run_file` must describe the same model; where it does not exist it is written. `plan_file`
    names another layer plan for the same weights; with `data`, a dataset, loss by position is
    printed before and after. Raises MegahybridError, one line, and leaves nothing behind, where a
    field is not supported, a tensor is missing or the logits differ.
    """
    require_transformers()
    config = _config(folder)
    architecture, model = _from_hf_config(folder, config, table)
    model = target = architecture.with_tensors(model, LargestValues(folder))
    if plan_file is not None:
        plan = surgery.read_plan(plan_file, model)
        changed = surgery.changes(model.layer_plan, plan)
        target = model.model_copy(update={"layer_plan": plan})
    is_new = not located(run_file).exists()
    out = out or _place(run_file)
    run = _new_run(folder, out, target, config) if is_new else _known_run(run_file, model, target)
    print(f"{folder}: {architecture.name}ForCausalLM, {counting.parameters(model):,} parameters")
    print("\n".join(_plan_in_words(model.layer_plan)))
    needed = counting.parameters(model) * 4
    with ForeignWeights(folder) as weights, published(out, needed) as place:
        names = check_tensors(weights, model, model.layer_plan, architecture)
        _save(place, weights, names, run, model)
        _take_tokenizer(folder, place)
        checkpoint = published_path(place, 0)
        rows = prove(model, model.layer_plan, checkpoint, folder, architecture=architecture)
        print("\n".join(proof_in_words(rows)))
        if plan_file is not None:
            print("\n".join(surgery.in_words(changed)))
            if data is not None:
                _print_losses(run, checkpoint, model.layer_plan, target.layer_plan, data)
    if is_new:
        start = {"checkpoint": str(out), "take": "weights"}
        _write_run(run_file, parse(RunConfig, dump(run) | {"start": start}))
        print(f"wrote {run_file}: name your data in it")
    print(f"published {out}: start: {{checkpoint: {out}, take: weights}}")
    return EXIT_DONE


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InteropError(
            f"{folder} has no config.json. Name a folder on this disk; nothing is downloaded."
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever a foreign file makes the library raise
        words = " ".join(str(error).split())[:200]
        raise InteropError(f"{folder}/config.json cannot be read ({words}).") from None


def _place(run_file: Path) -> Path:
    """Return the folder of an import that the user gave no name."""
    start = load(run_file).start if located(run_file).exists() else None
    return Path(start.checkpoint if start is not None else f"runs/{run_file.stem}-imported")


def _from_hf_config(folder: Path, config: Any, table: Table) -> tuple[Architecture, ModelConfig]:
    try:
        architecture = of_model_type(config.model_type, table)
        return architecture, architecture.from_config(config)
    except MegahybridError:
        raise
    except Exception as error:  # a foreign file may hold anything where a number is wanted
        words = " ".join(str(error).split())[:200]
        raise InteropError(
            f"{folder}/config.json describes no model ({type(error).__name__}: {words})."
        ) from None


def _known_run(run_file: Path, model: ModelConfig, target: ModelConfig) -> RunConfig:
    """Return the run file if its model is this one. Raises ConfigError, a line per difference."""
    run = load(run_file)
    lines = [
        f"model.{name}={show(getattr(run.model, name))} is not the source's "
        f"({show(getattr(model, name))}). Set it to that."
        for name in ModelConfig.model_fields
        if name not in NO_FACTS and getattr(run.model, name) != getattr(model, name)
    ]
    known = run.model.layer_plan.expand()
    for plan in (target.layer_plan, model.layer_plan):
        if known == plan.expand():
            break
    else:
        lines.append(_plan_difference(known, model.layer_plan, run_file))
    if lines:
        raise ConfigError(*lines)
    return parse(RunConfig, dump(run) | {"model": dump(target), "start": None})


def _plan_difference(known: tuple[Any, ...], plan: LayerPlan, run_file: Path) -> str:
    schemes = plan.expand()
    if len(known) != len(schemes):
        return (
            f"model.layer_plan.num_layers={len(known)} is not the source's ({len(schemes)}). "
            "Set it to that."
        )
    layer = next(i for i, (a, b) in enumerate(zip(known, schemes, strict=True)) if a != b)
    return (
        f"model.layer_plan: layer {layer} is {scheme_in_words(known[layer])}, the source's is "
        f"{scheme_in_words(schemes[layer])}. Correct it, or mean it with --plan {run_file}."
    )


def _tokenizer_of(folder: Path) -> str | None:
    """Return the name of a folder's tokenizer that a run can read, None without one."""
    return next((name for name in TOKENIZERS if (folder / name).is_file()), None)


def _take_tokenizer(folder: Path, place: Path) -> None:
    """Copy the tokenizer into an import, so that the run and its exports need the source no
    more."""
    name = _tokenizer_of(folder)
    if name is None:
        return
    try:
        shutil.copyfile(folder / name, place / name)
    except OSError as error:
        raise InteropError(f"{folder / name} cannot be copied ({error.strerror}).") from None


def _new_run(folder: Path, out: Path, model: ModelConfig, config: Any) -> RunConfig:
    """Return a run that could train the model on, with places for the user's data; its tokenizer is
    the import's own."""
    length = min(NEW_LENGTH, config.max_position_embeddings)
    data: dict[str, Any] = {"sources": {"text": {"path": "data/text"}}, "block_tokens": 2**20}
    tokenizer = _tokenizer_of(folder)
    if tokenizer is not None:
        data["tokenizer"] = str(out / tokenizer)
    stage = {
        "name": "continue",
        "tokens": 1_000_000_000,
        "lengths": {length: 1},
        "batch_tokens": 64 * length,
        "micro_batch_tokens": length,
        "weights": {"text": 1},
        "learning_rate": {
            "kind": "linear",
            "start": 1e-5,
            "end": 1e-6,
            "warmup_tokens": 10_000_000,
        },
    }
    fields = {"model": dump(model), "data": data, "stages": [stage]}
    return parse(RunConfig, fields | {"precision": _precision(folder)})


def _precision(folder: Path) -> str:
    """Return the precision of a run that goes on with a folder's weights: fp32 where all of them
    are, else bf16, because weights of 16 bits were not trained in more."""
    with ForeignWeights(folder) as weights:
        kinds = {weights.dtype(name) for name in weights.names()}
    return "fp32" if kinds <= {"F32", "F64"} else "bf16"


def _write_run(path: Path, run: RunConfig) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_yaml(run, defaults=False), encoding="utf-8")
    except OSError as error:
        raise InteropError(f"{path} cannot be written ({error.strerror}).") from None


def _plan_in_words(plan: LayerPlan) -> list[str]:
    same = [surgery.Change(i, s, s, None, "") for i, s in enumerate(plan.expand())]
    return [line.removesuffix(": unchanged, exact") for line in surgery.in_words(same)]


def _save(
    place: Path,
    weights: ForeignWeights,
    names: list[TensorName],
    run: RunConfig,
    model: ModelConfig,
) -> None:
    tensors = {name.ours: name.shape for name in names if name.ours is not None}
    result = save(
        place,
        Snapshot(
            step=0,
            tokens=0,
            optimizer_step=0,
            model_fingerprint=model_fingerprint(run.model),
            tensors=tensors,
            fragments=list(_fragments(weights, names, model.head_dim)),
            train_state=TrainState().to_json(),
            config=run.model_dump(mode="json"),
            states=("weight",),
        ),
        keep_last=1,
    )
    if not result.ok:
        raise InteropError(f"the checkpoint cannot be written ({result.error}).")


def _fragments(
    weights: ForeignWeights, names: list[TensorName], head_dim: int
) -> Iterator[Fragment]:
    """Yield bands of rows that are read one by one while they are written."""
    for name in names:
        if name.ours is None:
            continue
        row = math.prod(name.shape[1:])
        for start, stop in row_bands(name, head_dim):
            data = Band(weights, name, start, stop, head_dim)
            flat = (start * row, stop * row)
            yield Fragment(name.ours, "weight", whole(name.shape), flat, data)


def _print_losses(
    run: RunConfig, checkpoint: Path, before: LayerPlan, after: LayerPlan, data: Path
) -> None:
    """Print the loss by position of the same weights under both plans."""
    mesh = ParallelMesh.single("cpu")
    dataset = TokenDataset(data, vocab_size=run.model.vocab_size)
    rows = max(length for stage in run.stages for length in stage.lengths)
    there = max((size for _, size in dataset.document_spans()), default=1)
    longest = min(rows, there)
    scored = HeldOutSets(run, mesh, sets={data.name: dataset}, longest=longest)
    # Both columns are of the same documents, so short ones may count as well.
    scored.min_tokens = 1
    found: dict[str, HeldOutLoss] = {}
    work = 2 * scored.work(longest, "documents")
    with Reader(checkpoint) as reader, EvaluationProgress("scoring", work) as progress:
        scored.advance = progress.advance
        for when, plan in (("before", before), ("after", after)):

            def keep(name: str, score: HeldOutLoss, rows: str, when: str = when) -> None:
                found[when] = score

            scored.score_far(evaluation_loss(our_model(run.model, plan, reader)), keep)
    console = Console(highlight=False)
    console.print("\nLoss by position in the document, before anything is learned")
    console.print(position_table(found, longest))
