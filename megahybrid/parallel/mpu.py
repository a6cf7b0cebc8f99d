"""`Mpu`: a mesh as DeepSpeed wants to be told about it."""

import torch.distributed as dist

from megahybrid.parallel.mesh import Axis, ParallelMesh


class Mpu:
    """The mesh in the shape in which DeepSpeed asks for groups.

    Make one per mesh, on every rank alike. No method may be named get_sequence_parallel_* or
    initialize_sequence_parallel: DeepSpeed would take the mesh for Ulysses and compute wrong
    gradient norms. Its data-parallel ranks are those of `replica`: all that hold the same weights,
    whether they have rows of their own or a part of a row.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        if not dist.is_initialized():
            raise RuntimeError("DeepSpeed needs a process group: call initialise_distributed first")
        self._tensor, self._data = mesh.tensor, mesh.replica
        self._tensor_group = _group(mesh.tensor)
        self._data_group = _group(mesh.replica)

    def get_model_parallel_rank(self) -> int:
        """Rank along the tensor axis."""
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Group of the tensor axis."""
        return self._tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank along the tensor axis."""
        return self._tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._tensor.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Group of the tensor axis."""
        return self._tensor_group

    def get_data_parallel_rank(self) -> int:
        """Rank along the replica axis."""
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the replica axis."""
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group of the replica axis."""
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """World ranks along the replica axis."""
        return list(self._data.ranks)

    def get_pipeline_model_parallel_rank(self) -> int:
        """Always 0: there are no pipeline stages."""
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Always 1: there are no pipeline stages."""
        return 1


def _group(axis: Axis) -> dist.ProcessGroup:
    """The axis's group; for one rank a group of its own, which only that rank has to make."""
    if axis.group is not None:
        return axis.group
    return dist.new_group(list(axis.ranks), use_local_synchronization=True)
