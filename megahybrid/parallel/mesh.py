"""`ParallelMesh`: the named axes along which ranks work together, and how a world of ranks begins.

A mesh is passed to whoever needs it and never looked up. World rank = (data.rank * context.size +
context.rank) * tensor.size + tensor.rank: neighbours share a tensor group, because tensor
parallelism moves the most bytes, and the next larger neighbourhood is a context group.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megahybrid.errors import MeshError, RendezvousError
from megahybrid.parallel.rendezvous import Rendezvous, find_rendezvous


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as this rank sees it: the world ranks along it and their group.

    `group` is None exactly when `size` is 1: then every collective along the axis is a no-op.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]

    @classmethod
    def single(cls, name: str, world_rank: int = 0) -> "Axis":
        """The axis of one rank alone."""
        return cls(name, 1, 0, None, (world_rank,))


@dataclass(frozen=True)
class ParallelMesh:
    """The axes and this rank's device.

    `tensor` shares matrices, and cuts the sequence between them exactly when its size is above 1.
    `context` shares the rows of a micro-batch: each rank holds a part of every row. `data` has
    micro-batches of its own. `replica` is data × context: all ranks that hold the same weights,
    over which gradients are summed and ZeRO cuts. `parts` has the axes of the smaller context
    degrees that some lengths of a run have: a part of `context` each.
    """

    tensor: Axis
    data: Axis
    device: torch.device
    context: Axis = field(default_factory=lambda: Axis.single("context"))
    replica: Axis = None  # type: ignore[assignment]  # set below: `data` where nothing cuts rows
    parts: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        if self.replica is None:
            assert self.context.size == 1
            object.__setattr__(self, "replica", self.data)

    @property
    def world_size(self) -> int:
        """Number of ranks of the mesh."""
        return self.tensor.size * self.replica.size

    @property
    def rank(self) -> int:
        """This rank's place in the mesh, equal to its rank in the world."""
        return self.replica.rank * self.tensor.size + self.tensor.rank

    @property
    def world(self) -> Axis:
        """All ranks as one axis, for what every rank must agree on."""
        if self.world_size == 1:
            return Axis.single("world", self.rank)
        ranks = tuple(range(self.world_size))
        return Axis("world", self.world_size, self.rank, dist.group.WORLD, ranks)

    def context_of(self, degree: int) -> Axis:
        """Return the axis of `degree` context ranks that share a row with this one."""
        if degree == 1:
            return Axis.single("context", self.rank)
        return next(axis for axis in (self.context, *self.parts) if axis.size == degree)

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> "ParallelMesh":
        """The mesh of one process, which needs no process group."""
        return cls(Axis.single("tensor"), Axis.single("data"), torch.device(device))

    @classmethod
    def from_world(
        cls,
        *,
        tensor: int = 1,
        context: int | Sequence[int] = 1,
        device: str | torch.device = "cpu",
    ) -> "ParallelMesh":
        """Cuts the initialised world into data × context × tensor. Collective: every rank calls it
        alike. `context` may list several degrees: the largest is the axis, the others divide it.

        Builds communicators of its own, so that traffic along the axes never queues behind the
        world's. Raises MeshError when the degrees do not divide the world size.
        """
        world_size, rank = (
            (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        )
        degrees = (context,) if isinstance(context, int) else tuple(sorted(set(context)))
        largest = degrees[-1]
        _check_degrees(world_size, tensor, degrees)
        group = largest * tensor
        # World ranks by [data, context, tensor].
        first = range(0, world_size, group)
        axes = {
            degree: _axis(
                "context",
                [
                    tuple(f + (part + c) * tensor + t for c in range(degree))
                    for f in first
                    for part in range(0, largest, degree)
                    for t in range(tensor)
                ],
                rank,
            )
            for degree in degrees
            if degree > 1
        }
        tensor_ranks = [tuple(range(f, f + tensor)) for f in range(0, world_size, tensor)]
        replicas = [tuple(range(t, world_size, tensor)) for t in range(tensor)]
        if largest == 1:
            data = replica = _axis("data", replicas, rank)
        else:
            replica = _axis("replica", replicas, rank)
            data = _axis("data", [tuple(range(g, world_size, group)) for g in range(group)], rank)
        return cls(
            tensor=_axis("tensor", tensor_ranks, rank),
            data=data,
            device=torch.device(device),
            context=axes.pop(largest, Axis.single("context", rank)),
            replica=replica,
            parts=tuple(axes.values()),
        )


def _check_degrees(world_size: int, tensor: int, context: Sequence[int]) -> None:
    """Raise MeshError where the world cannot be cut so."""
    legal = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
    if tensor < 1 or world_size % tensor:
        raise MeshError(
            f"parallel.tensor={tensor} does not divide the number of processes "
            f"({world_size}). Use one of {legal}, or start another number of processes."
        )
    largest = context[-1]
    for degree in context:
        if degree < 1 or largest % degree:
            raise MeshError(
                f"parallel.context has a degree of {degree}, which does not divide the largest, "
                f"{largest}. Use divisors of {largest}."
            )
    if world_size % (tensor * largest):
        raise MeshError(
            f"parallel.context={largest} times parallel.tensor={tensor} does not divide the number "
            f"of processes ({world_size}). Use a product that is one of {legal}, or start another "
            "number of processes."
        )


def _axis(name: str, all_ranks: list[tuple[int, ...]], rank: int) -> Axis:
    """This rank's axis out of a partition of the world. Every rank builds every group, in order."""
    mine = Axis.single(name, rank)
    for ranks in all_ranks:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks), group_desc=f"{name}:{ranks[0]}")
        if rank in ranks:
            mine = Axis(name, len(ranks), ranks.index(rank), group, ranks)
    return mine


@dataclass(frozen=True)
class World:
    """This process's place in the world and its device, as `initialise_distributed` found them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def choose_device(device: str, local_rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda` as a torch device.

    A launcher that shows each rank one GPU (Slurm's --gpus-per-task) makes it cuda:0; otherwise
    the local rank counts the GPUs of the node.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MeshError("device=cuda but torch sees no CUDA device (0 visible). Use device=cpu.")
    visible = torch.cuda.device_count()
    if visible == 1:
        return torch.device("cuda:0")
    if local_rank >= visible:
        raise MeshError(
            f"LOCAL_RANK={local_rank} has no GPU of its own ({visible} visible). "
            f"Start at most {visible} processes on this node."
        )
    return torch.device(f"cuda:{local_rank}")


def initialise_distributed(
    device: str = "auto",
    timeout_seconds: float = 1800.0,
    *,
    connect_seconds: float = 300.0,
    environment: Mapping[str, str] | None = None,
) -> World:
    """Joins the world that torchrun's or Slurm's variables describe, or makes a world of one.

    gloo carries CPU tensors everywhere; with CUDA, nccl carries GPU tensors beside it. A collective
    that waits longer than `timeout_seconds` fails; ranks that do not all arrive within
    `connect_seconds` are a MeshError, as are missing variables and a taken port.
    """
    rendezvous = find_rendezvous(os.environ if environment is None else environment)
    chosen = choose_device(device, rendezvous.local_rank if rendezvous else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if rendezvous is None:
        # In memory: a lone process must not fail because a port is taken or no network is up.
        rank, world_size = 0, 1
        store: dist.Store = dist.HashStore()
    else:
        rank, world_size = rendezvous.rank, rendezvous.world_size
        store = _connect_store(rendezvous, connect_seconds)
        if chosen.type == "cuda":
            claim_device(store, rendezvous, chosen)
    dist.init_process_group(
        backend="gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return World(rank, world_size, rendezvous.local_rank if rendezvous else 0, chosen)


def _connect_store(rendezvous: Rendezvous, connect_seconds: float) -> dist.Store:
    """The store of all ranks; rank 0 serves it unless the launcher does."""
    serves = rendezvous.rank == 0 and not rendezvous.store_elsewhere
    where = f"MASTER_ADDR={rendezvous.address} MASTER_PORT={rendezvous.port}"
    try:
        store = dist.TCPStore(
            rendezvous.address,
            rendezvous.port,
            world_size=rendezvous.world_size,
            is_master=serves,
            timeout=timedelta(seconds=connect_seconds),
            wait_for_workers=not rendezvous.store_elsewhere,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error)
        if "EADDRINUSE" in reason or "address already in use" in reason.lower():
            raise RendezvousError(
                f"{where} is taken by another process on this host (rank {rendezvous.rank} of "
                f"{rendezvous.world_size} wanted to serve it). Set MASTER_PORT to a free port."
            ) from error
        raise RendezvousError(
            f"{where} did not bring all ranks together within {connect_seconds:.0f} s (rank "
            f"{rendezvous.rank} of {rendezvous.world_size}: {reason.splitlines()[0]}). Check "
            "that rank 0 runs, that its host can be reached and that all ranks were started."
        ) from error
    return dist.PrefixStore(f"attempt-{rendezvous.attempt}", store)


def claim_device(store: dist.Store, rendezvous: Rendezvous, device: torch.device) -> None:
    """Raise MeshError where another rank has this GPU already.

    NCCL would end both later, with "Duplicate GPU detected" and a page of its own. A rank that sees
    one GPU cannot know by itself whether its launcher gave it one of its own or all ranks see the
    same.
    """
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None and store.add(f"device:{uuid}", 1) > 1:
        raise MeshError(
            f"rank {rendezvous.rank} of {rendezvous.world_size} has the same GPU as another rank "
            f"({device}, {torch.cuda.device_count()} visible). Start one process per GPU (on one "
            "GPU: --processes 1 parallel.tensor=1), or use device=cpu."
        )


def shutdown_distributed(ok: bool) -> None:
    """Leaves the world. With `ok` all ranks meet first; after an error nobody is waited for.

    Without the meeting a rank that ends early tears the connections of the others (SIGABRT). After
    an error a meeting would hang: the connections are dropped, so that the others fail at once.
    """
    if not dist.is_initialized():
        return
    if ok:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # On the host: a barrier would build nccl's communicator of the world to end it.
        dist.all_reduce(torch.zeros(1))
    elif "nccl" in dist.get_backend_config():
        # Destroying nccl with work in flight waits for it; the process is about to end anyway.
        return
    dist.destroy_process_group()
