"""Ministral 3's text model: as Mistral, with a temperature on every query after the rotation."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Rope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.scaling import Llama3Scaling, YarnScaling
from megahybrid.config.score_scale import Llama4Scale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves, same_or_refused
from megahybrid.interop.architectures.mistral import Mistral
from megahybrid.interop.architectures.rope import Fields

BETA, FLOOR = "llama_4_scaling_beta", "original_max_position_embeddings"


class Ministral3(Mistral):
    """The temperature counts from 0: 1 + beta ln(1 + floor(p / L)), where L is the length that the
    scaling of the rotation was made from. A rotation without a scaling has no field for L: the
    class reads it there all the same, with a note, so such a model comes in and does not go out.
    """

    name = "Ministral3"
    model_type = "ministral3"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope,),
        scalings=(YarnScaling, Llama3Scaling),
        score_scales=(Llama4Scale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against layers that differ, and against another temperature."""
        yield from super().layer_reasons(schemes)
        if any(scheme.score_scale != schemes[0].score_scale for scheme in schemes):
            yield "it has one temperature in every layer"
        scale = schemes[0].score_scale
        if isinstance(scale, Llama4Scale) and scale.offset != 0:
            yield "its temperature has offset 0"
        lengths = {_original_length(rope) for rope in layers.rotations(schemes)}
        if isinstance(scale, Llama4Scale) and lengths != {scale.floor}:
            yield "its temperature's floor is the original length of a yarn or llama3 scaling"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields of the rotation, the temperature and the window."""
        return f"{super().how(schemes)}, {BETA} in rope_parameters"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 36

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the one rotation, which holds the temperature, and the one window."""
        fields = super().layer_fields(model, schemes)
        scale = schemes[0].score_scale
        assert isinstance(scale, Llama4Scale)
        return fields | {"rope_parameters": fields["rope_parameters"] | {BETA: scale.coefficient}}

    def score_scale(self, config: Any) -> Fields:
        """Return the temperature of a config. Raises InteropError for one that the class cannot
        run."""
        beta, floor = (config.rope_parameters.get(name) for name in (BETA, FLOOR))
        if beta is None or floor is None:
            missing = BETA if beta is None else FLOOR
            raise InteropError(
                f"config.json: rope_parameters has no {missing}, without which transformers cannot "
                f"run the class. Add it ({BETA}: 0 for no temperature)."
            )
        return {"kind": "llama4", "floor": floor, "coefficient": beta, "offset": 0}

    def shrink_built(self, config: Any, plan: LayerPlan, small: LayerPlan) -> None:
        """Change the floor, which the class reads in every forward, once its frequencies, which
        are made from the same field, are there."""
        for name, scheme in plan.schemes.items():
            scale, less = scheme.score_scale, small.schemes[name].score_scale
            if isinstance(scale, Llama4Scale) and isinstance(less, Llama4Scale):
                same_or_refused(FLOOR, config.rope_parameters[FLOOR], scale.floor)
                config.rope_parameters[FLOOR] = less.floor
                return  # every layer has the same one


def _original_length(rope: Rope) -> int | None:
    """Return the length that a scaling was made from, None where it has none."""
    scaling = rope.scaling
    return scaling.original_length if isinstance(scaling, YarnScaling | Llama3Scaling) else None
