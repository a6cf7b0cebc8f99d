"""Where ranks meet, by torchrun's and Slurm's variables, and what is said when they cannot."""

import re
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megahybrid.errors import MeshError
from megahybrid.parallel.mesh import (
    choose_device,
    claim_device,
    initialise_distributed,
    shutdown_distributed,
)
from megahybrid.parallel.rendezvous import Rendezvous, find_rendezvous, first_host
from tests import distributed

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_JOB_NODELIST": "n[1-4]",
}


def test_torchrun_variables_win_over_slurm() -> None:
    place = find_rendezvous(SLURM | TORCHRUN)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank) == (3, 8, 1)
    assert (place.address, place.port, place.store_elsewhere) == ("n1", 29500, False)
    agent = find_rendezvous(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert agent is not None and agent.store_elsewhere


def test_slurm_ranks_meet_on_the_first_node_of_the_step_and_a_port_of_the_job() -> None:
    place = find_rendezvous(SLURM, expand=lambda nodes: f"first of {nodes}")
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert (place.address, place.port) == ("first of n[3-4]", 23456)
    chosen = find_rendezvous(SLURM | {"MASTER_ADDR": "n9", "MASTER_PORT": "7"})
    assert chosen is not None and (chosen.address, chosen.port) == ("n9", 7)


def test_process_that_no_launcher_started_is_alone() -> None:
    assert find_rendezvous({}) is None
    # A batch script's own shell: Slurm gives it a process id, but srun did not start it.
    batch = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert find_rendezvous(batch) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing .*RANK=0 found"),
        (TORCHRUN | {"RANK": "x"}, "RANK=x is not a whole number"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 does not fit WORLD_SIZE=8. Ranks run from 0 to 7."),
        ({k: v for k, v in SLURM.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS missing .* srun"),
        ({k: v for k, v in SLURM.items() if "NODELIST" not in k}, "MASTER_ADDR is missing"),
    ],
    ids=["torchrun_incomplete", "no_number", "rank_too_high", "slurm_incomplete", "no_nodes"],
)
def test_half_an_environment_is_one_clear_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(MeshError, match=message) as refusal:
        find_rendezvous(environment)
    assert "\n" not in str(refusal.value)


def test_node_list_without_scontrol_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert first_host("n17") == "n17"
    with pytest.raises(MeshError, match="SLURM_STEP_NODELIST=n.3-4. .*Set MASTER_ADDR"):
        first_host("n[3-4]")


def environment(rank: int, port: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            MeshError, match=f"MASTER_PORT={port} is taken .*rank 0 of 2"
        ) as refusal:
            initialise_distributed("cpu", environment=environment(0, port), connect_seconds=2)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("rank", [0, 1], ids=["waits_for_others", "finds_no_rank_0"])
def test_rank_left_alone_is_one_clear_line(rank: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        MeshError, match=f"did not bring all .*within 2 s .rank {rank} of 2"
    ) as refusal:
        initialise_distributed("cpu", environment=environment(rank, port), connect_seconds=2)
    assert "\n" not in str(refusal.value)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto", 3).type == "cpu"
    with pytest.raises(MeshError, match=re.escape("device=cuda but torch sees no CUDA device")):
        choose_device("cuda", 0)


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_device("auto", 3).index == 0  # Slurm shows each task one GPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert choose_device("cuda", 3).index == 3
    with pytest.raises(MeshError, match="LOCAL_RANK=4 has no GPU of its own .4 visible"):
        choose_device("cuda", 4)


def test_two_ranks_on_one_gpu_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    store, gpu = dist.HashStore(), torch.device("cuda:0")
    of_each = iter(("GPU-1", "GPU-2", "GPU-1"))
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=next(of_each))
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    places = [Rendezvous(rank, 3, rank, "host", 1, "here") for rank in range(3)]
    for place in places[:2]:
        claim_device(store, place, gpu)  # one GPU is shown to each, and it is another one
    with pytest.raises(MeshError, match="rank 2 of 3 has the same GPU as another rank .cuda:0"):
        claim_device(store, places[2], gpu)


def test_the_last_meeting_needs_no_communicator_of_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "barrier", lambda *_, **__: pytest.fail("a barrier on a device"))
    met = []
    plain = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x: met.append(x.device.type) or plain(x))
    initialise_distributed("cpu", environment={})
    shutdown_distributed(ok=True)
    assert met == ["cpu"] and not dist.is_initialized()


WORLD_OF_ONE = """
import torch.distributed as dist
from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed, shutdown_distributed
from megahybrid.parallel.mpu import Mpu
world = initialise_distributed("cpu", environment={})
mesh = ParallelMesh.from_world(tensor=1, device=world.device)
mpu = Mpu(mesh)
assert (world.rank, world.world_size, dist.get_world_size()) == (0, 1, 1)
assert mpu.get_data_parallel_group().size() == mpu.get_model_parallel_group().size() == 1
shutdown_distributed(ok=True)
assert not dist.is_initialized()
"""

TWO_RANKS = """
import sys
from megahybrid.parallel.collectives import sum_scalars
from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed, shutdown_distributed
rank, port = sys.argv[1:]
place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
world = initialise_distributed(
    "cpu", environment=place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
)
mesh = ParallelMesh.from_world(tensor=2)
assert sum_scalars([world.rank + 1.0], mesh.tensor) == [3.0]
shutdown_distributed(ok=True)
"""


ONE_FAILS = """
import sys, time
from megahybrid.parallel.collectives import sum_scalars
from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed, shutdown_distributed
rank, port = sys.argv[1:]
place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
initialise_distributed("cpu", environment=place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
mesh = ParallelMesh.from_world(tensor=2)
try:
    if rank == "1":
        raise ValueError
    start = time.monotonic()
    sum_scalars([1.0], mesh.tensor)
except (ValueError, RuntimeError):
    code = 3 if rank == "1" or time.monotonic() - start < 10 else 4
shutdown_distributed(ok=False)
sys.exit(code)
"""


def run_script(script: str, *arguments: str) -> None:
    """What `python -c script arguments` does, in a process that has imported torch."""
    sys.argv = ["-c", *arguments]
    exec(script, {"__name__": "__main__"})


def test_single_process_gets_a_world_of_one() -> None:
    assert ends_of([(WORLD_OF_ONE,)]) == [0]


def ends_of(scripts: list[tuple[str, ...]]) -> list[int | None]:
    """Exit codes of processes, each a script and its arguments."""
    context = distributed.start_context()
    processes = [context.Process(target=run_script, args=one) for one in scripts]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def end_of_two_processes(script: str) -> list[int | None]:
    """Exit codes of two processes that are told of each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return ends_of([(script, str(rank), port) for rank in range(2)])


def test_two_processes_meet_at_the_address_of_their_environment() -> None:
    assert end_of_two_processes(TWO_RANKS) == [0, 0]


def test_rank_that_fails_frees_the_other_from_its_collective() -> None:
    assert end_of_two_processes(ONE_FAILS) == [3, 3]
