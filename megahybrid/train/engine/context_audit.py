"""The audit of what context ranks share: the rows of a group, their count and their loss.

The gradient has no witness of its own here: the self-test of exchanges is asked again with every
audit, and the gradient's norm is recomputed in `audit`, over all replicas. Every rank calls alike.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megahybrid.errors import AuditError
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import all_gather, all_reduce
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.train.engine.audit import bit_sum, ranks_in_words

LOSS_TOLERANCE = 1e-4  # relative: sums in fp32 in another order


def check_shared_rows(rows: Sequence[Mapping[str, Tensor | None]], axis: Axis) -> None:
    """Raise AuditError unless the ranks of a context axis were given the same rows: each would
    train on a part of another text, and no number would look wrong. `rows` has what a rank was
    given by name, of each micro batch."""
    if axis.size == 1:
        return
    given = [
        (f"{name} (micro batch {i})", x) for i, each in enumerate(rows) for name, x in each.items()
    ]
    device = next(x.device for _, x in given if x is not None)
    sums = torch.tensor([0 if x is None else int(bit_sum(x)) for _, x in given], device=device)
    table = [tuple(row) for row in all_gather(sums[None], axis).tolist()]
    usual, votes = Counter(table).most_common(1)[0]
    if votes == len(table):
        return
    odd = [rank for rank, row in zip(axis.ranks, table, strict=True) if row != usual]
    columns = zip(given, zip(*table, strict=True), strict=True)
    name = next(name for (name, _), of_ranks in columns if len(set(of_ranks)) > 1)
    raise AuditError(
        f"audit: ranks {', '.join(map(str, axis.ranks))} share rows, but were not given the same "
        f"{name}: {ranks_in_words(odd, axis)}. Compare the datasets on their machines; see "
        "data/loader.py."
    )


def own_targets(model: Transformer, targets: Tensor) -> Tensor:
    """Return how many targets count in this rank's part of the rows."""
    shards = model.shards(targets.shape[1])
    mine = targets if shards is None else shards.cut(targets, 1)
    return (mine != -100).sum()


def check_sums(
    loss: Tensor, valid: Tensor, whole_losses: Tensor, targets: Tensor, mesh: ParallelMesh
) -> None:
    """Raise AuditError unless the engine's mean `loss` and its count `valid` are those of the rows.

    `whole_losses` is what this rank has for the tokens of whole rows over the ranks that share
    them; `targets` counts in its own part of each row.
    """
    both = torch.stack([whole_losses.to(torch.float64), targets.to(torch.float64)])
    losses, count = all_reduce(both, mesh.replica).tolist()
    if count != valid.item():
        raise AuditError(
            f"audit: the engine divides by {valid.item():.10g} targets, but the parts of rows on "
            f"all data and context ranks have {count:.10g}. The sum must go over mesh.replica; see "
            "train/engine/engine.py: train_step."
        )
    mean, found = losses / max(count, 1.0), loss.item()
    if abs(mean - found) > LOSS_TOLERANCE * max(abs(mean), 1e-6):
        raise AuditError(
            f"audit: the engine's loss {found:.6g} is not the mean over whole rows ({mean:.6g}). "
            "Parts of rows are lost or counted twice; see model/transformer.py: forward."
        )
