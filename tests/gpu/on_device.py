"""A worker on one device, whose death costs one test; and what a test says of its device."""

from collections.abc import Callable
from typing import Any

from tests.distributed import Pool, Ranks

# Front end and autograd alone on the CPU, whose compiler is not what these tests ask.
COMPILERS = {"cpu": "aot_eager", "cuda": "inductor"}


class Worker:
    """One process in a world of one, started at the first call. After a failure the next call has
    another one: what a kernel did to its device is no later test's fault."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.pool: Pool | None = None

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 100.0) -> Any:
        """The result of function(ranks, *args), where `ranks` has the device's mesh."""
        self.pool = self.pool or Pool(1)
        try:
            return self.pool.run(_on, (self.device, function, *args), seconds)[0]
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End the process."""
        if self.pool is not None:
            self.pool.kill()
            self.pool = None


def _on(ranks: Ranks, device: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` with a mesh on `device`, in a world as `megahybrid train` makes it."""
    if 1 not in ranks.meshes:
        import torch.distributed as dist

        from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed

        dist.destroy_process_group()
        world = initialise_distributed(device, environment={})
        ranks.meshes[1] = ParallelMesh.from_world(device=world.device)
    return function(ranks, *args)
