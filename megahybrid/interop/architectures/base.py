"""The base of every class: the members of each union that it serves, and what follows from them.

What a class does not name it refuses, in words, so a scheme that is new to our model is written by
no class until that class's file tells how. Nothing here imports torch or transformers, and so
`describe` can ask every class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, assert_never

from megahybrid.config.architecture_fit import Fit
from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.base import Frozen
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import tensor_names
from megahybrid.interop.architectures.rope import Fields
from megahybrid.interop.architectures.tensor_names import HEAD, Order, TensorName

NO_QK_NORM = QKNorm()
# What a class must name before it may write them; a field that is newer than a class is refused
# where it has another value than its default.
SCHEME_FIELDS = frozenset(("position", "window", "qk_norm", "score_scale", "gate", "bias"))
MODEL_FIELDS = frozenset(
    (
        "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
        "block", "norm", "eps", "tie_embeddings", "logit_scale", "initial_std", "embedding_std",
        "layer_plan", "activation",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Serves:
    """The members of each union that a class serves. Every other is refused."""

    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    qk_norms: tuple[QKNorm, ...]
    positions: tuple[type, ...]
    scalings: tuple[type, ...]
    score_scales: tuple[type, ...]
    gates: tuple[str, ...] = ("none",)
    biases: tuple[str, ...] = ("none",)
    activations: tuple[str, ...] = ("silu",)
    logit_scale: bool = False  # a factor on the logits
    per_layer: bool = False  # QK-norm, scale of the scores and window may differ between layers
    no_position: str = "it has no position of kind {kind}"
    no_scaling: str = "it has no scaling of kind {kind}"


class Architecture(ABC):
    """One class of transformers, `{name}ForCausalLM`."""

    name: ClassVar[str]
    model_type: ClassVar[str]
    serves: ClassVar[Serves]
    # Code of ours that goes along with an export. Such a class is the last choice, and nothing of
    # it is imported: its code would have to be run.
    code_files: ClassVar[tuple[str, ...]] = ()
    scheme_fields: ClassVar[frozenset[str]] = SCHEME_FIELDS
    model_fields: ClassVar[frozenset[str]] = MODEL_FIELDS
    # What the class adds to the weight of every norm: (1 + w) x / rms(x).
    norm_offset: ClassVar[float] = 0.0

    def fit(self, model: ModelConfig, plan: LayerPlan) -> Fit:
        """Return the reasons against this class for a model, or how its config carries it."""
        schemes = [scheme for scheme, _ in plan.counts()]
        reasons = [*self._model_reasons(model), *self._scheme_reasons(schemes)]
        # A position that this file does not know is refused above, and no layer of it is judged.
        judged = (Rope, Nope, *self.serves.positions)
        known = [s for s in schemes if isinstance(s.position, judged)]
        reasons += self.layer_reasons(known) if known else []
        reasons = list(dict.fromkeys(reasons))
        return Fit(self.name, tuple(reasons), "" if reasons else self.how(known))

    def shape_reasons(self, model: ModelConfig) -> Iterator[str]:
        """Yield the reasons against a model's sizes."""
        if model.head_dim % 2:
            yield f"its heads have an even dimension (head_dim={model.head_dim})"

    @abstractmethod
    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against the positions and windows of these different layers together;
        a position that the class does not serve has its reason already."""

    @abstractmethod
    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return, for people, the fields of its config that carry these different layers."""

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model. The lowest is exported: the
        class that the most programs read."""
        return 100

    def _size_fields(self, model: ModelConfig, plan: LayerPlan, max_length: int) -> Fields:
        return {
            "architectures": [f"{self.name}ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": plan.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "max_position_embeddings": max_length,
            "initializer_range": model.initial_std,
            "tie_word_embeddings": model.tie_embeddings,
            "use_cache": True,
        }

    def _model_reasons(self, model: ModelConfig) -> Iterator[str]:
        serves = self.serves
        if model.block not in serves.blocks:
            yield f"its block is {' or '.join(serves.blocks)}, not {model.block}"
        if model.norm not in serves.norms:
            yield f"its norm is {' or '.join(serves.norms)}, not {model.norm}"
        if model.activation not in serves.activations:
            yield f"its activation is {' or '.join(serves.activations)}, not {model.activation}"
        if model.logit_scale != 1 and not serves.logit_scale:
            yield f"it has no factor on the logits (logit_scale={model.logit_scale})"
        yield from _new_fields(model, self.model_fields)
        yield from self.shape_reasons(model)

    def _scheme_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        serves = self.serves
        yield from self._qk_norm_reasons({scheme.qk_norm for scheme in schemes})
        scales = {scheme.score_scale for scheme in schemes}
        refused = {s.kind for s in scales if not isinstance(s, serves.score_scales)}
        if len(scales) > 1 and not serves.per_layer:
            refused |= {scale.kind for scale in scales} - {"sqrt_dim"}
        if refused:
            yield f"it has no score scale of kind {' or '.join(sorted(refused))}"
        gates = {scheme.gate for scheme in schemes} - set(serves.gates)
        if gates:
            yield f"its gate is {' or '.join(serves.gates)}, not {' or '.join(sorted(gates))}"
        biases = {scheme.bias for scheme in schemes}
        if not biases <= set(serves.biases) or (len(biases) > 1 and not serves.per_layer):
            wanted = f"{' or '.join(serves.biases)}{'' if serves.per_layer else ' in every layer'}"
            yield f"its projections' bias is {wanted}, not {' and '.join(sorted(biases))}"
        windows = {scheme.window for scheme in schemes} - {None}
        if len(windows) > 1 and not serves.per_layer:
            yield f"it has one window, not {len(windows)}"
        if any(window is not None and window < 2 for window in windows):
            yield "its cache is wrong for a window of one key"
        for scheme in schemes:
            yield from _new_fields(scheme, self.scheme_fields)
            yield from self._position_reasons(scheme)

    def _qk_norm_reasons(self, norms: set[QKNorm]) -> Iterator[str]:
        serves = self.serves
        refused = [norm for norm in norms if norm not in serves.qk_norms]
        if len(norms) > 1 and not serves.per_layer:
            yield "its QK-norm is the same in every layer"
        elif refused:
            wanted = " or ".join(_qk_norm_words(norm) for norm in serves.qk_norms)
            yield f"its QK-norm is {wanted}, not {_qk_norm_words(refused[0])}"

    def _position_reasons(self, scheme: AttentionScheme) -> Iterator[str]:
        position, serves = scheme.position, self.serves
        if not isinstance(position, serves.positions):
            yield serves.no_position.format(kind=position.kind)
        scaling = position.scaling if isinstance(position, Rope) else None
        if scaling is not None and not isinstance(scaling, serves.scalings):
            yield serves.no_scaling.format(kind=scaling.kind)

    def to_config(self, model: ModelConfig, plan: LayerPlan, max_length: int) -> Fields:
        """Return config.json of a model, but for token ids, dtype and version.

        Every field that has a default is written: defaults differ between classes, and several
        fields are silently ignored where another is missing. Raises InteropError for a model that
        does not fit.
        """
        reasons = self.fit(model, plan).reasons
        if reasons:
            raise InteropError(f"{self.name} does not support this model: {'; '.join(reasons)}.")
        return self._size_fields(model, plan, max_length) | self.own_fields(model, plan)

    @abstractmethod
    def own_fields(self, model: ModelConfig, plan: LayerPlan) -> Fields:
        """Return the fields of config.json beyond the sizes, whose names are those of every
        class."""

    @abstractmethod
    def from_config(self, config: Any) -> ModelConfig:
        """Return the model that computes what the class computes, from a config that transformers'
        own class has read, so that defaults and old spellings are its to resolve.

        Raises InteropError, by its name, for a field that our model does not support.
        """

    def shrink(self, config: Any, plan: LayerPlan, small: LayerPlan) -> None:
        """Change a loaded config of `plan` into one of `small`. Raises InteropError where it is not
        one of `plan`: so the window that is written is compared as well, though another one is run.
        """
        windows = {s.window: small.schemes[name].window for name, s in plan.schemes.items()}
        windows.pop(None, None)
        if not windows:
            return
        same_or_refused("sliding_window", config.sliding_window, next(iter(windows)))
        config.sliding_window = windows[config.sliding_window]

    def shrink_built(self, config: Any, plan: LayerPlan, small: LayerPlan) -> None:
        """Change in the config of a built model what `shrink` must not: a field that is read in
        every forward, and from which something else was made once."""
        return None

    def norm_names(self, model: ModelConfig) -> Mapping[str, str]:
        """Return the class's name of each norm of a block, by ours."""
        return tensor_names.norm_names(model)

    def row_order(self, scheme: AttentionScheme, head_dim: int) -> Order | None:
        """Return our row for each row of a rotated head as the class keeps it; None where the
        orders agree."""
        match scheme.position:
            case Rope():
                return self.pair_order(head_dim, scheme.position.rotary_dim(head_dim))
            case Nope():
                return None
            case _:
                assert_never(scheme.position)

    def pair_order(self, head_dim: int, rotary_dim: int) -> Order | None:
        """Return `row_order` of a rotated head: it follows from which rows the class pairs."""
        return tensor_names.half_pairs(head_dim, rotary_dim)

    def file_name(self, name: str) -> str:
        """Return the name in files of a tensor of transformers' module: `tensor_names` has that of
        files, and where they differ transformers translates when it reads and writes."""
        return name

    def with_tensors(
        self, model: ModelConfig, largest: Callable[[str], float | None]
    ) -> ModelConfig:
        """Return the model of an imported config with what its tensors alone tell; `largest` gives
        the largest value of one by its name, None where there is none."""
        return model

    def extra_tensors(
        self, model: ModelConfig, scheme: AttentionScheme, theirs: str
    ) -> Iterator[TensorName]:
        """Yield the tensors of one layer's attention that only the class has."""
        return iter(())

    def extra_refusal(self, name: TensorName, largest: float) -> str:
        """Return why an imported tensor that only the class has cannot be left out, "" if it
        can."""
        return "" if largest == name.constant else "our model has no such tensor"

    def tensor_names(self, model: ModelConfig, plan: LayerPlan) -> Iterator[TensorName]:
        """Yield every tensor of the model under both names, in the order of the layers."""
        for name in self._tensors(model, plan):
            normed = name.ours is not None and tensor_names.is_norm(name.ours)
            yield replace(name, offset=self.norm_offset) if normed else name

    def _tensors(self, model: ModelConfig, plan: LayerPlan) -> Iterator[TensorName]:
        hidden = model.hidden_size
        yield TensorName(
            "embedding.weight", "model.embed_tokens.weight", (model.vocab_size, hidden)
        )
        for index, scheme in enumerate(plan.expand()):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            for name, norm in self.norm_names(model).items():
                yield TensorName(f"{ours}.{name}.weight", f"{theirs}.{norm}.weight", (hidden,))
            order = self.row_order(scheme, model.head_dim)
            attention = f"{theirs}.self_attn"
            yield from tensor_names.attention_tensors(model, scheme, ours, attention, order)
            yield from self.extra_tensors(model, scheme, attention)
            yield from tensor_names.mlp_tensors(model, ours, theirs)
        yield TensorName("final_norm.weight", "model.norm.weight", (hidden,))
        if not model.tie_embeddings:
            yield TensorName("head.weight", HEAD, (model.vocab_size, hidden))


def same_or_refused(name: str, found: Any, meant: Any) -> None:
    """Raise InteropError where a config.json has another value than the plan."""
    if found != meant:
        raise InteropError(
            f"config.json has {name}={found}, but the plan has {meant}. Nothing was published."
        )


def _new_fields(value: Frozen, known: frozenset[str]) -> Iterator[str]:
    """Yield a reason for each field beyond the known ones that is not at its default."""
    for name, field in type(value).model_fields.items():
        if name not in known and getattr(value, name) != field.get_default(
            call_default_factory=True, validated_data={}
        ):
            yield f"it has no {name}"


def _qk_norm_words(norm: QKNorm) -> str:
    if norm.kind == "none":
        return "none"
    if norm.over == "projection":
        return f"{norm.kind} over the projection"
    return f"{norm.kind} per head, weight {norm.weight}"
