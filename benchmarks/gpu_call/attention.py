"""One attention kernel alone, its self-test first: full and windowed, whole and packed rows."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.documents import document_lengths
from benchmarks.gpu_call.setting import Setting
from benchmarks.timing import timed
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.counting import attended_pairs
from megahybrid.errors import AuditError, ConfigError
from megahybrid.model.kernels import AttentionSpec, Documents, attend
from megahybrid.model.kernels.choice import why_it_failed
from megahybrid.model.selftest import run_self_test

REPEATS = 5


def rows(setting: Setting, name: str) -> Iterator[dict[str, Any]]:
    """A row for each length, kind of layer and kind of rows; where the kernel refuses or fails the
    self-test, why."""
    schemes = setting.hybrid().layer_plan.schemes
    for layer in ("windowed", "full"):
        these = {n: s for n, s in schemes.items() if (s.window is None) == (layer == "full")}
        facts = {"kernel": name, "layer": layer}
        try:
            tested(setting, name, these)
        except (AuditError, ConfigError) as error:
            yield facts | {"left_out": str(error)[:300]}
            continue
        except Exception as error:  # a kernel may fail in any way
            yield facts | {"left_out": why_it_failed(error)}
            continue
        window = max((s.window or 0 for s in these.values()), default=0) or None
        for length in setting.lengths:
            for packed in (False, True):
                where = facts | {"length": length, "packed": packed}
                try:
                    yield where | measured(setting, name, window, length, packed)
                except Exception as error:
                    yield where | {"left_out": why_it_failed(error)}
                setting.free()


def tested(setting: Setting, name: str, schemes: dict[str, AttentionScheme]) -> None:
    """The run's own self-test on this kernel. Raises AuditError."""
    _, _, head_dim = setting.heads()
    run_self_test(
        schemes,
        head_dim=head_dim,
        dtype=setting.dtype,
        device=setting.device,
        kernels=dict.fromkeys(schemes, name),
        rank=0,
    )


def measured(
    setting: Setting, name: str, window: int | None, length: int, packed: bool
) -> dict[str, Any]:
    """Seconds of forward, and of forward and backward, of one micro-batch; FLOP/s by the pairs
    that the mask lets through: 2 products forward and 5 backward, 2 FLOPs each."""
    heads, kv_heads, head_dim = setting.heads()
    count = setting.micro_rows_of(length)
    q, k, v = (
        torch.randn(
            length,
            count,
            n,
            head_dim,
            device=setting.device,
            dtype=setting.dtype,
            requires_grad=True,
        )
        for n in (heads, kv_heads, kv_heads)
    )
    grad_output = torch.randn_like(q)
    lengths = [document_lengths(length, seed) if packed else [length] for seed in range(count)]
    documents = Documents.from_lengths(lengths).to(setting.device) if packed else None

    spec = AttentionSpec(window=window, documents=documents, scale=head_dim**-0.5)

    def forward() -> torch.Tensor:
        return attend(q, k, v, spec, name)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad_output)

    for _ in range(2):
        both()
    alone, seconds = (
        min(timed(run, setting.device)[0] for _ in range(REPEATS)) for run in (forward, both)
    )
    pairs = sum(attended_pairs(n, window) for row in lengths for n in row) * heads * head_dim
    return {
        "rows": count,
        "forward_seconds": alone,
        "seconds": seconds,
        "forward_flops_per_second": 4 * pairs / alone,
        "flops_per_second": 14 * pairs / seconds,
    }
