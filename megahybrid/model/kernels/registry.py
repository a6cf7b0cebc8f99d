"""The table of kernels: adding one is its file and its line here."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.model.kernels import (
    blocked,
    cudnn,
    cudnn_frontend,
    flash,
    flex,
    masked,
    reference,
    sdpa,
    varlen,
)
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.kernel import Halves, Kernel, Measured
from megahybrid.model.kernels.sinks import attend_with_sinks, with_sinks
from megahybrid.model.kernels.spec import AttentionSpec, Place

# In the order in which measurements name them: the usual one first.
TABLE: tuple[Kernel, ...] = (
    reference.KERNEL,
    blocked.KERNEL,
    sdpa.KERNEL,
    cudnn.KERNEL,
    varlen.KERNEL,
    cudnn_frontend.KERNEL,
    flex.KERNEL,
    flash.FA3,
    flash.FA4,
    masked.KERNEL,
)
REGISTRY = {kernel.name: kernel for kernel in TABLE}
KERNELS = tuple(kernel.name for kernel in TABLE if not kernel.needs)  # those of a whole batch


def attend(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
    kernel: str = "auto",
) -> Float[Tensor, "seq batch heads head_dim"]:
    """softmax(scale * q kᵀ) v over the keys each query sees; KV head = head // (heads / kv_heads).

    The queries are those of the last `seq` of `keys` tokens: `spec.before` says how many more keys
    there are, and the documents cover all of them.

    Softmax is fp32 or better. Raises ConfigError where `kernel` cannot do what `spec` asks: none
    attends to more or less than asked.
    """
    _check(q, k, spec)
    spec = spec.within(len(k))
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    place = Place(q.device, q.dtype, q.shape[-1], gradients)
    able = _able(kernel, spec, place)
    if spec.sinks is not None and (apart := able.sums(spec, place)) is not None:
        return attend_with_sinks(apart, q, k, v, spec)
    return able.attend(q, k, v, spec)


def halves(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
    kernel: str = "auto",
) -> tuple[Halves, AttentionSpec] | None:
    """Return the forward and the backward of `attend` apart, and the spec to call both with; None
    where the kernel has them together only. Raises ConfigError as `attend` does."""
    _check(q, k, spec)
    spec = spec.within(len(k))
    place = Place(q.device, q.dtype, q.shape[-1])
    able = _able(kernel, spec, place)
    if spec.sinks is not None:
        sums = able.sums(spec, place)
        return sums and (with_sinks(sums), spec)
    apart = able.halves(spec, place)
    return apart and (apart, spec)


def choose(
    window: int | None,
    seq: int,
    documents: Documents | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    before: int | None = None,
    sinks: bool = False,
) -> str:
    """Return the name of the fastest exact kernel with a backward for a layer, by rule: for rows of
    `seq` keys, `before` of which come before the first query."""
    spec = AttentionSpec(scale=1.0, window=window, documents=documents, before=before)
    spec = _with(spec, sinks)
    return _preferred(spec.within(seq), Place(device, dtype, head_dim))


def measured(
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    before: int | None = None,
    sinks: bool = False,
) -> list[str]:
    """Return the names of the kernels with a backward that are measured for layers with this
    window, and with keys before the first query if `before` has their number; the usual one
    first."""
    spec = AttentionSpec(scale=1.0, window=window, before=before or None)
    spec = _with(spec, sinks)
    place = Place(device, dtype, head_dim)
    found: dict[Measured, list[str]] = {kind: [] for kind in Measured}
    for kernel in TABLE:
        if dtype not in kernel.unchosen and kernel.refusal(spec, place) is None:
            found[kernel.measured].append(kernel.name)
    names = found[Measured.ALWAYS] + (found[Measured.FUSED] or found[Measured.COMPILED])
    return names or found[Measured.LAST]


def _with(spec: AttentionSpec, sinks: bool) -> AttentionSpec:
    """Return a spec that asks for sinks as well: of some, since none is computed with."""
    return replace(spec, sinks=torch.zeros(1)) if sinks else spec


def _able(kernel: str, spec: AttentionSpec, place: Place) -> Kernel:
    """Return the kernel of this name, or the one that `auto` means; raise ConfigError where it
    cannot do what is asked."""
    name = _preferred(spec, place) if kernel == "auto" else kernel
    if name not in REGISTRY:
        known = ", ".join(KERNELS)
        raise ConfigError(f"kernels={name} is not a kernel. Use auto or one of {known}.")
    why_not = REGISTRY[name].refusal(spec, place)
    if why_not is not None:
        raise ConfigError(f"kernels={name} {why_not}. {_way_out(spec, place)}")
    return REGISTRY[name]


def _preferred(spec: AttentionSpec, place: Place) -> str:
    """Return the first kernel by rank that serves, with a backward even where none is wanted: an
    evaluation goes the way of the training."""
    place = place._replace(gradients=True)
    ranks = {
        kernel.name: kernel.rank(spec)
        for kernel in TABLE
        if kernel.rank is not None
        and place.dtype not in kernel.unchosen
        and kernel.refusal(spec, place) is None
    }
    if not ranks:
        asked = " and ".join(spec.features().values())
        dtype = str(place.dtype).removeprefix("torch.")
        raise ConfigError(
            f"kernels=auto: no kernel has {asked} in {dtype} on {place.device.type}. "
            f"{_way_out(spec, place)}"
        )
    return min(ranks, key=lambda name: ranks[name])


def _way_out(spec: AttentionSpec, place: Place) -> str:
    """Return the kernels that can do what another one refused, as an advice."""
    able = [kernel for kernel in TABLE if kernel.refusal(spec, place) is None]
    names = [kernel.name for kernel in able if not kernel.quadratic] or [k.name for k in able]
    if not names:
        return "No kernel can, here."
    return f"Use {', '.join(names[:-1]) + ' or ' if names[1:] else ''}{names[-1]}."


def _check(q: Tensor, k: Tensor, spec: AttentionSpec) -> None:
    """Raise ConfigError where heads, window and documents do not fit each other."""
    seq, batch, heads = q.shape[:3]
    if heads % k.shape[2]:
        raise ConfigError(
            f"model.num_kv_heads={k.shape[2]} does not divide num_heads={heads} in attend(). "
            "Use a divisor."
        )
    if spec.window is not None and spec.window < 1:
        raise ConfigError(f"window={spec.window} hides a query's own key. Use 1 or more, or null.")
    covered = None if spec.documents is None else tuple(spec.documents.starts.shape)
    if covered is not None and covered != (batch, len(k)):
        raise ConfigError(
            f"documents cover {covered} (batch, seq) but k has ({batch}, {len(k)}). Build them "
            "from the same batch."
        )
    before = spec.before or 0
    # Without a rule for it a causal mask would be laid against the wrong corner.
    assert before >= 0 and (len(k) == seq + before or spec.visible is not None)
