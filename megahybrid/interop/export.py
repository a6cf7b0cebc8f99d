"""`megahybrid export`: a checkpoint as a folder for transformers, run before it counts."""

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch

from megahybrid import __version__
from megahybrid.checkpoint import durable
from megahybrid.checkpoint.manifest import Manifest
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.config import RunConfig, counting
from megahybrid.config.attention import Rope
from megahybrid.config.base import did_you_mean
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.errors import EXIT_DONE, ConfigError, InteropError
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.rope import rope_parameters
from megahybrid.interop.architectures.table import (
    ARCHITECTURES,
    Table,
    by_name,
    huggingface_fits,
)
from megahybrid.interop.chat_template import write_template
from megahybrid.interop.logit_proof import Row, proof_in_words, prove, quiet
from megahybrid.interop.model_card import evaluations_of, model_card
from megahybrid.interop.publish import published
from megahybrid.interop.read_back import check_dtype, check_fields_as_read, check_files
from megahybrid.interop.rotation_bits import frequencies, their_frequencies
from megahybrid.interop.shards import (
    DTYPES,
    SHARD_BYTES,
    exact_dtype,
    out_tensors,
    write_shards,
)
from megahybrid.interop.tokenizer import write_tokenizer
from megahybrid.train.restore import checkpoint_of, plan_of, run_of


@dataclass(frozen=True)
class Source:
    """A checkpoint and its run; the plan is that of the stage in which it was written."""

    folder: Path
    manifest: Manifest
    run: RunConfig
    plan: LayerPlan
    stage: str

    @property
    def max_length(self) -> int:
        """The longest rows that the model was trained on, in tokens."""
        return self.run.longest_rows(self.manifest.tokens)


def open_source(path: Path) -> Source:
    """The checkpoint at `path`, or a run's newest one, every byte of it verified."""
    folder = checkpoint_of(path)
    if folder == path:
        verify(folder)
    with Reader(folder) as reader:
        run, manifest = run_of(reader), reader.manifest
    point = run.stage_plan.at(max(0, manifest.tokens - 1))
    return Source(folder, manifest, run, plan_of(run, manifest, folder), point.stage.name)


def export(
    path: Path,
    out: Path,
    *,
    dtype: str | None = None,
    architecture: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    table: Table = ARCHITECTURES,
) -> int:
    """Write `out` from a checkpoint, load it with transformers, compare, and only then name it.

    `dtype` is fp32 or bf16; left out, the one that rounds no weight. `tokenizer` is a file, or
    "none"; the run's own when left out. `chat_template` is a shipped one or a file, for a model
    that answers. Raises MegahybridError, one line, and leaves nothing
    behind, where no class supports the plan or the logits differ.
    """
    require_transformers()
    source = open_source(path)
    chosen = choose(source.run.model, source.plan, architecture, table)
    dtype = dtype or _exact_dtype(source, chosen)
    print(f"{source.folder} as {chosen.name}ForCausalLM, {dtype}")
    with published(out, _bytes(source, dtype)) as folder:
        ids = write_tokenizer(folder, source.run, tokenizer)
        ends: int | list[int] | None = ids.eod_id
        if chat_template is not None:
            chat = write_template(folder, chat_template, tokenizer or source.run.data.tokenizer)
            ids = replace(ids, words=(*ids.words, *chat.words))
            # The end of a turn ends an answer as well as the end of a document does.
            ends = list(dict.fromkeys([chat.end_id, chat.eod_id]))
        files = _config_files(source, chosen, dtype, ends)
        for name, text in files.items():
            _write(folder / name, text)
        rows = _write_weights(folder, source, chosen, dtype, shard_bytes)
        check_files(folder, files)
        meant = {"max_position_embeddings": source.max_length, "eos_token_id": ends}
        with quiet():
            check_fields_as_read(folder, meant, trust_code=bool(chosen.code_files))
        card = model_card(
            source.run,
            source.plan,
            source.manifest,
            chosen,
            dtype,
            rows,
            ids,
            counting.parameters(source.run.model),
            evaluations_of(source.folder, source.manifest.step),
            chats=chat_template is not None,
        )
        _write(folder / "README.md", card)
    print("\n".join([*proof_in_words(rows), *ids.words, f"published {out}"]))
    return EXIT_DONE


def require_transformers() -> None:
    """Raise InteropError where transformers is not installed: what is not run is not published."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise InteropError(
            "transformers is not installed, and a model is run by it before it counts. "
            "Run `pip install 'megahybrid[huggingface]'`."
        ) from None


def choose(
    model: ModelConfig, plan: LayerPlan, wanted: str | None, table: Table = ARCHITECTURES
) -> Architecture:
    """Return the class to export as. Raises ConfigError with what `wanted` does not support."""
    if any(scheme.reach is not None and scheme.reach < 2 for scheme in plan.schemes.values()):
        raise ConfigError(
            "model.layer_plan has a window of 1 key, for which the cache of transformers is wrong. "
            "Use a window of 2 or more."
        )
    reasons = refusals(model, plan, table)
    schemes = plan.expand()
    able = [by_name(name, table) for name in reasons if not reasons[name]]
    able.sort(key=lambda one: (bool(one.code_files), one.export_rank(schemes)))
    if wanted is None and able:
        return able[0]
    known = {name.lower(): name for name in reasons}
    if wanted is None:
        raise ConfigError(
            "no class supports this model: "
            + "; ".join(f"{name}: {' and '.join(some)}" for name, some in reasons.items())
        )
    if wanted.lower() not in known:
        raise ConfigError(
            f"--architecture={wanted} is none of {', '.join(reasons)}."
            f"{did_you_mean(wanted, reasons)}"
        )
    name = known[wanted.lower()]
    if reasons[name]:
        way_out = f" Use {' or '.join(one.name for one in able)}." if able else ""
        raise ConfigError(
            f"--architecture={name} does not support this model: {'; '.join(reasons[name])}."
            f"{way_out}"
        )
    return by_name(name, table)


def refusals(model: ModelConfig, plan: LayerPlan, table: Table) -> dict[str, list[str]]:
    """Return the reasons against each class by its name, the class with code of ours last."""
    inexact = inexact_rotations(plan, model.head_dim)
    fits = huggingface_fits(model, plan, table)
    own = [one.fit(model, plan) for one in table if one.code_files]
    return {fit.architecture: [*fit.reasons, *inexact] for fit in fits} | {
        fit.architecture: list(fit.reasons) for fit in own
    }


def inexact_rotations(plan: LayerPlan, head_dim: int) -> list[str]:
    """Return the reasons against every class of transformers: partial rotations whose frequencies
    it rounds otherwise.

    `proportional` reaches them by another theta, which is exact in real numbers only.
    """
    reasons = []
    for name, scheme in plan.schemes.items():
        position = scheme.position
        if not isinstance(position, Rope) or position.rotary_fraction == 1:
            continue
        if position.scaling is None or position.spectrum == "head":
            ours = frequencies(position, head_dim)
            try:
                fields = rope_parameters(position, head_dim)
            except InteropError:  # a scaling that no class has there, which each says itself
                continue
            theirs = their_frequencies(
                fields["rope_theta"], len(ours), head_dim, fields.get("factor", 1.0)
            )
            if not torch.equal(ours, theirs):
                reasons.append(f"the frequencies of its partial rotations are not {name}'s bits")
    return reasons


def _exact_dtype(source: Source, architecture: Architecture) -> str:
    # A constant of the class, such as its sinks at -1e9, is no weight that could be rounded.
    names = [
        name
        for name in architecture.tensor_names(source.run.model, source.plan)
        if name.ours is not None
    ]
    with Reader(source.folder) as reader:
        return exact_dtype(out_tensors(reader, names, source.run.model.head_dim))


def _bytes(source: Source, dtype: str) -> int:
    return counting.parameters(source.run.model) * DTYPES[dtype][2]


def _write(path: Path, text: str) -> None:
    durable.write(path, [memoryview(text.encode())])


def _config_files(
    source: Source,
    architecture: Architecture,
    dtype: str,
    ends: int | list[int] | None,
) -> dict[str, str]:
    """Return the text of each JSON file, and of the code where it goes along."""
    import transformers

    fields = architecture.to_config(source.run.model, source.plan, source.max_length)
    fields |= {
        "bos_token_id": None,
        "eos_token_id": ends,
        "pad_token_id": None,
        "dtype": str(DTYPES[dtype][1]).removeprefix("torch."),
        "transformers_version": transformers.__version__,
        "megahybrid_version": __version__,
    }
    generation = {"transformers_version": transformers.__version__, "eos_token_id": ends}
    files = {
        "config.json": json.dumps(fields, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    code = resources.files("megahybrid.interop.remote_code")
    for name in architecture.code_files:
        files[name] = (code / name).read_text(encoding="utf-8")
    return files


def _write_weights(
    folder: Path, source: Source, architecture: Architecture, dtype: str, shard_bytes: int
) -> list[Row]:
    model, plan = source.run.model, source.plan
    names = list(architecture.tensor_names(model, plan))
    with Reader(source.folder) as reader:
        write_shards(folder, out_tensors(reader, names, model.head_dim), dtype, shard_bytes)
    check_dtype(folder, dtype)
    return prove(
        model, plan, source.folder, folder, architecture=architecture, dtype=DTYPES[dtype][1]
    )
