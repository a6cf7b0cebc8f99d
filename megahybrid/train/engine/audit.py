"""Is the engine's gradient the gradient? An audit from named parameters and their ShardSpec.

DeepSpeed counts an unmarked shard wrongly in the global norm and says nothing; a replicated weight
read without `copy_to_tensor` leaves engine and norm in agreement on a wrong gradient. So the audit
recomputes the norm *and* compares gradients and weights of replicated parameters across the tensor
axis. Every rank must call it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megahybrid.errors import AuditError
from megahybrid.parallel.collectives import all_gather, all_reduce
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.parallel.sharding import ShardSpec

NORM_TOLERANCE = 1e-4  # relative; bf16 gradients are summed in another order than the engine's
REPLICA_TOLERANCE = 1e-6  # relative, across the tensor axis


@dataclass(frozen=True)
class Audit:
    """The gradient as it was after the last backward pass and before the update."""

    gradient_norm: float
    worst_replica: str  # the replicated parameter whose gradients differ most across tensor ranks
    worst_difference: float  # relative L2 distance from their mean


def _disagreement(value: Tensor, mesh: ParallelMesh) -> float:
    """Largest over tensor ranks of |value - mean| / |mean|."""
    if mesh.tensor.size == 1:
        return 0.0
    value = value.detach().to(torch.float64)
    mean = all_reduce(value.clone(), mesh.tensor) / mesh.tensor.size
    both = torch.stack([(value - mean).norm(), mean.norm()])
    distance, size = (all_reduce(both.square(), mesh.tensor) / mesh.tensor.size).sqrt().tolist()
    return distance / size if size > 0 else (math.inf if distance > 0 else 0.0)


def audit_gradients(
    parameters: dict[str, tuple[nn.Parameter, ShardSpec]], mesh: ParallelMesh
) -> Audit:
    """Recompute the norm from whole gradients, one parameter at a time."""
    from deepspeed.utils import safe_get_full_grad

    squares = torch.zeros((), dtype=torch.float64)
    worst_replica, worst_difference = "", 0.0
    for parameter, spec in parameters.values():
        name = canonical_name(spec)
        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            raise AuditError(f"audit: {name} has no gradient after the backward pass.")
        square = squared_norms([gradient.detach()]).squeeze(0).cpu()
        if spec.sharded:
            square = all_reduce(square.to(mesh.device), mesh.tensor).cpu()
        else:
            difference = _disagreement(gradient, mesh)
            if difference > worst_difference:
                worst_replica, worst_difference = name, difference
        squares += square
    return Audit(squares.sqrt().item(), worst_replica, worst_difference)


def squared_norms(gradients: list[Tensor]) -> Tensor:
    """The sum of the squares of each, fp64 [gradients]. This call makes no copy in fp64, as others
    do: one of a large embedding takes gigabytes."""
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square()


def canonical_name(spec: ShardSpec) -> str:
    """A parameter by the name it has in checkpoints; of several in one matrix, the first."""
    return spec.segments[0].name


def parameter_class(name: str) -> str:
    """`blocks.3.attention_norm.weight` -> `attention_norm.weight`: what to look for in the code."""
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "blocks" else name


def check_audit(
    audit: Audit, engine_norm: float, norm_by_kind: Mapping[str, float] | None = None
) -> None:
    """Raise AuditError where the engine disagrees, naming the parameter class.

    `norm_by_kind` was summed from the gradient that the optimizer was given, with clipping undone
    by its rule: a third sum beside the engine's and the audit's own.
    """
    if audit.worst_difference > REPLICA_TOLERANCE:
        raise AuditError(
            f"audit: gradients of the replicated parameter {audit.worst_replica} differ across "
            f"tensor ranks by {audit.worst_difference:.2e} (limit {REPLICA_TOLERANCE:.0e}). "
            f"Read {parameter_class(audit.worst_replica)} through copy_to_tensor in its "
            "module's forward."
        )
    if not math.isfinite(engine_norm) or not audit.gradient_norm:
        return
    error = abs(engine_norm - audit.gradient_norm) / audit.gradient_norm
    if error > NORM_TOLERANCE:
        raise AuditError(
            f"audit: the engine's gradient norm {engine_norm:.6g} is not the gradient's "
            f"({audit.gradient_norm:.6g}, off by {error:.2e}). A sharded parameter lacks the "
            "tensor-parallel mark, or a replicated one has it; see parallel/sharding.py: mark."
        )
    if norm_by_kind is None:
        return
    given = math.hypot(*norm_by_kind.values())
    error = abs(given - audit.gradient_norm) / audit.gradient_norm
    if not error <= NORM_TOLERANCE:
        kinds = ", ".join(f"{kind} {norm:.4g}" for kind, norm in norm_by_kind.items())
        raise AuditError(
            f"audit: the gradient that the optimizer was given has the norm {given:.6g} when "
            f"clipping is undone ({kinds}), not {audit.gradient_norm:.6g} (off by {error:.2e}). "
            "It was clipped or scaled by another number than optimizer.clip_norm asks for, or a "
            "part of it is missing; see train/engine/engine.py: _update."
        )


def check_tensor_parallel_flags(
    parameters: dict[str, tuple[nn.Parameter, ShardSpec]], mesh: ParallelMesh
) -> None:
    """Raise AuditError unless each parameter's flag, by which DeepSpeed counts it in a norm, says
    what its ShardSpec says."""
    for parameter, spec in parameters.values():
        name = canonical_name(spec)
        marked = bool(getattr(parameter, "tensor_model_parallel", False))
        if mesh.tensor.size > 1 and marked != spec.sharded:
            raise AuditError(
                f"audit: {name} ({parameter_class(name)}) is "
                f"{'sharded but not marked' if spec.sharded else 'marked but not sharded'} for the "
                "engine's gradient norm; see parallel/sharding.py: mark."
            )


def check_replicas(
    parameters: dict[str, tuple[nn.Parameter, ShardSpec]], mesh: ParallelMesh
) -> None:
    """Weights of replicated parameters must agree across tensor ranks to 1e-6."""
    from deepspeed.utils import safe_get_full_fp32_param

    if mesh.tensor.size == 1:
        return
    for parameter, spec in parameters.values():
        if spec.sharded:
            continue
        name = canonical_name(spec)
        whole = safe_get_full_fp32_param(parameter)
        value = parameter if whole is None else whole
        difference = _disagreement(value, mesh)
        if difference > REPLICA_TOLERANCE:
            raise AuditError(
                f"audit: the replicated weight {name} ({parameter_class(name)}) differs across "
                f"tensor ranks by {difference:.2e} (limit {REPLICA_TOLERANCE:.0e}): "
                f"{ranks_in_words(_far_from_most(value, mesh), mesh.tensor)}. "
                "Restart from the checkpoint before it began to differ."
            )


def _far_from_most(value: Tensor, mesh: ParallelMesh) -> list[int]:
    """World ranks whose copy is not the middle one of each element."""
    copies = all_gather(value.detach().to(torch.float64).reshape(1, -1), mesh.tensor)
    middle = copies.median(dim=0).values
    limit = REPLICA_TOLERANCE * middle.norm()
    far = ((copies - middle).norm(dim=1) > limit).tolist()
    return [rank for rank, wrong in zip(mesh.tensor.ranks, far, strict=True) if wrong]


def ranks_in_words(odd: Sequence[int], axis: Axis) -> str:
    """Return the ranks at fault; where no majority says, all that may be."""
    known = axis.size > 2 and 2 * len(odd) < axis.size
    named = ", ".join(str(rank) for rank in (odd if known else axis.ranks)[:8])
    if not known:
        return f"ranks {named} differ"
    return f"rank{'s' * (len(odd) > 1)} {named} differ{'s' * (len(odd) == 1)} from the others"


def check_data_replicas(
    parameters: dict[str, tuple[nn.Parameter, ShardSpec]], mesh: ParallelMesh
) -> None:
    """Weights must be the same bits on all data ranks: a wrong one came from memory or a wire.

    Each rank sums the bits of each parameter; sums are compared, and ranks that differ from most
    are named. With two ranks nobody can say which one is right.
    """
    if mesh.replica.size == 1:
        return
    sums = torch.stack([bit_sum(parameter) for parameter, _ in parameters.values()])
    table = all_gather(sums[None], mesh.replica).tolist()  # [data, parameters]
    rows = [tuple(row) for row in table]
    usual, votes = Counter(rows).most_common(1)[0]
    if votes == len(rows):
        return
    known = 2 * votes > len(rows)
    reference = usual if known else rows[0]
    wrong = [index for index, row in enumerate(rows) if row != reference]
    name = next(
        canonical_name(spec)
        for (_, spec), values in zip(parameters.values(), zip(*rows, strict=True), strict=True)
        if len(set(values)) > 1
    )
    odd = [mesh.replica.ranks[index] for index in wrong] if known else mesh.replica.ranks
    ranks = "data ranks" if mesh.context.size == 1 else "data and context ranks"
    raise AuditError(
        f"audit: the weight {name} is not the same bits on all {ranks}: "
        f"{ranks_in_words(odd, mesh.replica)}. "
        "Memory or a wire of that machine is at fault: exclude it, then restart from the "
        "checkpoint before the last audit that passed."
    )


def bit_sum(parameter: Tensor) -> Tensor:
    """Sum of a tensor's bits as integers, weighted so that an exchange of elements is seen too."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    values = parameter.detach().contiguous().view(-1).view(bits)
    total = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for begin in range(0, values.numel(), _CHUNK):
        piece = values[begin : begin + _CHUNK].to(torch.int64)
        weights = torch.arange(1, piece.numel() + 1, device=piece.device)
        total += (piece * weights).sum()  # wraps around alike on every rank
    return total


_CHUNK = 1 << 24  # elements at a time: the integers are four times the size of bf16
