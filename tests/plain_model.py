"""The independent oracle: the whole model in the most obvious way, in one process.

Nothing of megahybrid but its configuration types is used here: dense masks, explicit softmax, a
loop over layers, every formula written again from its source. Tensors are plain leaves under their
canonical names, so that gradients are read as `tensors[name].grad`. Slow on purpose; use it at
lengths and widths where a [batch, heads, seq, seq] array of scores is small.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, NearView, QKNorm, Rope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from tests.plain_rotation import rotate

IGNORED = -100  # a target that does not count


def canonical_shapes(
    config: ModelConfig, plan: LayerPlan | Sequence[AttentionScheme] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor by name; linear weights are [out, in]."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, hidden)}
    for index, scheme in enumerate(_schemes(config, plan)):
        block = f"blocks.{index}"
        if config.block == "parallel":
            shapes[f"{block}.norm.weight"] = (hidden,)
        else:
            assert config.block in ("pre_norm", "post_norm", "sandwich")
            outer = ("", "_output") if config.block == "sandwich" else ("",)
            for part in outer:
                shapes[f"{block}.attention{part}_norm.weight"] = (hidden,)
                shapes[f"{block}.mlp{part}_norm.weight"] = (hidden,)
        shapes[f"{block}.attention.query.weight"] = (heads * head_dim, hidden)
        shapes[f"{block}.attention.key.weight"] = (kv_heads * head_dim, hidden)
        shapes[f"{block}.attention.value.weight"] = (kv_heads * head_dim, hidden)
        shapes[f"{block}.attention.output.weight"] = (hidden, heads * head_dim)
        if scheme.qk_norm.kind != "none" and scheme.qk_norm.weight != "none":
            for which, count in (("query_norm", heads), ("key_norm", kv_heads)):
                if scheme.qk_norm.over == "projection":
                    shape: tuple[int, ...] = (count * head_dim,)
                elif scheme.qk_norm.weight == "per_head":
                    shape = (count, head_dim)
                else:
                    assert (scheme.qk_norm.over, scheme.qk_norm.weight) == ("head", "shared")
                    shape = (head_dim,)
                shapes[f"{block}.attention.{which}.weight"] = shape
        if scheme.bias != "none":
            assert scheme.bias == "qkv"
            shapes[f"{block}.attention.query.bias"] = (heads * head_dim,)
            shapes[f"{block}.attention.key.bias"] = (kv_heads * head_dim,)
            shapes[f"{block}.attention.value.bias"] = (kv_heads * head_dim,)
        if scheme.sink:
            shapes[f"{block}.attention.sinks"] = (heads,)
        if scheme.gate != "none":
            each = {"head": 1, "element": head_dim}[scheme.gate]
            shapes[f"{block}.attention.output_gate.weight"] = (heads * each, hidden)
        if scheme.fuse is not None and scheme.fuse.gate != "fixed":
            assert scheme.fuse.gate in ("head", "token")
            if scheme.fuse.gate == "token":
                shapes[f"{block}.attention.fuse_gate.weight"] = (heads, hidden)
            shapes[f"{block}.attention.fuse_gate.bias"] = (heads,)
        if scheme.score_scale.kind == "ssmax":
            shapes[f"{block}.attention.logit_scale"] = (heads,)
        shapes[f"{block}.mlp.gate.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.up.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.down.weight"] = (hidden, inner)
    shapes["final_norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_tensors(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64, std: float = 0.15
) -> dict[str, Tensor]:
    """Leaves with gradients, drawn so that everything matters: no weight is one, zero or small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in canonical_shapes(config).items():
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            draw = 1 + 0.3 * draw
        elif name.endswith(".bias"):
            draw = 0.5 * draw
        elif name.endswith(".sinks"):
            draw = 1 + 0.5 * draw
        elif name.endswith("logit_scale"):
            draw = 0.6 + 0.2 * draw
        else:
            draw = std * draw
        # rounded to fp32 first: a float64 and an fp32 model then start from the same numbers
        tensors[name] = draw.float().to(dtype).requires_grad_()
    return tensors


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The 2-norm of the difference over the 2-norm of `truth` (0 where both are zero)."""
    difference = (value.detach().double() - truth.detach().double()).norm().item()
    size = truth.detach().double().norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def visible(starts: Tensor, window: int | None, chunk: int | None = None) -> Tensor:
    """bool [batch, seq (query), seq (key)]: earlier keys of the same document, at most `window`, or
    those of the query's own `chunk`, counted from the start of its document."""
    seq = starts.shape[1]
    query = torch.arange(seq)[:, None]
    key = torch.arange(seq)[None, :]
    mask = (key <= query)[None] & (key[None] >= starts[:, :, None])
    if window is not None:
        mask = mask & (query - key < window)[None]
    if chunk is not None:
        number = (torch.arange(seq)[None] - starts) // chunk  # of each token, in its own document
        mask = mask & (number[:, :, None] == number[:, None, :])
    return mask


def query_factor(
    scheme: AttentionScheme | NearView,
    positions: Tensor,
    keys: Tensor,
    head_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """What a score is multiplied by, [batch, seq], but for SSMax's learned s.

    `positions` are within the document, `keys` how many keys the query sees. What depends on the
    position is fp32 whatever `dtype` is, like an angle.
    """
    scale = scheme.score_scale
    if scale.kind == "fixed":
        return torch.full(positions.shape, scale.scale, dtype=dtype)
    if scale.kind == "sqrt_dim":
        factor = torch.ones(positions.shape)
    elif scale.kind == "llama4":
        factor = 1 + scale.coefficient * torch.log1p(
            ((positions + scale.offset) // scale.floor).float()
        )
    elif scale.kind == "power":
        factor = ((1 + (positions + 1).double() / scale.length) ** scale.exponent).float()
    elif scale.kind == "log_from":
        factor = 1 + scale.coefficient * (keys / scale.length).clamp(min=1).log()
    elif scale.kind == "log":
        factor = torch.log(scale.base + keys.float()) / torch.tensor(scale.base).log()
    else:
        assert scale.kind == "ssmax"
        factor = torch.log(keys.float())
    return factor.to(dtype) * head_dim**-0.5


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension(s) that `weight` broadcasts to; the mean is over the last one."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Bias-free, biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight


NORMS = {"rms": rms_norm, "layernorm": layer_norm}


def _schemes(
    config: ModelConfig, plan: LayerPlan | Sequence[AttentionScheme] | None
) -> tuple[AttentionScheme, ...]:
    if plan is None:
        plan = config.layer_plan
    return plan.expand() if isinstance(plan, LayerPlan) else tuple(plan)


class PlainModel:
    """The model of `config` with the given canonical tensors; `plan` replaces the config's own."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        plan: LayerPlan | Sequence[AttentionScheme] | None = None,
    ) -> None:
        self.config = config
        self.schemes = _schemes(config, plan)
        shapes = canonical_shapes(config, plan)
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert given == shapes, f"{set(given.items()) ^ set(shapes.items())}"
        self.tensors = tensors

    def logits(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """tokens, starts [batch, seq] -> [batch, seq, vocab]."""
        if starts is None:
            starts = torch.zeros_like(tokens)
        x = self.config.embedding_scale * self.tensors["embedding.weight"][tokens]
        for index, scheme in enumerate(self.schemes):
            x = self._block(x, f"blocks.{index}", scheme, starts)
        x = self._norm(x, "final_norm")
        tied = self.config.tie_embeddings
        head = self.tensors["embedding.weight" if tied else "head.weight"]
        logits, cap = self.config.logit_scale * (x @ head.T), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(
        self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of -log p(target) over the targets that count, and each one [batch, seq] (else 0)."""
        logits = self.logits(tokens, starts)
        counts = targets != IGNORED
        shifted = logits - logits.amax(-1, keepdim=True).detach()
        log_probability = shifted - shifted.exp().sum(-1, keepdim=True).log()
        chosen = log_probability.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        per_token = torch.where(counts, -chosen, torch.zeros_like(chosen))
        return per_token.sum(), per_token.detach()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        norm = NORMS[self.config.norm]
        return norm(x, self.tensors[f"{name}.weight"], self.config.eps)

    def _block(self, x: Tensor, name: str, scheme: AttentionScheme, starts: Tensor) -> Tensor:
        r = self.config.residual_scale
        if self.config.block == "parallel":
            u = self._norm(x, f"{name}.norm")
            return x + r * (self._attention(u, name, scheme, starts) + self._mlp(u, name))
        if self.config.block == "pre_norm":
            u = self._norm(x, f"{name}.attention_norm")
            x = x + r * self._attention(u, name, scheme, starts)
            return x + r * self._mlp(self._norm(x, f"{name}.mlp_norm"), name)
        if self.config.block == "sandwich":
            u = self._norm(x, f"{name}.attention_norm")
            branch = self._attention(u, name, scheme, starts)
            x = x + r * self._norm(branch, f"{name}.attention_output_norm")
            branch = self._mlp(self._norm(x, f"{name}.mlp_norm"), name)
            return x + r * self._norm(branch, f"{name}.mlp_output_norm")
        assert self.config.block == "post_norm"
        x = x + r * self._norm(self._attention(x, name, scheme, starts), f"{name}.attention_norm")
        return x + r * self._norm(self._mlp(x, name), f"{name}.mlp_norm")

    def _mlp(self, u: Tensor, name: str) -> Tensor:
        gate = u @ self.tensors[f"{name}.mlp.gate.weight"].T
        up = u @ self.tensors[f"{name}.mlp.up.weight"].T
        if self.config.activation == "silu":
            active = gate * torch.sigmoid(gate)
        else:
            assert self.config.activation == "gelu_tanh"
            cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            active = gate / 2 * (1 + torch.tanh(cubic))
        return (active * up) @ self.tensors[f"{name}.mlp.down.weight"].T

    def _attention(self, u: Tensor, name: str, scheme: AttentionScheme, starts: Tensor) -> Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q = self._heads(u, f"{name}.attention", "query", heads, scheme.qk_norm)
        k = self._heads(u, f"{name}.attention", "key", kv_heads, scheme.qk_norm)
        v = self._heads(u, f"{name}.attention", "value", kv_heads, QKNorm())
        owner = [head // (heads // kv_heads) for head in range(heads)]  # of each query head
        weights = self._weights(q, k[:, owner], name, scheme, starts)
        if scheme.near is not None:
            # One distribution of both views; a head that is split has one of them.
            near = self._weights(q, k[:, owner], name, scheme, starts, near=True)
            share = self._near_share(u, name, scheme, owner)
            weights = share * near + (1 - share) * weights
        mixed = (weights @ v[:, owner]).transpose(1, 2)  # [batch, seq, heads, head_dim]
        if scheme.gate != "none":
            gate = u @ self.tensors[f"{name}.attention.output_gate.weight"].T
            if scheme.gate == "head":
                gate = gate[..., None]
            mixed = mixed * torch.sigmoid(gate.view(*mixed.shape[:3], -1))
        mixed = mixed.flatten(2)
        return mixed @ self.tensors[f"{name}.attention.output.weight"].T

    def _weights(
        self,
        q: Tensor,
        k: Tensor,
        name: str,
        scheme: AttentionScheme,
        starts: Tensor,
        near: bool = False,
    ) -> Tensor:
        """The softmax of the scores, [batch, heads, seq, seq]; `near`: in the scheme's near view.

        q and k are [batch, heads, seq, head_dim], normed and not rotated.
        """
        if near:
            assert scheme.near is not None and scheme.chunk is None
            position, window, view = scheme.near.position, scheme.near.window, scheme.near
        else:
            position, window, view = scheme.position, scheme.window, scheme
        positions = torch.arange(q.shape[2])[None] - starts
        if isinstance(position, Rope):
            q, k = (rotate(part, positions, position) for part in (q, k))
        else:
            assert position.kind == "nope"
        mask = visible(starts, window, scheme.chunk)
        factor = query_factor(view, positions, mask.sum(-1), self.config.head_dim, q.dtype)
        scores = (q @ k.transpose(-1, -2)) * factor[:, None, :, None]
        if view.score_scale.kind == "ssmax":
            scores = scores * self.tensors[f"{name}.attention.logit_scale"][None, :, None, None]
        scores = scores.masked_fill(~mask[:, None], -math.inf)
        most = scores.amax(-1, keepdim=True).detach()
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        if scheme.sink:
            sinks = self.tensors[f"{name}.attention.sinks"][None, :, None, None]
            total = total + (sinks - most).exp()
        return weights / total

    def _near_share(
        self, u: Tensor, name: str, scheme: AttentionScheme, owner: Sequence[int]
    ) -> Tensor:
        """The share g of the near view, [batch or 1, heads, seq or 1, 1]."""
        if scheme.split is not None:
            near = [head % scheme.split.of < scheme.split.near for head in owner]
            return torch.tensor(near, dtype=u.dtype)[None, :, None, None]
        assert scheme.fuse is not None
        if scheme.fuse.gate == "fixed":
            return torch.full((1, 1, 1, 1), scheme.fuse.initial, dtype=u.dtype)
        score = self.tensors[f"{name}.attention.fuse_gate.bias"]
        if scheme.fuse.gate == "token":
            score = u @ self.tensors[f"{name}.attention.fuse_gate.weight"].T + score
        else:
            score = score[None, None]
        return torch.sigmoid(score).transpose(1, 2)[..., None]

    def _heads(self, u: Tensor, name: str, which: str, count: int, qk_norm: QKNorm) -> Tensor:
        """[batch, seq, hidden] -> [batch, count, seq, head_dim], normalised where asked."""
        projected = u @ self.tensors[f"{name}.{which}.weight"].T
        if f"{name}.{which}.bias" in self.tensors:
            projected = projected + self.tensors[f"{name}.{which}.bias"]
        split = (count, self.config.head_dim)
        if qk_norm.kind == "none":
            return projected.unflatten(-1, split).transpose(1, 2)
        norm = NORMS[qk_norm.kind]
        weight = self.tensors.get(f"{name}.{which}_norm.weight", torch.ones(()))
        if qk_norm.over == "projection":
            projected = norm(projected, weight, self.config.eps).unflatten(-1, split)
        else:  # a per-head weight [heads, head_dim] and a shared one [head_dim] broadcast alike
            projected = norm(projected.unflatten(-1, split), weight, self.config.eps)
        return projected.transpose(1, 2)
