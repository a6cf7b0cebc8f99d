"""The only door to DeepSpeed: steps, fragments in and out, the gradient audit."""

from megahybrid.train.engine.engine import Engine, Judge, MicroBatch, StepResult

__all__ = ["Engine", "Judge", "MicroBatch", "StepResult"]
