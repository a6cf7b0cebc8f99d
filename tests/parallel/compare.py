"""Shared by the tests of the layers: how far two tensors are apart, and weights drawn by name."""

import torch
from torch import Tensor, nn

from megahybrid.parallel.random import key
from megahybrid.parallel.sharding import shard_spec

EXACT = 1e-10  # float64, any degree: outputs and every gradient


def error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; infinite when the shapes differ or a value is not finite."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    distance = torch.linalg.vector_norm((found - expected).double())
    return float(distance / torch.linalg.vector_norm(expected.double()).clamp(min=1e-300))


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same values for the same name on every rank."""
    generator = torch.Generator().manual_seed(key(7, name))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def load(module: nn.Module, full: dict[str, Tensor]) -> None:
    """Cuts full canonical tensors into every parameter of a module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(shard_spec(parameter).split(full))


def gradient_errors(module: nn.Module, full: dict[str, Tensor]) -> dict[str, float]:
    """Error of every parameter's gradient against the plain one's shard."""
    errors = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        errors[name] = error(parameter.grad, shard_spec(parameter).split(full))
    return errors
