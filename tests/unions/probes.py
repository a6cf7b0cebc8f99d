"""The places that must know every member of every union: each is a function of a model, which fails
where the place does not do with it what the config says.

Each place has a function of its own, and calls what the project calls there.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.config import counting, dump, parse
from megahybrid.config.architecture_fit import Fit
from megahybrid.config.describe import describe, render
from megahybrid.config.memory_estimate import local_parameters, memory_per_rank
from megahybrid.config.model import ModelConfig
from megahybrid.config.reference import reference
from megahybrid.config.run import RunConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.errors import ConfigError
from megahybrid.evaluate.attention import attention_of
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import Decoder
from megahybrid.interop.architectures.table import by_name, huggingface_fits
from megahybrid.interop.export import choose, inexact_rotations
from megahybrid.interop.shards import reordered
from megahybrid.model.init import initialise, parameter_rule
from megahybrid.model.kernels import KERNELS
from megahybrid.model.selftest import HeadShape, run_self_test
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.config.example import example
from tests.plain_model import PlainModel, canonical_shapes, random_tensors, relative_error

LENGTH = 21  # of rows: beyond every example's window
OWN = "Megahybrid"
# Fields whose words the reference page lists.
WORDS = (
    "kind", "over", "weight", "gate", "bias", "block", "norm", "spectrum", "activation",
)  # fmt: skip
Place = Callable[[ModelConfig], None]
_compares = True  # with the independent model; not where a place must refuse by itself


class PassedSilently(Exception):
    """A place that has said of an unknown member that it can be carried."""


def without_oracle(place: Place, config: ModelConfig) -> None:
    """Ask a place alone, with no independent model that would refuse before it does."""
    global _compares
    _compares = False
    try:
        place(config)
    finally:
        _compares = True


def _run(config: ModelConfig) -> RunConfig:
    return example("parallel.tensor=1").model_copy(update={"model": config})


def _tokens(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens of two rows and where each one's document begins."""
    tokens = torch.randint(
        config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    starts = torch.zeros_like(tokens)
    starts[1, 9:] = 9
    return tokens, starts


def _ours(config: ModelConfig, tensors: dict[str, Tensor], kernel: str = "auto") -> Transformer:
    kernels = [kernel] * config.layer_plan.num_layers
    ours = Transformer(config, ParallelMesh.single(), kernels=kernels).double()
    if _compares:
        ours.load_canonical(tensors)
    return ours.eval()


def _tensors(config: ModelConfig, **how: Any) -> dict[str, Tensor]:
    return random_tensors(config, 2, **how) if _compares else {}


def _wanted(config: ModelConfig, tensors: dict[str, Tensor], rows: int = 2) -> Tensor | None:
    """What the independent model computes for the first rows."""
    if not _compares:
        return None
    tokens, starts = (part[:rows] for part in _tokens(config))
    logits = PlainModel(config, tensors).logits(tokens, starts).detach()
    assert logits.isfinite().all()
    return logits


def _same(found: Tensor, wanted: Tensor | None, bound: float = 1e-9) -> None:
    if wanted is None:
        return
    error = relative_error(found, wanted)
    assert error <= bound, f"the logits are another model's (error {error:.3g})"


def round_trip(config: ModelConfig) -> None:
    """Read back from what is written of it, hashed as schemes are."""
    assert parse(type(config), dump(config)) == config
    assert len({hash(scheme) for scheme in config.layer_plan.expand()}) >= 1


def fingerprint(config: ModelConfig) -> None:
    """It is decided whether it makes another model."""
    assert model_fingerprint(config).count("-") >= 5


def described(config: ModelConfig) -> None:
    """`describe` names what the layers have."""
    told = describe(_run(config))
    for layer, scheme in zip(told["layers"], config.layer_plan.expand(), strict=True):
        scaling = getattr(scheme.position, "scaling", None)
        assert layer["position"].replace(",", " ").split()[0] == scheme.position.kind
        assert scaling is None or scaling.kind in layer["position"]
        assert layer["score_scale"] == scheme.score_scale.kind
        assert layer["qk_norm"] == scheme.qk_norm.kind
    assert "Layers at" in render(told)


def counts(config: ModelConfig) -> None:
    """Every learned parameter is counted with its shape."""
    shapes = canonical_shapes(config) if _compares else counting.parameter_shapes(config)
    assert counting.parameter_shapes(config) == shapes
    assert counting.parameters(config) == sum(map(math.prod, shapes.values()))
    assert counting.training_flops(config, [LENGTH]) > 0


def memory(config: ModelConfig) -> None:
    """A rank's parameters are those of the model that runs, and the rest is estimated."""
    ours = Transformer(config, ParallelMesh.single())
    held = sum(p.numel() for name, p in ours.named_parameters() if "embed" not in name)
    padded = sum(p.numel() for name, p in ours.named_parameters() if "embed" in name)
    found = local_parameters(config, 1)
    assert held <= found <= held + 2 * padded
    stage = example().stages[0]
    told = memory_per_rank(config, stage, tensor=1, data_degree=1, zero_stage=1, precision="bf16")
    assert told.activations > 0 and told.working > 0


def first_values(config: ModelConfig) -> None:
    """Each parameter has its row in the table of first values, and is filled by it."""
    optimizer = OptimizerConfig()
    ours = Transformer(config, ParallelMesh.single())
    initialise(ours, 1, optimizer)
    for parameter, spec in ours.sharded_parameters().values():
        for segment in spec.segments:
            rule = parameter_rule(segment.name, config, optimizer)
            if rule.std is None:
                assert (parameter == rule.constant).all(), segment.name


def plain_model(config: ModelConfig) -> None:
    """The independent model computes it."""
    PlainModel(config, random_tensors(config, 2)).logits(*_tokens(config))


def model(config: ModelConfig) -> None:
    """The model that is trained computes what the independent one does."""
    tensors = _tensors(config)
    wanted = _wanted(config, tensors)
    with torch.no_grad():
        _same(_ours(config, tensors).logits(*_tokens(config)), wanted)


def trained_model(config: ModelConfig) -> None:
    """The same with gradients, whose path has functions of its own."""
    tensors = _tensors(config)
    wanted = _wanted(config, tensors)
    _same(_ours(config, tensors).logits(*_tokens(config)), wanted)


def self_test(config: ModelConfig) -> None:
    """The self-test before the first step knows it."""
    shape = HeadShape(2, 1, config.head_dim, torch.float32, torch.device("cpu"))
    schemes = config.layer_plan.schemes
    run_self_test(schemes, shape, dict.fromkeys(schemes, "auto"), rank=0)


def kernels(config: ModelConfig) -> None:
    """Every kernel computes it or refuses; the reference computes all."""
    tensors = _tensors(config)
    wanted, able = _wanted(config, tensors), []
    for name in KERNELS:
        if name == "flex":  # compiled for each window and length: tests/model holds it
            continue
        try:
            with torch.no_grad():
                found = _ours(config, tensors, name).logits(*_tokens(config))
        except ConfigError:
            continue
        _same(found, wanted, 1e-5)
        able.append(name)
    assert "reference" in able


def cache_(config: ModelConfig) -> None:
    """Decoding with a cache of keys and values gives what reading the whole text gives."""
    tensors, tokens = _tensors(config), _tokens(config)[0][:1]
    wanted = _wanted(config, tensors, rows=1)
    decoder = Decoder(_ours(config, tensors), tokens[:, :9].tolist(), LENGTH - 9)
    found = [decoder.prefill(chunk_tokens=4)[0]]
    found += [decoder.step(tokens[:, at])[0] for at in range(9, LENGTH)]
    _same(torch.stack(found), None if wanted is None else wanted[0, 8:])


def analysis(config: ModelConfig) -> None:
    """The analysis of attention goes through the same scores: its logits are the model's."""
    tensors, tokens = _tensors(config), _tokens(config)[0][:1]
    wanted = _wanted(config, tensors, rows=1)
    one = Example(tuple(tokens[0].tolist()), 15, 18, ((11, 13),))
    found, logits = attention_of(_ours(config, tensors), one, position_bins=2, chunk_tokens=7)
    _same(logits, None if wanted is None else wanted[0, 17:-1])
    assert torch.allclose(found.mass.sum(-1), torch.ones(()).double())


def fit(config: ModelConfig) -> None:
    """What Hugging Face classes can carry is told: with a reason, or with the fields it takes."""
    fits = huggingface_fits(config)
    assert fits and all(one.how or one.reasons for one in fits)
    _refused_by(fits)
    for one in fits:
        if one.can:
            by_name(one.architecture).to_config(config, config.layer_plan, 64)


def _refused_by(fits: Sequence[Fit]) -> None:
    """No class can carry what nobody knows."""
    if not _compares:
        if any(one.can for one in fits):
            raise PassedSilently(", ".join(one.architecture for one in fits if one.can))
        raise AssertionError("no class carries it")


def own_export(config: ModelConfig) -> None:
    """Our own class computes it from the exported fields and tensors."""
    _exported_equals(config, OWN)


def named_exports(config: ModelConfig) -> None:
    """Each class that claims it computes it."""
    if inexact_rotations(config.layer_plan, config.head_dim):
        return
    fits = huggingface_fits(config)
    _refused_by(fits)
    for one in fits:
        if one.can:
            assert choose(config, config.layer_plan, one.architecture).name == one.architecture
            _exported_equals(config, one.architecture)


def _exported_equals(config: ModelConfig, architecture: str) -> None:
    if not _compares:
        by_name(architecture).to_config(config, config.layer_plan, 64)
        return
    tensors = _tensors(config, dtype=torch.float32, std=0.12)
    tokens = _tokens(config)[0]
    wanted = PlainModel(config, tensors).logits(tokens).detach()
    theirs = _their_model(config, architecture, tensors)
    with torch.no_grad():
        found = theirs(input_ids=tokens).logits
    error = (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    assert error <= 1e-5, f"{architecture} computes another model (error {error:.3g})"


def _their_model(config: ModelConfig, architecture: str, tensors: dict[str, Tensor]) -> Any:
    import transformers

    from megahybrid.interop.remote_code.configuration_megahybrid import MegahybridConfig
    from megahybrid.interop.remote_code.modeling_megahybrid import MegahybridForCausalLM

    plan = config.layer_plan
    fields = by_name(architecture).to_config(config, plan, 64)
    fields.pop("architectures")
    fields.pop("auto_map", None)
    kind = fields.pop("model_type")
    if architecture == OWN:
        theirs = MegahybridForCausalLM(MegahybridConfig(**fields))
    else:
        no_ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        made = transformers.AutoConfig.for_model(kind, **fields, **no_ids)
        made._attn_implementation = "eager"  # the one that has sinks, in every class
        theirs = getattr(transformers, f"{architecture}ForCausalLM")(made)
    state = {}
    for name in by_name(architecture).tensor_names(config, plan):
        if name.ours is None:
            state[name.theirs] = torch.full(name.shape, float(name.constant))
        else:
            rows = reordered(tensors[name.ours].detach().numpy(), name, config.head_dim)
            state[name.theirs] = torch.from_numpy(np.ascontiguousarray(rows))
    in_module = {by_name(architecture).file_name(key): key for key in theirs.state_dict()}
    state = {in_module.get(name, name): tensor for name, tensor in state.items()}
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    missing = [key for key in found.missing_keys if "inv_freq" not in key]
    assert missing in ([], ["lm_head.weight"]), missing
    theirs.tie_weights()
    return theirs.eval()


@cache
def _page() -> dict[str, str]:
    """The sections of docs/config.md by class."""
    sections = reference().split("\n## ")[1:]
    return {section.split("\n", 1)[0]: section for section in sections}


def reference_page(config: ModelConfig) -> None:
    """The reference page has every class and every word that the config uses."""

    def look(value: BaseModel) -> None:
        section = _page()[type(value).__name__]
        for name in type(value).model_fields:
            item = getattr(value, name)
            rows = [line for line in section.splitlines() if line.startswith(f"| `{name}` |")]
            assert rows, name
            if name in (
                "kind",
                "over",
                "weight",
                "gate",
                "bias",
                "block",
                "norm",
                "spectrum",
                "activation",
            ):
                assert f"`{item}`" in rows[0], item
            inner = item.values() if isinstance(item, dict) else [item]
            for one in inner:
                if isinstance(one, BaseModel):
                    look(one)

    look(config)


PLACES: dict[str, Place] = {
    "round_trip": round_trip,
    "fingerprint": fingerprint,
    "describe": described,
    "counts": counts,
    "memory": memory,
    "first_values": first_values,
    "plain_model": plain_model,
    "model": model,
    "trained_model": trained_model,
    "self_test": self_test,
    "kernels": kernels,
    "cache": cache_,
    "analysis": analysis,
    "fit": fit,
    "own_export": own_export,
    "named_exports": named_exports,
    "reference_page": reference_page,
}
