"""`megahybrid export`: a checkpoint as a folder for transformers, run before it counts."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megahybrid import __version__
from megahybrid.checkpoint import durable
from megahybrid.checkpoint.manifest import Manifest
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.config import RunConfig, counting
from megahybrid.config.attention import LayerPlan
from megahybrid.config.base import did_you_mean
from megahybrid.config.huggingface_fit import huggingface_fits
from megahybrid.config.model import ModelConfig
from megahybrid.errors import EXIT_DONE, ConfigError, InteropError
from megahybrid.interop.logit_proof import Row, proof_in_words, prove
from megahybrid.interop.model_card import evaluations_of, model_card
from megahybrid.interop.names import OWN, tensor_names
from megahybrid.interop.publish import published
from megahybrid.interop.read_back import check_dtype, check_files, check_told
from megahybrid.interop.said import MODEL_TYPES, config_fields, inexact_rotations
from megahybrid.interop.shards import DTYPES, SHARD_BYTES, out_tensors, write_shards
from megahybrid.interop.tokenizer import write_tokenizer
from megahybrid.train.restore import checkpoint_of, plan_of, run_of

CODE_FILES = ("cache_megahybrid.py", "configuration_megahybrid.py", "modeling_megahybrid.py")
# Where several classes can say a model: the one that the most programs read. GraniteSWA has sinks
# to be switched off, so it is the last.
PREFERRED = ("Cohere", "Cohere2", "Llama", "SmolLM3", "Qwen3", "Exaone4", "Olmo3", "GraniteSWA")


@dataclass(frozen=True)
class Source:
    """A checkpoint and what it says of its model; the plan is of the stage it was written in."""

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
    dtype: str = "fp32",
    architecture: str | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write `out` from a checkpoint, load it with transformers, compare, and only then name it.

    `tokenizer` is a file, or "none"; the run's own when left out. Raises MegahybridError, one
    line, and leaves nothing behind, where the plan cannot be said or the logits differ.
    """
    require_transformers()
    source = open_source(path)
    chosen = choose(source.run.model, source.plan, architecture)
    print(f"{source.folder} as {chosen}ForCausalLM, {dtype}")
    with published(out, _bytes(source, dtype)) as folder:
        ids = write_tokenizer(folder, source.run, tokenizer)
        files = _config_files(source, chosen, dtype, ids.eod_id)
        for name, text in files.items():
            _write(folder / name, text)
        rows = _write_weights(folder, source, chosen, dtype, shard_bytes)
        check_files(folder, files)
        told = {"max_position_embeddings": source.max_length, "eos_token_id": ids.eod_id}
        check_told(folder, told, own=chosen == OWN)
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


def choose(model: ModelConfig, plan: LayerPlan, wanted: str | None) -> str:
    """The class to export as. Raises ConfigError with what `wanted` cannot say."""
    if any(scheme.window is not None and scheme.window < 2 for scheme in plan.schemes.values()):
        raise ConfigError(
            "model.layer_plan has a window of 1 key, for which the cache of transformers is wrong. "
            "Use a window of 2 or more."
        )
    inexact = inexact_rotations(plan, model.head_dim)
    reasons = {
        fit.architecture: [*fit.reasons, *inexact] for fit in huggingface_fits(model, plan)
    } | {OWN: []}
    able = sorted((n for n in reasons if n != OWN and not reasons[n]), key=PREFERRED.index)
    if all(scheme.position.kind == "nope" for scheme in plan.schemes.values()):
        # SmolLM3 has a word for it; Llama needs a rotation by nothing.
        able.sort(key=lambda name: name == "Llama")
    if wanted is None:
        return able[0] if able else OWN
    known = {name.lower(): name for name in reasons}
    if wanted.lower() not in known:
        raise ConfigError(
            f"--architecture={wanted} is none of {', '.join(reasons)}."
            f"{did_you_mean(wanted, reasons)}"
        )
    name = known[wanted.lower()]
    if reasons[name]:
        raise ConfigError(
            f"--architecture={name} cannot say this model: {'; '.join(reasons[name])}. "
            f"Use {' or '.join([*able, OWN])}."
        )
    return name


def _bytes(source: Source, dtype: str) -> int:
    return counting.parameters(source.run.model) * DTYPES[dtype][2]


def _write(path: Path, text: str) -> None:
    durable.write(path, [memoryview(text.encode())])


def _config_files(
    source: Source, architecture: str, dtype: str, eod_id: int | None
) -> dict[str, str]:
    """The text of each file that says what the weights are, and of the code where it goes along."""
    import transformers

    fields = config_fields(architecture, source.run.model, source.plan, source.max_length)
    fields |= {
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": None,
        "dtype": str(DTYPES[dtype][1]).removeprefix("torch."),
        "transformers_version": transformers.__version__,
        "megahybrid_version": __version__,
    }
    assert fields["model_type"] == MODEL_TYPES[architecture]
    generation = {"transformers_version": transformers.__version__, "eos_token_id": eod_id}
    files = {
        "config.json": json.dumps(fields, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    if architecture == OWN:
        code = resources.files("megahybrid.interop.remote_code")
        files |= {name: (code / name).read_text(encoding="utf-8") for name in CODE_FILES}
    return files


def _write_weights(
    folder: Path, source: Source, architecture: str, dtype: str, shard_bytes: int
) -> list[Row]:
    model, plan = source.run.model, source.plan
    names = list(tensor_names(model, plan, architecture))
    with Reader(source.folder) as reader:
        write_shards(folder, out_tensors(reader, names, model.head_dim), dtype, shard_bytes)
    check_dtype(folder, dtype)
    return prove(
        model, plan, source.folder, folder, own=architecture == OWN, dtype=DTYPES[dtype][1]
    )
