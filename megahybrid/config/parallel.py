"""`ParallelConfig`: how a run is spread over ranks. The data degree is never written: it is the
world size divided by `tensor`. Sequence parallelism is on exactly when tensor > 1."""

from typing import Literal

from pydantic import Field

from megahybrid.config.base import Frozen
from megahybrid.config.model import ModelConfig, divisors, either


class ParallelConfig(Frozen):
    """Degrees of parallelism."""

    tensor: int = Field(default=1, ge=1, description="ranks that share each layer's matrices")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="what the data ranks share: 0 nothing, 1 optimizer states, 2 and gradients, "
        "3 and weights",
    )
    offload: Literal["none", "moments"] = Field(
        default="none",
        description="what waits in host memory between updates: AdamW's moments, 8 bytes a "
        "parameter, which visit the device in pieces; every bit of a run is the same",
    )

    def data_degree(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size` ranks."""
        return world_size // self.tensor

    def problems(self, model: ModelConfig, world_size: int | None) -> list[str]:
        """Return what does not fit the model or the number of ranks, one line each."""
        lines = []
        tensor, legal = self.tensor, legal_tensor_degrees(model)
        use = f"Use {either(legal)}"
        if model.num_heads % tensor:
            lines.append(
                f"parallel.tensor={tensor} does not divide model.num_heads={model.num_heads}. "
                f"{use}, or change model.num_heads."
            )
        elif model.num_kv_heads % tensor and tensor % model.num_kv_heads:
            lines.append(
                f"parallel.tensor={tensor} and model.num_kv_heads={model.num_kv_heads} do not "
                f"divide one another. {use}, or change model.num_kv_heads."
            )
        if model.intermediate_size % tensor:
            lines.append(
                f"parallel.tensor={tensor} does not divide "
                f"model.intermediate_size={model.intermediate_size}. "
                f"{use}, or change model.intermediate_size."
            )
        if world_size is not None and world_size % tensor:
            fitting = [n for n in legal if world_size % n == 0]
            lines.append(
                f"parallel.tensor={tensor} does not divide the world size of {world_size} ranks. "
                f"Use {either(fitting)}, or start a multiple of {tensor} ranks."
            )
        return lines


def legal_tensor_degrees(model: ModelConfig) -> list[int]:
    """Tensor degrees that divide the query heads and the MLP, and divide or are divided by the KV
    heads (then key and value weights are replicated and sliced)."""
    return [
        n
        for n in divisors(model.num_heads)
        if model.intermediate_size % n == 0
        and (model.num_kv_heads % n == 0 or n % model.num_kv_heads == 0)
    ]
