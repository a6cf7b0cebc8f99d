"""How one layer sees position: `AttentionScheme` and its parts.

Everything here is a value. A rotary scheme is a vector of angular frequencies and an attention
factor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, assert_never

from pydantic import Field, model_validator

from megahybrid.config.base import Frozen, dump
from megahybrid.config.fusion import Fuse, HeadSplit, has_product, learned_fuse
from megahybrid.config.old_words import current_scheme
from megahybrid.config.parsing import parse
from megahybrid.config.scaling import Array, FrequencyScaling, Scaling, plain_frequencies
from megahybrid.config.score_scale import ScoreScale, SqrtDimScale, learned_scale
from megahybrid.config.yaml_file import merge
from megahybrid.errors import ConfigError

Spectrum = Literal["rotated", "head"]


class Rope(Frozen):
    """Rotary position embedding: pair i of the first `rotary_fraction` of each head turns by
    position * frequency[i]."""

    kind: Literal["rope"]
    theta: float = Field(gt=1, description="base of the frequencies")
    scaling: Scaling | None = Field(default=None, description="change of the frequencies")
    rotary_fraction: float = Field(
        default=1.0, gt=0, le=1, description="part of each head that rotates"
    )
    spectrum: Spectrum = Field(
        default="rotated",
        description="the frequencies of a part: rotated spreads theta's over the rotated "
        "dimensions, head keeps the first ones of the whole head's (p-RoPE, arXiv 2410.06205, "
        "proportional in Gemma 4)",
    )

    def rotary_dim(self, head_dim: int) -> int:
        """Rotated dimensions of a head: rotary_fraction * head_dim, rounded down to even."""
        return int(head_dim * self.rotary_fraction) // 2 * 2

    def frequencies(self, head_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2] in radians per token, made by array module `xp`."""
        dims, scaling = self.spectrum_dim(head_dim), self.frequency_scaling()
        pairs = self.rotary_dim(head_dim) // 2
        if scaling is None:
            return plain_frequencies(self.theta, dims, xp, dtype, pairs)
        return scaling.frequencies(self.theta, dims, xp, dtype)[:pairs]

    def spectrum_dim(self, head_dim: int) -> int:
        """Dimensions over which theta's frequencies, and what a scaling does to them, are spread:
        two for each. Those that rotate are the first."""
        match self.spectrum:
            case "rotated":
                return self.rotary_dim(head_dim)
            case "head":
                return head_dim
            case never:
                assert_never(never)

    def attention_factor(self) -> float:
        """Multiplier of cos and sin (1 but for YaRN)."""
        scaling = self.frequency_scaling()
        return 1.0 if scaling is None else scaling.attention_factor_value()

    def frequency_scaling(self) -> FrequencyScaling | None:
        """The scaling as what every scaling can do: the type checker names one that cannot."""
        return self.scaling


class Nope(Frozen):
    """No positional embedding: the causal mask is the only order."""

    kind: Literal["nope"]


Position = Annotated[Rope | Nope, Field(discriminator="kind")]


def rotation_of(position: Position) -> Rope | None:
    """The rotation of a position, None for one that rotates nothing."""
    match position:
        case Rope():
            return position
        case Nope():
            return None
        case never:
            assert_never(never)


class NearView(Frozen):
    """The nearer of a layer's two views of the same queries, keys and values."""

    position: Position = Field(description="how position enters")
    window: int | None = Field(
        default=None,
        ge=1,
        description="keys visible to a query, its own included, at most those of the scheme; null: "
        "all",
    )
    score_scale: ScoreScale = Field(
        default=SqrtDimScale(), description="factor on the scores; none that is learned"
    )


QKNormKind = Literal["none", "rms", "layernorm"]
QKNormOver = Literal["head", "projection"]
QKNormWeight = Literal["shared", "per_head", "none"]


class QKNorm(Frozen):
    """Normalisation of queries and keys before the rotation.

    over=head: each head's head_dim values; weight [head_dim] shared by all heads, or per_head
    [heads, head_dim]. over=projection: all heads' values together, weight [heads * head_dim].
    weight=none: the norm alone, without parameters.
    """

    kind: QKNormKind = Field(default="none", description="the norm")
    over: QKNormOver = Field(default="head", description="values that are normalised together")
    weight: QKNormWeight = Field(
        default="shared",
        description="over head: one weight for all heads, or one for each; none: no weight",
    )

    @model_validator(mode="after")
    def _check_weight(self) -> "QKNorm":
        if self.over == "projection" and self.weight == "per_head":
            raise ValueError(
                "weight=per_head has no meaning with over=projection (its weight already covers "
                "every head). Leave weight out."
            )
        return self

    def weight_shape(self, heads: int, head_dim: int) -> tuple[int, ...] | None:
        """The shape of the weight for `heads` queries or keys, None without a norm."""
        if self.learned() is None:
            return None
        match self.over, self.weight:
            case _, "none":
                return None
            case "projection", _:
                return (heads * head_dim,)
            case "head", "per_head":
                return (heads, head_dim)
            case "head", "shared":
                return (head_dim,)
            case never:
                assert_never(never)

    def learned(self) -> tuple[str, str] | None:
        """Return which values are normed together and share a weight, as (over, weight); None
        without a norm."""
        match self.kind:
            case "none":
                return None
            case "rms" | "layernorm":
                return self.over, self.weight
            case never:
                assert_never(never)


Gate = Literal["none", "head", "element"]


class GateShape(NamedTuple):
    """The values that a gate has for each token: so many for each of its heads."""

    heads: int
    values_per_head: int

    @property
    def values(self) -> int:
        """Over all heads: rows of the projection that makes them."""
        return self.heads * self.values_per_head


def gate_shape(gate: Gate, heads: int, kv_heads: int, head_dim: int) -> GateShape | None:
    """The values of a layer's gate for each token; None without a gate."""
    match gate:
        case "none":
            return None
        case "head":
            return GateShape(heads, 1)
        case "element":
            return GateShape(heads, head_dim)
        case never:
            assert_never(never)


Bias = Literal["none", "qkv"]


def biased_projections(bias: Bias) -> tuple[str, ...]:
    """The projections that have a learned bias."""
    match bias:
        case "none":
            return ()
        case "qkv":
            return ("query", "key", "value")
        case never:
            assert_never(never)


class AttentionScheme(Frozen):
    """The way in which a layer's queries see its keys.

    `window` counts the keys visible to a query, the query's own included; None means all earlier
    keys of the document. This is the only place that says so; kernels convert. With `chunk` a
    document is cut into pieces that do not see each other, while positions go on over them.
    """

    position: Position = Field(description="how position enters")
    window: int | None = Field(
        default=None, ge=1, description="keys visible to a query, its own included; null: all"
    )
    chunk: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a chunk, counted from the start of each document: a query sees the "
        "keys of its own chunk alone, up to its own; not with window",
    )
    qk_norm: QKNorm = Field(default=QKNorm(), description="norm of queries and keys")
    score_scale: ScoreScale = Field(default=SqrtDimScale(), description="factor on the scores")
    gate: Gate = Field(
        default="none",
        description="the attention output times a sigmoid of what queries are made of "
        "(arXiv 2505.06708): one value a head, or one for each of its elements",
    )
    bias: Bias = Field(
        default="none", description="learned biases of the query, key and value projections"
    )
    sink: bool = Field(
        default=False,
        description="a learned logit for each query head beside the scores of every query, which "
        "takes attention from the keys and has no value (arXiv 2508.10925)",
    )
    near: NearView | None = Field(
        default=None,
        description="a second view of the same queries, keys and values, the scheme itself being "
        "the far one; with fuse or split",
    )
    fuse: Fuse | None = Field(
        default=None, description="both views in every head: g * near + (1 - g) * far"
    )
    split: HeadSplit | None = Field(default=None, description="heads of one view or the other")

    @model_validator(mode="before")
    @classmethod
    def _read_old_word(cls, data: Any) -> Any:
        return current_scheme(data, whole=True)

    @model_validator(mode="after")
    def _check_chunk(self) -> "AttentionScheme":
        if self.chunk is not None and self.window is not None:
            raise ValueError(
                f"chunk={self.chunk} does not go with a window (window={self.window}): each says "
                "by itself which keys are seen. Leave one of them out, or set it to null."
            )
        return self

    @model_validator(mode="after")
    def _check_views(self) -> "AttentionScheme":
        problem = views_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    def views(self) -> "tuple[AttentionScheme, ...]":
        """The scheme of each view of a layer, near and far; the scheme itself where it has one."""
        if self.near is None:
            return (self,)
        one = {"near": None, "fuse": None, "split": None}
        of_near = {name: getattr(self.near, name) for name in NearView.model_fields}
        return self.model_copy(update=of_near | one), self.model_copy(update=one)

    def token_gates(self, heads: int, kv_heads: int, head_dim: int) -> dict[str, GateShape]:
        """The gates that a layer makes of each token beside its query, key and value, by their
        names in the model."""
        gate = gate_shape(self.gate, heads, kv_heads, head_dim)
        gates = {} if gate is None else {"output_gate": gate}
        if self.fuse is not None and has_product(self.fuse.gate):
            gates["fuse_gate"] = GateShape(heads, 1)
        return gates

    @property
    def reach(self) -> int | None:
        """The most keys that any query sees, its own included: window or chunk; None: no limit. A
        chunk of C is a window of C where documents are cut every C tokens."""
        return self.window if self.chunk is None else self.chunk

    def with_reach(self, reach: int | None) -> "AttentionScheme":
        """The scheme with another window, or with another chunk where it has chunks."""
        field = "window" if self.chunk is None else "chunk"
        near = self.near
        if near is not None and reach is not None:  # the near view sees no farther
            least = reach if near.window is None else min(near.window, reach)
            near = near.model_copy(update={"window": least})
        return self.model_copy(update={field: reach, "near": near})

    def with_overrides(self, fields: Mapping[str, Any], where: str) -> "AttentionScheme":
        """The scheme with some fields changed; `where` is their dotted path in a ConfigError.

        A change that would add, remove or reshape a learned parameter is refused: the weights of
        the stage before could not be taken over.
        """
        try:
            fields = current_scheme(dict(fields))
        except ValueError as error:
            raise ConfigError(f"{where}.{error}") from None
        position = fields.get("position")
        if rotation_of(self.position) is None and isinstance(position, Mapping):
            rotary = [f for f in position if f in Rope.model_fields and f != "kind"]
            if rotary and "kind" not in position:
                raise ConfigError(
                    f"{where}.position.{rotary[0]} has nothing to act on: these layers have no "
                    f"rotation (position.kind={self.position.kind}). Remove it, or name the scheme "
                    "that rotates."
                )
        changed = parse(AttentionScheme, merge(dump(self), dict(fields)), where=where)
        if changed.learned() != self.learned():
            raise ConfigError(
                f"{where} changes which parameters exist ({self.learned()} to "
                f"{changed.learned()}). Keep qk_norm, ssmax, gate, bias, sink and fuse as the "
                "model has them."
            )
        return changed

    def learned(self) -> "LearnedParameters":
        """The learned parameters that the scheme has beside its projections."""
        match self.position:
            case Rope() | Nope():
                pass
            case never:
                assert_never(never)
        gate = None if gate_shape(self.gate, 1, 1, 1) is None else self.gate
        bias = self.bias if biased_projections(self.bias) else None
        scale = learned_scale(self.score_scale)
        fuse = None if self.fuse is None or not learned_fuse(self.fuse.gate) else self.fuse.gate
        return LearnedParameters(self.qk_norm.learned(), scale, gate, bias, self.sink, fuse)


def views_problem(scheme: AttentionScheme) -> str | None:
    """Return, in one line, what is wrong with a scheme's two views; None if nothing is."""
    near, together = scheme.near, [n for n in ("fuse", "split") if getattr(scheme, n) is not None]
    if near is None:
        if not together:
            return None
        return f"{together[0]} has no second view (near is null). Give near, or leave it out."
    if len(together) != 1:
        what = "neither fuse nor split" if not together else "fuse and split"
        return (
            f"near has {what}. Give one: fuse for both views in every head, split for heads of one "
            "view or the other."
        )
    if scheme.chunk is not None:
        return f"near does not go with chunk={scheme.chunk}. Use window for the far view."
    if scheme.sink:
        return "near does not go with sink: true. Leave one out."
    if learned_scale(near.score_scale) is not None:
        return (
            f"near.score_scale.kind={near.score_scale.kind} is learned, and a layer learns one "
            "scale, the far view's. Use another for near."
        )
    if scheme.window is not None and (near.window is None or near.window > scheme.window):
        found = "null" if near.window is None else near.window
        return (
            f"near.window={found} is wider than the far view (window={scheme.window}). Use "
            f"{scheme.window} or less, or window: null."
        )
    return None


@dataclass(frozen=True)
class LearnedParameters:
    """The learned parameters of a scheme beside its projections. Two schemes with equal ones have
    the same tensors, so that the weights of one can be taken over by the other."""

    qk_norm: tuple[str, str] | None  # over and weight
    score_scale: str | None  # its kind
    gate: str | None = None  # what has a value
    bias: str | None = None  # the projections that have one
    sink: bool = False
    fuse: str | None = None  # what has a share of the near view

    def __str__(self) -> str:
        """In words, "none" when there are none. The words may change: nothing is made of them."""
        parts = []
        if self.qk_norm is not None:
            parts.append("qk_norm over {}, weight {}".format(*self.qk_norm))
        if self.score_scale is not None:
            parts.append(f"{self.score_scale} scale")
        if self.gate is not None:
            parts.append(f"gate per {self.gate}")
        if self.bias is not None:
            parts.append(f"bias of {self.bias}")
        if self.sink:
            parts.append("sinks")
        if self.fuse is not None:
            parts.append(f"fuse per {self.fuse}")
        return " and ".join(parts) or "none"
