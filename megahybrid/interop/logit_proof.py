"""The proof of an export or an import: both models run on the same tokens, their logits compared.

Before that every tensor of one is compared with the other's, bit for bit: few ids are drawn.
A long window is shrunk in both for the comparison, and so is a slow temperature: what is compared
is then the same code over the edge of a window, at lengths that a CPU can compute.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid.checkpoint.parameter_io import fill
from megahybrid.checkpoint.reader import Reader
from megahybrid.config import counting
from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import Llama4Scale, LogFromScale, PowerScale, ScoreScale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.tensor_names import HEAD, is_norm
from megahybrid.interop.generation import (
    CACHE_STEPS,
    FEW_NEW_TOKENS,
    NEW_TOKENS,
    cached_logits,
    generate_greedily,
)
from megahybrid.interop.hf_weights import ForeignWeights, check_tensors
from megahybrid.interop.layerwise import StreamedOurs, streamed_theirs
from megahybrid.interop.read_back import check_bits
from megahybrid.interop.rotation_bits import frequencies
from megahybrid.interop.shards import as_read
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh

BOUND = 1e-5  # of the largest logit, or of 1 (docs/export.md)
LONGEST = 2048
LARGE = 50_000_000  # parameters from which windows are shrunk more
SMALL_WINDOW, LARGE_WINDOW = 32, 128
WHOLE_BYTES = 3 * 2**30
FLOOR = 16  # of a shrunk llama4 temperature
NAMED_FROM = 3e-5  # of a hidden state: above what rounding makes of equal layers


@dataclass(frozen=True)
class Row:
    """One comparison: tokens of the input, the largest difference, the largest logit.
    `what` is whole, cached (the last few tokens, one by one) or generated (those that `generate`
    wrote after the others)."""

    what: str
    length: int
    difference: float
    largest: float

    @property
    def bound(self) -> float:
        """Return the largest difference that is called equal."""
        return BOUND * max(1.0, self.largest)

    @property
    def equal(self) -> bool:
        """True where the logits are the same function's; false for a NaN."""
        return self.difference <= self.bound


def shrunk(plan: LayerPlan, parameters: int) -> LayerPlan:
    """Return the plan to compare with: windows of different lengths stay different."""
    limit = SMALL_WINDOW if parameters > LARGE else LARGE_WINDOW
    windows = sorted(set(_reaches(plan)))
    smaller = {window: min(window, limit + rank) for rank, window in enumerate(windows)}
    schemes = {}
    for name, scheme in plan.schemes.items():
        update: dict[str, Any] = {}
        if scheme.reach is not None:
            update["window" if scheme.chunk is None else "chunk"] = smaller[scheme.reach]
        update["score_scale"] = _shrunk_scale(scheme.score_scale)
        if (near := scheme.near) is not None:
            window = None if near.window is None else smaller[near.window]
            of_near = {"window": window, "score_scale": _shrunk_scale(near.score_scale)}
            update["near"] = near.model_copy(update=of_near)
        schemes[name] = scheme.model_copy(update=update)
    return plan.model_copy(update={"schemes": schemes})


def _reaches(plan: LayerPlan) -> list[int]:
    """Return the window or chunk of each view of each scheme that has one."""
    views = (view for scheme in plan.schemes.values() for view in scheme.views())
    return [view.reach for view in views if view.reach is not None]


def _shrunk_scale(scale: ScoreScale) -> ScoreScale:
    """Return a scale that changes within the lengths that are compared."""
    if isinstance(scale, Llama4Scale) and scale.floor > FLOOR:
        return scale.model_copy(update={"floor": FLOOR})
    if isinstance(scale, PowerScale | LogFromScale):
        return scale.model_copy(update={"length": min(scale.length, FLOOR)})
    return scale


def lengths(plan: LayerPlan) -> tuple[int, int]:
    """Return a length below the shortest window and one well above the longest."""
    windows = _reaches(plan)
    if not windows:
        return 5, 96
    return max(2, min(windows) - 1), min(LONGEST, max(3 * max(windows) + 7, 96))


def our_model(
    model: ModelConfig,
    plan: LayerPlan,
    reader: Reader,
    dtype: torch.dtype = torch.float32,
    norm_offset: float = 0.0,
) -> Transformer:
    """Return our model out of a checkpoint, fp32, its weights rounded to `dtype` as they were
    written; those of norms less `norm_offset`."""
    ours = Transformer(model, ParallelMesh.single("cpu"), plan=plan).eval()
    with torch.no_grad():
        for parameter, spec in ours.sharded_parameters().values():
            values = torch.from_numpy(fill(reader, spec, "weight", 0, parameter.numel()))
            offset = norm_offset if is_norm(spec.segments[0].name) else 0.0
            parameter.view(-1).copy_(as_read(values, dtype, offset))
            reader.close()
    return ours


def their_config(
    folder: Path, plan: LayerPlan, small: LayerPlan, architecture: Architecture
) -> Any:
    """Return the config of `folder` as transformers reads it, shrunk to the plan `small`."""
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=bool(architecture.code_files)
        )
    architecture.shrink(config, plan, small)
    return config


def their_model(folder: Path, config: Any, own: bool) -> Any:
    """Return the model in `folder` as anyone's transformers loads it, in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": own}
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **({} if own else {"attn_implementation": "eager"}),
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = ", ".join(sorted(str(key) for key in report[kind])[:3])
            raise InteropError(
                f"{folder}: transformers reports {kind.replace('_', ' ')} ({names}). "
                "Nothing was published."
            )
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and notes of transformers, which mean nothing here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def compare(
    ours: Transformer | StreamedOurs,
    theirs: Any,
    plan: LayerPlan,
    *,
    seed: int = 1,
    few_passes: bool = False,
) -> list[Row]:
    """Return the rows of a proof. Raises InteropError, naming the first differing layer, where one
    fails.

    `plan` is the one that both run. The last tokens also go through the cache of keys and values,
    one by one, unless `few_passes` (every pass reads all weights); and the longer input is gone on
    with by the class's own `generate`, whose logits are compared with ours, computed anew.
    """
    check_frequencies(theirs, plan, ours.config.head_dim)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    short, long = lengths(plan)
    for length in (short, long):
        size = (1 if few_passes else 2, length)
        tokens = torch.randint(ours.config.vocab_size, size, generator=generator)
        mine = ours.logits(tokens)

        rows.append(_row("whole", mine, theirs(input_ids=tokens, use_cache=False).logits))
        if not rows[-1].equal:
            raise InteropError(_verdict(rows[-1], *first_difference(ours, theirs, tokens)))
        if not few_passes:
            tail = max(1, min(CACHE_STEPS, length - 1))
            rows.append(_row("cached", mine, cached_logits(theirs, tokens, tail)))
            if not rows[-1].equal:
                raise InteropError(_verdict(rows[-1], None, ""))
    # The prompt is longer than every window; with the new tokens it is as long as `tokens`.
    steps = FEW_NEW_TOKENS if few_passes else NEW_TOKENS
    rows.append(_generated(ours, theirs, tokens[:, :-steps], steps))
    if not rows[-1].equal:
        raise InteropError(_verdict(rows[-1], None, ""))
    return rows


def _generated(ours: Transformer | StreamedOurs, theirs: Any, prompt: Tensor, steps: int) -> Row:
    """Compare what `generate` wrote after `prompt`, and its logits, with our logits of it all."""
    tokens, other = generate_greedily(theirs, prompt, steps)
    mine = ours.logits(tokens[:, :-1])[:, -steps:]
    row = _row("generated", mine, other, length=tokens.shape[1])
    chosen = mine.gather(-1, tokens[:, -steps:, None]).squeeze(-1)
    # Of two logits that differ by less than the bound on each, either may be the largest.
    short = (mine.max(dim=-1).values - chosen).max().item()
    if row.equal and not short <= 2 * row.bound:
        raise InteropError(
            f"`generate` does not take the token of the largest logit (one that is smaller by "
            f"{short:.3g}, at {row.length} tokens). Nothing was published."
        )
    return row


def _row(what: str, mine: Tensor, other: Tensor, length: int | None = None) -> Row:
    """Compare the last positions of `mine` with `other`, which may be of those only."""
    difference = (mine[:, -other.shape[1] :] - other).abs().max().item()
    return Row(what, length or mine.shape[1], difference, mine.abs().max().item())


def _verdict(row: Row, layer: int | None, words: str) -> str:
    where = f"layer {layer} is the first that differs ({words})" if layer is not None else words
    where = f"; {where}" if where else ""
    return (
        f"the two models are not one function: logits differ by {row.difference:.3g} at "
        f"{row.length} tokens, {row.what} (bound {row.bound:.3g}){where}. Nothing was published."
    )


def first_difference(
    ours: Transformer | StreamedOurs, theirs: Any, tokens: Tensor
) -> tuple[int | None, str]:
    """Return the first layer whose output differs by more than rounding, and by how much."""
    mine = _outputs(ours.blocks, lambda: ours.logits(tokens))
    other = _outputs(theirs.model.layers, lambda: theirs(input_ids=tokens, use_cache=False))
    for index, (a, b) in enumerate(zip(mine, other, strict=True)):
        a = a.transpose(0, 1)
        error = (a - b).abs().max().item()
        if not error <= NAMED_FROM * max(1.0, a.abs().max().item()):
            return index, f"hidden states by {error:.3g}"
    return None, "no layer alone does: look at the embedding, the final norm and the head"


def _outputs(layers: nn.ModuleList, run: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def prove(
    model: ModelConfig,
    plan: LayerPlan,
    checkpoint: Path,
    folder: Path,
    *,
    architecture: Architecture,
    dtype: torch.dtype = torch.float32,
    whole_bytes: int = WHOLE_BYTES,
) -> list[Row]:
    """Compare a checkpoint of ours (its weights rounded to `dtype`) with a folder of theirs.

    Models whose two fp32 copies are larger than `whole_bytes` are run a layer at a time. Raises
    InteropError.
    """
    parameters = counting.parameters(model)
    small = shrunk(plan, parameters)
    config = their_config(folder, plan, small, architecture)
    own = bool(architecture.code_files)
    try:
        with Reader(checkpoint) as reader, ForeignWeights(folder) as weights, quiet():
            names = check_tensors(weights, model, plan, architecture)
            if model.tie_embeddings and HEAD in weights.names():
                # Some classes load it though the config ties it: then it must be the embedding.
                names.append(replace(names[0], theirs=HEAD))
            check_bits(reader, weights, names, model.head_dim, dtype)
            if 8 * parameters <= whole_bytes:
                ours = our_model(model, small, reader, dtype, architecture.norm_offset)
                theirs = their_model(folder, config, own)
                architecture.shrink_built(theirs.config, plan, small)
                return compare(ours, theirs, small)
            few = StreamedOurs(model, small, reader, dtype, architecture.norm_offset)
            theirs = streamed_theirs(folder, config, weights, own, architecture.file_name)
            architecture.shrink_built(theirs.config, plan, small)
            return compare(few, theirs, small, few_passes=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise InteropError(
            f"the model cannot be run by transformers ({type(error).__name__}: {words}). "
            "Nothing was published."
        ) from error


def check_frequencies(theirs: Any, plan: LayerPlan, head_dim: int) -> None:
    """Raise InteropError unless each of our rotations has its fp32 bits among theirs.

    Logits at two thousand tokens would not show an error that grows with the position.
    """
    held = [
        buffer.float()
        for name, buffer in theirs.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    ]
    if not held:
        return  # our own class has its frequencies from the config
    for name, scheme in plan.schemes.items():
        if rotation_of(scheme.position) is not None:
            wanted = padded_frequencies(scheme, head_dim)
            if not any(torch.equal(wanted, other) for other in held):
                raise InteropError(
                    f"model.layer_plan.schemes.{name}.position: transformers rotates by other "
                    "frequencies (not the same fp32 bits). Nothing was published."
                )


def padded_frequencies(scheme: AttentionScheme, head_dim: int) -> Tensor:
    """Return the frequencies of a rotation [head_dim / 2], zero where the head does not rotate."""
    rope = rotation_of(scheme.position)
    assert rope is not None
    found = frequencies(rope, head_dim)
    return torch.cat((found, found.new_zeros(head_dim // 2 - len(found))))


def proof_in_words(rows: Sequence[Row]) -> list[str]:
    """Return one line per row."""
    return [
        f"{row.what:9s} {row.length:5d} tokens: largest difference {row.difference:.2e} "
        f"(bound {row.bound:.1e}, largest logit {row.largest:.3g})"
        for row in rows
    ]
