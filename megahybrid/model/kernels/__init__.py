"""attend(): causal attention with a window, documents and grouped heads, by whichever kernel fits.

A kernel that cannot do what is asked refuses; none attends to more or less than asked.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.model.kernels import flex, varlen
from megahybrid.model.kernels.blocked import attend_blocked
from megahybrid.model.kernels.cudnn import attend_cudnn
from megahybrid.model.kernels.cudnn_frontend import attend_cudnn_frontend
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.flash import attend_flash
from megahybrid.model.kernels.flex import attend_flex
from megahybrid.model.kernels.reference import attend_reference
from megahybrid.model.kernels.sdpa import attend_sdpa
from megahybrid.model.kernels.varlen import attend_varlen

__all__ = ["KERNELS", "Documents", "attend", "choose"]

KERNELS = (
    "reference",
    "blocked",
    "sdpa",
    "cudnn",
    "cudnn_frontend",
    "varlen",
    "flex",
    "fa3",
    "fa4",
)


def attend(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    *,
    window: int | None,
    documents: Documents | None,
    scale: float,
    kernel: str = "auto",
) -> Float[Tensor, "seq batch heads head_dim"]:
    """softmax(scale * q kᵀ) v over the keys each query sees; KV head = head // (heads / kv_heads).

    `window` counts visible keys, the query's own included (None: all earlier ones); `documents`
    hides other documents of the row (None: a row is one document). Softmax is fp32 or better.
    Raises ConfigError where `kernel` cannot do it.
    """
    seq, batch, heads, head_dim = q.shape
    if heads % k.shape[2]:
        raise ConfigError(
            f"model.num_kv_heads={k.shape[2]} does not divide num_heads={heads} in attend(). "
            "Use a divisor."
        )
    if window is not None and window < 1:
        raise ConfigError(f"window={window} hides a query's own key. Use 1 or more, or null.")
    if documents is not None and tuple(documents.starts.shape) != (batch, seq):
        raise ConfigError(
            f"documents cover {tuple(documents.starts.shape)} (batch, seq) but q has "
            f"({batch}, {seq}). Build them from the same batch."
        )
    if kernel == "auto":
        kernel = choose(window, seq, documents, q.device, q.dtype, head_dim)
    if window is not None and window >= seq:
        window = None  # every earlier key is inside it
    if kernel == "blocked":
        if window is None:
            return attend_sdpa(q, k, v, documents=documents, scale=scale)  # one block: no bands
        return attend_blocked(q, k, v, window=window, documents=documents, scale=scale)
    if kernel in ("sdpa", "cudnn"):
        if window is not None:
            raise ConfigError(f"kernels={kernel} has no window (window={window}). Use blocked.")
        run = attend_sdpa if kernel == "sdpa" else attend_cudnn
        return run(q, k, v, documents=documents, scale=scale)
    if kernel == "cudnn_frontend":
        return attend_cudnn_frontend(q, k, v, window=window, documents=documents, scale=scale)
    if kernel in ("fa3", "fa4"):
        return attend_flash(kernel, q, k, v, window=window, documents=documents, scale=scale)
    if kernel == "varlen":
        return attend_varlen(q, k, v, window=window, documents=documents, scale=scale)
    if kernel == "flex":
        return attend_flex(q, k, v, window=window, documents=documents, scale=scale)
    if kernel == "reference":
        return attend_reference(q, k, v, window=window, documents=documents, scale=scale)
    raise ConfigError(f"kernels={kernel} is not a kernel. Use auto or one of {', '.join(KERNELS)}.")


def choose(
    window: int | None,
    seq: int,
    documents: Documents | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> str:
    """The fastest exact kernel with a backward for this layer."""
    full = window is None or window >= seq
    if full and documents is None:
        return "sdpa"
    if varlen.refusal(device, dtype, head_dim) is None:
        return "varlen"
    if full:
        return "sdpa"
    # In fp32 no fused kernel serves, and flex would be compiled for each window and length:
    # a tiny run on a GPU would wait for its compiler longer than it trains.
    if dtype == torch.float32 or flex.refusal(device, dtype, head_dim):
        return "blocked"
    return "flex"
