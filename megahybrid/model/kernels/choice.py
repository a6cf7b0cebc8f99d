"""Which kernel each kind of layer has: resolved once, told, kept in checkpoints, pinned."""

import torch

from megahybrid.config.training import KernelConfig
from megahybrid.model.kernels import choose
from megahybrid.model.kernels.documents import Documents

KINDS = ("full", "windowed")


def resolve_kernels(
    wanted: KernelConfig,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    pinned: dict[str, str] | None = None,
) -> dict[str, str]:
    """{"device", "full", "windowed"}: what the run file names, else what the checkpoint had on the
    same kind of device (so that a resume repeats its bits), else the fastest."""
    same_device = pinned is not None and pinned.get("device") == device.type
    kept = pinned if pinned is not None and same_device else {}
    # The general case, with documents and a window shorter than the row: it serves every batch.
    documents = Documents(torch.zeros(1, 2, dtype=torch.int64))
    chosen = {"device": device.type}
    for kind, window in zip(KINDS, (None, 1), strict=True):
        name = getattr(wanted, kind)
        if name == "auto":
            name = kept.get(kind) or choose(window, 2, documents, device, dtype, head_dim)
        chosen[kind] = name
    return chosen
