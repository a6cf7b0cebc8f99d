"""RMSNorm, bias-free LayerNorm, and the normalisation of queries and keys.

All compute in fp32 or better. A weight that every tensor rank holds whole acts on a shard of the
sequence or of the heads, so its gradient is a partial sum: it is read through `copy_to_tensor`,
which adds the parts up in backward.
"""

from collections.abc import Callable
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import QKNorm
from megahybrid.config.model import ModelConfig
from megahybrid.errors import ConfigError
from megahybrid.parallel.collectives import copy_to_tensor, reduce_both
from megahybrid.parallel.linear import sharded_parameter
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import Segment

RmsFunction = Callable[[Tensor, Tensor, float], Tensor]


def make_norm(
    config: ModelConfig, name: str, mesh: ParallelMesh, implementation: str = "torch"
) -> nn.Module:
    """The model's kind of norm over hidden_size; its weight is `name`.weight."""
    match config.norm:
        case "rms":
            return RMSNorm(config.hidden_size, name, mesh, config.eps, implementation)
        case "layernorm":
            return LayerNorm(config.hidden_size, name, mesh, config.eps)
        case other:
            assert_never(other)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight (arXiv 1910.07467)."""

    def __init__(
        self,
        features: int,
        name: str,
        mesh: ParallelMesh,
        eps: float,
        implementation: str = "torch",
    ) -> None:
        super().__init__()
        self.tensor, self.eps = mesh.tensor, eps
        self.weight = _weight(f"{name}.weight", (features,), None, mesh)
        self.function = rms_function(implementation)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """x normalised along its last axis."""
        return self.function(x, copy_to_tensor(self.weight, self.tensor), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight, biased variance, no bias (arXiv 1607.06450)."""

    def __init__(self, features: int, name: str, mesh: ParallelMesh, eps: float) -> None:
        super().__init__()
        self.tensor, self.eps = mesh.tensor, eps
        self.weight = _weight(f"{name}.weight", (features,), None, mesh)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """x normalised along its last axis."""
        weight = copy_to_tensor(self.weight, self.tensor)
        return F.layer_norm(x, weight.shape, weight, None, self.eps)


def rms_function(implementation: str) -> RmsFunction:
    """(x, weight, eps) -> normalised x. `torch`, or `apex` for NVIDIA apex's fused kernel.

    Raises ConfigError where apex is asked for and not there, or is the package of the same name
    that PyPI serves.
    """
    if implementation == "torch":
        return lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
    if implementation != "apex":
        raise ConfigError(f"kernels.norm={implementation} is not known. Use torch or apex.")
    try:
        import apex
    except ImportError:
        raise ConfigError(
            "kernels.norm=apex is not installed. Build NVIDIA apex from its repository "
            "(it has no wheel), or use torch."
        ) from None
    try:
        # Detected by what it holds, never by its name: NVIDIA apex alone has this module.
        from apex.normalization import FusedRMSNorm  # noqa: F401
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError:
        raise ConfigError(
            f"kernels.norm=apex found {apex.__file__}, which is not NVIDIA apex but PyPI's "
            "package of that name. Uninstall it and build NVIDIA apex, or use torch."
        ) from None
    return lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


class QKNormModule(nn.Module):
    """Normalises queries and keys, before the rotation.

    Weights: over=head shared [head_dim], replicated; per_head [heads, head_dim], cut by heads;
    over=projection [heads * head_dim], cut by heads; weight=none has none. With more tensor ranks
    than KV heads the key's weight is replicated like the key projection, and each rank reads the
    rows of its head.
    `name` is the layer's attention, for example blocks.3.attention.
    """

    def __init__(
        self,
        qk_norm: QKNorm,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        name: str,
        mesh: ParallelMesh,
        eps: float,
    ) -> None:
        super().__init__()
        assert qk_norm.kind != "none"
        self.kind: Literal["rms", "layernorm"] = qk_norm.kind
        self.qk_norm, self.head_dim, self.eps = qk_norm, head_dim, eps
        self.tensor = mesh.tensor
        self.heads = (num_heads, num_kv_heads)
        self.query_weight = self._make_weight(f"{name}.query_norm.weight", num_heads, mesh)
        self.key_weight = self._make_weight(f"{name}.key_norm.weight", num_kv_heads, mesh)

    def _make_weight(self, name: str, heads: int, mesh: ParallelMesh) -> nn.Parameter | None:
        if self.qk_norm.weight == "none":
            return None
        cut = 0 if heads >= mesh.tensor.size else None
        if self.qk_norm.over == "projection":
            return _weight(name, (heads * self.head_dim,), cut, mesh)
        if self.qk_norm.weight == "per_head":
            return _weight(name, (heads, self.head_dim), cut, mesh)
        return _weight(name, (self.head_dim,), None, mesh)

    def forward(
        self,
        q: Float[Tensor, "seq batch heads_local head_dim"],
        k: Float[Tensor, "seq batch kv_heads_local head_dim"],
    ) -> tuple[
        Float[Tensor, "seq batch heads_local head_dim"],
        Float[Tensor, "seq batch kv_heads_local head_dim"],
    ]:
        """The normalised queries and keys."""
        weights = (
            self._read(self.query_weight, q.shape[2], self.heads[0]),
            self._read(self.key_weight, k.shape[2], self.heads[1]),
        )
        if self.qk_norm.over == "projection":
            return self._over_projection(q, k, weights)
        return self._over_head(q, weights[0]), self._over_head(k, weights[1])

    def _read(self, weight: nn.Parameter | None, heads_local: int, heads: int) -> Tensor | None:
        """This rank's weight: [head_dim], or [heads_local, head_dim]; None where there is none."""
        if weight is None:
            return None
        if self.qk_norm.over == "head" and self.qk_norm.weight == "shared":
            return copy_to_tensor(weight, self.tensor)
        if heads >= self.tensor.size:
            return weight.view(heads_local, self.head_dim)
        head = self.tensor.rank * heads // self.tensor.size
        whole = copy_to_tensor(weight, self.tensor).view(heads, self.head_dim)
        return whole[head : head + heads_local]

    def _over_head(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None or weight.dim() == 1:
            return self._of_each_head(x, weight)
        return (self._of_each_head(_wide(x), None) * weight).to(x.dtype)

    def _of_each_head(self, x: Tensor, weight: Tensor | None) -> Tensor:
        shape = (self.head_dim,)
        match self.kind:
            case "rms":
                return F.rms_norm(x, shape, weight, self.eps)
            case "layernorm":
                return F.layer_norm(x, shape, weight, None, self.eps)
            case other:
                assert_never(other)

    def _over_projection(
        self, q: Tensor, k: Tensor, weights: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        wide = (_wide(q), _wide(k))
        match self.kind:
            case "rms":
                pass
            case "layernorm":
                means = self._means(*(x.sum((-2, -1)) for x in wide))
                wide = (wide[0] - means[0], wide[1] - means[1])
            case other:
                assert_never(other)
        variances = self._means(*(x.square().sum((-2, -1)) for x in wide))
        q_normed, k_normed = (
            _weighted(x * torch.rsqrt(variance + self.eps), weight)
            for x, variance, weight in zip(wide, variances, weights, strict=True)
        )
        return q_normed.to(q.dtype), k_normed.to(k.dtype)

    def _means(self, q_sum: Tensor, k_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the whole projections [seq, batch, 1, 1] from this rank's sums [seq, batch].

        One reduction serves both. A KV head that several ranks hold is summed by each of them.
        """
        heads, kv_heads = self.heads
        held_by = max(1, self.tensor.size // kv_heads)
        means = reduce_both(
            torch.stack(
                (
                    q_sum / (heads * self.head_dim),
                    k_sum / (kv_heads * self.head_dim * held_by),
                )
            ),
            self.tensor,
        )[..., None, None]
        return means[0], means[1]


def _weight(name: str, shape: tuple[int, ...], dim: int | None, mesh: ParallelMesh) -> nn.Parameter:
    return sharded_parameter((Segment(name, shape, dim),), mesh, value=1.0)


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x if x.dtype == torch.float64 else x.float()
