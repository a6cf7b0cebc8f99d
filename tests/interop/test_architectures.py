"""A Hugging Face class is one file and a line in a table; what it does not name it refuses."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from megahybrid.config import load
from megahybrid.config.attention import AttentionScheme, QKNorm, Rope
from megahybrid.config.base import Frozen
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogScale,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.errors import ConfigError, InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Architecture, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters, rope_position
from megahybrid.interop.architectures.stock import StockArchitecture
from megahybrid.interop.architectures.table import (
    ARCHITECTURES,
    by_name,
    huggingface_fits,
    of_model_type,
)
from megahybrid.interop.export import choose, export
from megahybrid.interop.import_model import import_model
from tests.interop.examples import HEAD, LOCAL, NOPE, ROPE, checkpoint_of_model, model_of


class Ministral(StockArchitecture):
    """A class that the shipped table lacks: one rotation, and one window or none, in every layer.

    It stands for the file of a new class; the line in `TABLE` is all that is needed beside it.
    """

    name = "Ministral"
    model_type = "ministral"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope,),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        yield from layers.one_rotation_reasons(schemes)
        if len({scheme.window for scheme in schemes}) > 1:
            yield "it has one window in every layer, or none"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        return "sliding_window"

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        return {
            "sliding_window": schemes[0].window,
            "rope_parameters": rope_parameters(schemes[0].position, model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        window = layers.window_of(config)
        return [(rope_position(config.rope_parameters, config), window)] * config.num_hidden_layers


TABLE = (*ARCHITECTURES, Ministral())


def test_a_class_is_its_file_and_a_line_in_the_table(tmp_path: Path) -> None:
    model = model_of([LOCAL] * 3, tie_embeddings=False)
    fits = {fit.architecture: fit for fit in huggingface_fits(model, table=TABLE)}
    assert fits["Ministral"].can and fits["Ministral"].how == "sliding_window"
    assert choose(model, model.layer_plan, "ministral", TABLE).name == "Ministral"
    checkpoint_of_model(tmp_path / "run", model)
    options: dict[str, Any] = {"tokenizer": "none", "architecture": "ministral", "table": TABLE}
    export(tmp_path / "run", tmp_path / "out", **options)
    import_model(tmp_path / "out", tmp_path / "run.yaml", tmp_path / "ours", table=TABLE)
    assert load(tmp_path / "run.yaml").model.layer_plan.expand() == model.layer_plan.expand()
    export(tmp_path / "ours", tmp_path / "back", **options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_class_without_a_line_is_neither_written_nor_read(tmp_path: Path) -> None:
    model = model_of([LOCAL] * 2)
    assert "Ministral" not in {fit.architecture for fit in huggingface_fits(model)}
    with pytest.raises(ConfigError, match="--architecture=ministral is none of"):
        choose(model, model.layer_plan, "ministral")
    with pytest.raises(InteropError, match="model_type=ministral is none that can be imported"):
        of_model_type("ministral")


class Alibi(Frozen):
    """A position that no class names."""

    kind: Literal["alibi"] = "alibi"
    slope: float = 1.0


class Stretched(Frozen):
    """A scaling that no class of transformers names."""

    kind: Literal["stretched"] = "stretched"
    factor: float = 2.0


class Fading(AttentionScheme):
    """A scheme with a field that no class names."""

    fade: float = 0.0


def model_with(scheme: AttentionScheme) -> ModelConfig:
    """A model of whose layers one has this scheme, whatever a run file could say."""
    model = model_of([ROPE, ROPE])
    schemes = {**model.layer_plan.schemes, "layer1": scheme}
    plan = model.layer_plan.model_copy(update={"schemes": schemes})
    return model.model_copy(update={"layer_plan": plan})


PLAIN = AttentionScheme(position=Rope(kind="rope", theta=1e4))
L2_NORM = QKNorm().model_copy(update={"kind": "l2"})
UNKNOWN = {
    "position": (PLAIN.model_copy(update={"position": Alibi()}), "position of kind alibi"),
    "score_scale": (PLAIN.model_copy(update={"score_scale": Alibi()}), "scale of kind alibi"),
    "qk_norm": (PLAIN.model_copy(update={"qk_norm": L2_NORM}), "QK-norm"),
    "field": (Fading(position=PLAIN.position, fade=0.5), "it has no fade"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
@pytest.mark.parametrize("member", UNKNOWN)
def test_a_member_that_a_class_does_not_name_is_refused(
    member: str, architecture: Architecture
) -> None:
    scheme, words = UNKNOWN[member]
    model = model_with(scheme)
    fit = architecture.fit(model, model.layer_plan)
    assert not fit.can
    if (architecture.name, member) == ("Cohere", "position"):
        words = "it rotates in every layer"
    assert any(words in reason for reason in fit.reasons)
    plain = model_with(PLAIN)
    assert not any(words in r for r in architecture.fit(plain, plain.layer_plan).reasons) or (
        member == "qk_norm" and NO_QK_NORM not in architecture.serves.qk_norms
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_a_block_that_a_class_does_not_name_is_refused(architecture: Architecture) -> None:
    model = model_of([ROPE]).model_copy(update={"block": "cross"})
    reasons = architecture.fit(model, model.layer_plan).reasons
    assert any("not cross" in reason for reason in reasons)


def test_a_scaling_that_no_class_names_goes_out_by_our_own_only() -> None:
    position = PLAIN.position.model_copy(update={"scaling": Stretched()})
    model = model_with(PLAIN.model_copy(update={"position": position}))
    for architecture in ARCHITECTURES:
        fit = architecture.fit(model, model.layer_plan)
        assert fit.can == (architecture.name == "Megahybrid")


def test_a_plan_that_no_class_names_is_refused_with_every_reason() -> None:
    model = model_with(UNKNOWN["position"][0])
    with pytest.raises(ConfigError) as caught:
        choose(model, model.layer_plan, None)
    for architecture in ARCHITECTURES:
        assert f"{architecture.name}: " in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_a_class_writes_nothing_for_a_member_that_it_does_not_name(
    architecture: Architecture,
) -> None:
    for scheme, _ in UNKNOWN.values():
        model = model_with(scheme)
        with pytest.raises(InteropError, match=f"{architecture.name} does not support this model"):
            architecture.to_config(model, model.layer_plan, 64)
    model = model_with(UNKNOWN["position"][0])
    with pytest.raises(AssertionError, match="unreachable"):
        list(architecture.tensor_names(model, model.layer_plan))


def test_our_own_class_serves_every_scale_of_the_scores() -> None:
    every: tuple[Any, ...] = (
        SqrtDimScale(),
        FixedScale(kind="fixed", scale=0.3),
        Llama4Scale(kind="llama4"),
        LogScale(kind="log", base=2.0),
        SsmaxScale(kind="ssmax"),
    )
    for scale in every:
        model = model_with(PLAIN.model_copy(update={"score_scale": scale}))
        assert by_name("Megahybrid").fit(model, model.layer_plan).can
        others = (
            {"SmolLM3", "Llama", "Mistral", "GraniteSWA", "Llama4"}
            if scale.kind == "sqrt_dim"
            else set()
        )
        assert {fit.architecture for fit in huggingface_fits(model) if fit.can} == others


def test_every_class_has_a_name_a_type_and_a_place_of_its_own() -> None:
    assert len({one.name for one in ARCHITECTURES}) == len(ARCHITECTURES)
    assert len({one.model_type for one in ARCHITECTURES}) == len(ARCHITECTURES)
    schemes = model_of([LOCAL | HEAD, NOPE | HEAD]).layer_plan.expand()
    stock = [one.export_rank(schemes) for one in ARCHITECTURES if not one.code_files]
    assert len(set(stock)) == len(stock)
