"""Classes whose layers always have sinks: learned ones where a scheme has them, else -1e9."""

from collections.abc import Callable, Iterator, Sequence

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.model import ModelConfig
from megahybrid.interop.architectures.base import SCHEME_FIELDS
from megahybrid.interop.architectures.stock import StockArchitecture
from megahybrid.interop.architectures.tensor_names import TensorName

NO_SINK = -1e9  # as an extra logit beside the scores it takes no weight


class SinksEverywhere(StockArchitecture):
    """A config does not say whether sinks are switched off: the tensors tell."""

    scheme_fields = SCHEME_FIELDS | {"sink"}

    def extra_tensors(
        self, model: ModelConfig, scheme: AttentionScheme, theirs: str
    ) -> Iterator[TensorName]:
        """Yield a sink for each head that takes no weight, where the scheme has none."""
        if not scheme.sink:
            yield TensorName(None, f"{theirs}.sinks", (model.num_heads,), constant=NO_SINK)

    def extra_refusal(self, name: TensorName, largest: float) -> str:
        """Return a refusal of sinks that take weight."""
        if largest <= NO_SINK / 10:
            return ""
        return f"{name.theirs} is {largest:.3g}, but the plan's layer has no sinks (sink: true)."

    def with_tensors(
        self, model: ModelConfig, largest: Callable[[str], float | None]
    ) -> ModelConfig:
        """Return the model with sinks in the schemes of which some layer's sinks take weight."""
        plan = model.layer_plan
        taking = set()
        for index, name in enumerate(plan.names()):
            value = largest(self.file_name(f"model.layers.{index}.self_attn.sinks"))
            # NaN is learned too: the proof of an import names it.
            if value is not None and not value <= NO_SINK / 10:
                taking.add(name)
        schemes = {
            name: scheme.model_copy(update={"sink": True}) if name in taking else scheme
            for name, scheme in plan.schemes.items()
        }
        return model.model_copy(update={"layer_plan": plan.model_copy(update={"schemes": schemes})})

    def sinks_in_words(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return what its tensors of sinks hold."""
        found = {scheme.sink for scheme in schemes}
        if found == {True}:
            return "learned sinks"
        return "sinks at -1e9" if found == {False} else "sinks, at -1e9 where a layer has none"
