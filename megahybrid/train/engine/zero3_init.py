"""ZeRO 3 from the first weight on: each is drawn, cut over the data axis and let go, one at a time.

Left to itself DeepSpeed cuts a model that every rank holds whole, so what a rank needs at the start
would be its share of the tensor axis in fp32, whatever the data degree.
"""

from typing import Any

import torch
from torch import nn

from megahybrid.config.run import RunConfig
from megahybrid.model.init import draw
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.mpu import Mpu
from megahybrid.parallel.sharding import attach_shard_spec


def draw_partitioned(
    model: Transformer, run: RunConfig, mesh: ParallelMesh, settings: dict[str, Any]
) -> None:
    """Give a model without storage (of the meta device) its first weights on `mesh`.

    They are those of `model.init.initialise`, to the bit, rounded to the run's precision; a rank
    holds its share of them and one whole parameter at most. Collective.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    mpu = Mpu(mesh)
    # A module without parameters: DeepSpeed then sets up all that it would for the model itself.
    init = Init(
        module=nn.Module(),
        data_parallel_group=mpu.get_data_parallel_group(),
        config_dict_or_path=settings,
        mpu=mpu,
    )
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, key))
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    for empty, spec in model.sharded_parameters().values():
        weights = attach_shard_spec(nn.Parameter(torch.empty_like(empty, device=mesh.device)), spec)
        draw(weights, spec, model.config, run.seed, run.optimizer)
        weights.data = weights.data.to(dtype)
        init._convert_to_zero_parameters([weights])
        for module, key in owners[empty]:
            module._parameters[key] = weights
