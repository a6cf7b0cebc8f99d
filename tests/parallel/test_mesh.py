"""Axes, ranks and groups; two meshes in one process; what DeepSpeed is told."""

import pytest
import torch

from megahybrid.errors import MeshError
from megahybrid.parallel.collectives import gather_objects, sum_scalars
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.mpu import Mpu
from tests.distributed import Ranks, run


def places(ranks: Ranks, tensor: int) -> dict[str, object]:
    mesh = ranks.mesh(tensor)
    return {
        "tensor": gather_objects(ranks.rank, mesh.tensor),
        "data": gather_objects(ranks.rank, mesh.data),
        "world": gather_objects(ranks.rank, mesh.world),
        "ranks": (mesh.tensor.ranks, mesh.data.ranks),
        "rank": (mesh.rank, mesh.world_size),
        "no_group": (mesh.tensor.group is None, mesh.data.group is None),
    }


def two_meshes(ranks: Ranks) -> tuple[list[float], list[float], bool]:
    wide, tall = ranks.mesh(4), ranks.mesh(2)
    both = wide.tensor.group is not tall.tensor.group
    return sum_scalars([ranks.rank], wide.tensor), sum_scalars([ranks.rank], tall.tensor), both


def refusal(ranks: Ranks) -> str:
    try:
        ParallelMesh.from_world(tensor=3)
    except MeshError as error:
        return str(error)
    return "accepted"


def mpu_answers(ranks: Ranks, tensor: int) -> dict[str, object]:
    mpu = Mpu(ranks.mesh(tensor))
    answers = {}
    for name in (name for name in dir(mpu) if not name.startswith("_")):
        answer = getattr(mpu, name)()
        answers[name] = answer.size() if name.endswith("_group") else answer
    return answers


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_neighbours_share_a_tensor_group(tensor: int) -> None:
    for rank, found in enumerate(run(4, places, tensor)):
        first = rank - rank % tensor
        tensor_ranks = list(range(first, first + tensor))
        data_ranks = list(range(rank % tensor, 4, tensor))
        assert found == {
            "tensor": tensor_ranks,
            "data": data_ranks,
            "world": [0, 1, 2, 3],
            "ranks": (tuple(tensor_ranks), tuple(data_ranks)),
            "rank": (rank, 4),
            "no_group": (tensor == 1, tensor == 4),
        }


def test_two_meshes_of_one_world_do_not_disturb_each_other() -> None:
    low, high = ([6.0], [1.0], True), ([6.0], [5.0], True)
    assert run(4, two_meshes) == [low, low, high, high]


def test_mesh_of_one_process_needs_no_group() -> None:
    mesh = ParallelMesh.single()
    assert (mesh.world_size, mesh.rank, mesh.device) == (1, 0, torch.device("cpu"))
    assert mesh.tensor.group is mesh.data.group is mesh.world.group is None
    assert ParallelMesh.from_world(tensor=1) == mesh


def test_degree_that_does_not_divide_the_world_is_refused() -> None:
    line = "parallel.tensor=3 does not divide the number of processes (4). Use one of 1, 2, 4, "
    assert all(found.startswith(line) for found in run(4, refusal))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_deepspeed_is_told_both_axes_and_nothing_of_sequences(tensor: int) -> None:
    for rank, answers in enumerate(run(4, mpu_answers, tensor)):
        assert not any("sequence" in name for name in answers)
        assert answers["get_data_parallel_group_ranks"] == list(range(rank % tensor, 4, tensor))
        assert answers["get_data_parallel_world_size"] == 4 // tensor
        assert answers["get_data_parallel_group"] == 4 // tensor
        assert answers["get_data_parallel_rank"] == rank // tensor
        assert answers["get_pipeline_model_parallel_world_size"] == 1
        assert answers["get_pipeline_model_parallel_rank"] == 0
        for prefix in ("get_model_parallel", "get_tensor_model_parallel"):
            assert answers[f"{prefix}_world_size"] == answers[f"{prefix}_group"] == tensor
            assert answers[f"{prefix}_rank"] == rank % tensor
