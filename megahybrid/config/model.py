"""`ModelConfig`: the shape of the network and the sequence of its attention schemes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megahybrid.config import limits
from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.base import Frozen
from megahybrid.config.layer_plan import LayerPlan

Block = Literal["pre_norm", "post_norm", "sandwich", "parallel"]
NormKind = Literal["rms", "layernorm"]
Activation = Literal["silu", "gelu_tanh"]


class ModelConfig(Frozen):
    """A decoder: embedding, blocks of attention and a gated MLP, a final norm, a head."""

    vocab_size: Annotated[int, limits.VOCABULARY] = Field(
        ge=1, description="tokens in the vocabulary, without padding"
    )
    hidden_size: Annotated[int, limits.WIDTH] = Field(
        ge=1, description="width of the residual stream"
    )
    intermediate_size: Annotated[int, limits.WIDTH] = Field(
        ge=1, description="width of the gated MLP"
    )
    num_heads: Annotated[int, limits.HEADS] = Field(ge=1, description="query heads")
    num_kv_heads: Annotated[int, limits.HEADS] = Field(
        ge=1,
        default_factory=lambda data: data["num_heads"],
        description="key and value heads; num_heads when left out",
    )
    head_dim: Annotated[int, limits.HEAD_DIM] = Field(
        ge=1,
        default_factory=lambda data: max(1, data["hidden_size"] // data["num_heads"]),
        description="dimensions of one head; hidden_size / num_heads when left out",
    )
    block: Block = Field(
        default="pre_norm",
        description="pre_norm: x + f(norm(x)); post_norm: x + norm(f(x)), the reordered norm of "
        "OLMo 2, not the original norm(x + f(x)); sandwich: x + norm(f(norm(x))); "
        "parallel: one norm, x + attention + mlp",
    )
    norm: NormKind = Field(
        default="rms", description="kind of every norm but QK-norm; layernorm has no bias"
    )
    eps: float = Field(default=1e-5, gt=0, description="added to the variance in every norm")
    tie_embeddings: bool = Field(default=True, description="the head is the embedding's matrix")
    logit_scale: float = Field(default=1.0, gt=0, description="multiplies the final logits")
    logit_softcap: float | None = Field(
        default=None,
        gt=0,
        description="c: the final logits z, scaled before, become c tanh(z / c); null: z",
    )
    embedding_scale: float = Field(
        default=1.0, gt=0, description="multiplies the embedding where it is read, not as a head"
    )
    residual_scale: float = Field(
        default=1.0, gt=0, description="r: a block adds r f(x) to the residual stream"
    )
    activation: Activation = Field(
        default="silu",
        description="of the MLP's gate: down(activation(gate) * up), SwiGLU with silu, GeGLU with "
        "gelu_tanh (arXiv 2002.05202; GELU by its tanh formula, as Gemma has it)",
    )
    initial_std: float = Field(
        default=0.02, gt=0, description="standard deviation of the initial weights"
    )
    embedding_std: float | None = Field(
        default=None, gt=0, description="the same of the embedding; null: initial_std"
    )
    layer_plan: LayerPlan = Field(description="which attention scheme each layer has")

    @model_validator(mode="before")
    @classmethod
    def _check_default_head_dim(cls, data: Any) -> Any:
        if isinstance(data, dict) and "head_dim" not in data:
            hidden, heads = data.get("hidden_size"), data.get("num_heads")
            if type(hidden) is int and type(heads) is int and heads > 0 and hidden % heads:
                raise ValueError(
                    f"num_heads={heads} does not divide hidden_size={hidden}. "
                    "Change one of them, or give head_dim."
                )
        return data

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}. "
                f"Use {either(divisors(self.num_heads))}."
            )
        return self

    @model_validator(mode="after")
    def _check_rotations(self) -> "ModelConfig":
        problems = rotation_problems(self.layer_plan.schemes, self.head_dim)
        if problems:
            raise ValueError(problems[0])
        return self


def rotation_problems(
    schemes: Mapping[str, AttentionScheme], head_dim: int, where: str = "layer_plan.schemes"
) -> list[str]:
    """Return the mistakes in the rotations of schemes at this head_dim, one line each."""
    lines = []
    found = [(f"{where}.{name}", scheme.position) for name, scheme in schemes.items()]
    found += [(f"{where}.{n}.near", s.near.position) for n, s in schemes.items() if s.near]
    for view, each in found:
        position = rotation_of(each)
        if position is None:
            continue
        path = f"{view}.position"
        rotary_dim, scaling = position.rotary_dim(head_dim), position.frequency_scaling()
        if position.rotary_fraction == 1.0 and head_dim % 2:
            lines.append(
                f"{path}.kind=rope rotates pairs of dimensions (model.head_dim={head_dim} is odd). "
                "Use an even head_dim."
            )
        elif rotary_dim < 2:
            lines.append(
                f"{path}.rotary_fraction={position.rotary_fraction} rotates no pair "
                f"(model.head_dim={head_dim}). Raise it, or use kind: nope."
            )
        elif position.spectrum_dim(head_dim) % 2:
            lines.append(
                f"{path}.spectrum={position.spectrum} is of pairs of a whole head "
                f"(model.head_dim={head_dim} is odd). Use an even head_dim, or spectrum: rotated."
            )
        elif scaling is not None and (
            problem := scaling.problem(position.spectrum_dim(head_dim), head_dim)
        ):
            lines.append(f"{path}.scaling.{problem}")
    return lines


def divisors(number: int) -> list[int]:
    """The divisors of `number`, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def either(numbers: Sequence[object]) -> str:
    """ "1, 2 or 4"."""
    texts = [str(n) for n in numbers]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " or " + texts[-1]


def nearest_multiples(value: int, of: int) -> str:
    """ "Use 8192 or 12288.", the multiples around a value that is none."""
    below, above = value // of * of, -(-value // of) * of
    return f"Use {below} or {above}." if below else f"Use {above}."
