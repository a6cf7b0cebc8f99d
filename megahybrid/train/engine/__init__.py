"""The only door to DeepSpeed: steps, fragments in and out, the gradient audit."""

from megahybrid.train.engine.engine import Engine, MicroBatch, StepResult, UpdateGate

__all__ = ["Engine", "MicroBatch", "StepResult", "UpdateGate"]
