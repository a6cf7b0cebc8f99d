"""What a mapping or a list of a run file looks like, shown where something else was written."""

from collections.abc import Iterable

# By the class of the value, or by class and field where the value is a plain mapping or list.
EXAMPLES = {
    "ModelConfig": "{vocab_size: 4096, hidden_size: 128, intermediate_size: 384, num_heads: 4, "
    "layer_plan: {num_layers: 4, pattern: [a], schemes: {a: {position: {kind: nope}}}}}",
    "LayerPlan": "{num_layers: 4, pattern: [all], schemes: {all: {position: {kind: rope, "
    "theta: 10000}}}}",
    "LayerPlan.pattern": "[local, local, local, global]",
    "LayerPlan.schemes": "{local: {position: {kind: rope, theta: 10000}, window: 64}, "
    "global: {position: {kind: nope}}}",
    "AttentionScheme": "{position: {kind: rope, theta: 10000}, window: 64}",
    "Rope": "{kind: rope, theta: 10000}",
    "LinearScaling": "{kind: linear, factor: 4}",
    "NearView": "{position: {kind: rope, theta: 10000}, window: 64}",
    "Fuse": "{gate: token, initial: 0.5}",
    "HeadSplit": "{near: 1, of: 2}",
    "QKNorm": "{kind: rms, over: head}",
    "SqrtDimScale": "{kind: sqrt_dim}",
    "ParallelConfig": "{tensor: 2, zero_stage: 1}",
    "ParallelConfig.context": "{8192: 1, 65536: 4}",
    "ExchangeConfig": "{}",
    "DataConfig": "{sources: {web: {path: data/web/train}}, block_tokens: 262144}",
    "DataConfig.sources": "{web: {path: data/web/train}}",
    "DataConfig.held_out": "{unseen: {path: data/web/held_out}}",
    "Source": "{path: data/web/train}",
    "TrainingSource": "{path: data/web/train}",
    "TrainingSource.plans": "{8192: data/chats-8k, 65536: data/chats-64k}",
    "OptimizerConfig": "{weight_decay: 0.1, clip_norm: 1.0}",
    "OptimizerConfig.betas": "[0.9, 0.95]",
    "SpikeConfig": "{action: skip, sigmas: 6.0}",
    "RunConfig.stages": "[{name: short, tokens: 1_000_000, lengths: {1024: 1}, "
    "batch_tokens: 8192, micro_batch_tokens: 8192, weights: {web: 1}, "
    "learning_rate: {kind: cosine, start: 3e-3, end: 3e-4}}]",
    "Stage": "{name: short, tokens: 1_000_000, lengths: {1024: 1}, batch_tokens: 8192, "
    "micro_batch_tokens: 8192, weights: {web: 1}, learning_rate: {kind: cosine, start: 3e-3, "
    "end: 3e-4}}",
    "Stage.lengths": "{8192: 3, 65536: 1}",
    "Stage.weights": "{web: 3, code: 1}",
    "Stage.schemes": "{local: {window: 128}}",
    "Stage.gates": "[{kind: loss, set: unseen, at_most: 3.5}]",
    "BatchRamp": "{start: 8192, end: 32768, increment: 8192, over_tokens: 1_000_000}",
    "Anneal": "{schemes: {local: {window: 512}}, steps: 4}",
    "Anneal.schemes": "{local: {window: 512}}",
    "AnnealedScheme": "{window: 512}",
    "AnnealedTheta": "{theta: 500000}",
    "RecomputeBudget": "{budget_gib: 40}",
    "LinearRate": "{kind: linear, start: 3e-3, end: 3e-4}",
    "LossGate": "{kind: loss, set: unseen, at_most: 3.5}",
    "CheckpointConfig": "{every_steps: 1000, keep_last: 3}",
    "EvaluateConfig": "{every_steps: 1000, max_tokens: 1_000_000}",
    "EvaluateConfig.suites": "{needles: {path: configs/suites/needles.yaml}}",
    "TrainingSuite": "{path: configs/suites/needles.yaml, every_steps: 1000}",
    "StartConfig": "{checkpoint: runs/other/checkpoints/step-00001000, take: weights}",
    "LogConfig": "{wandb: offline}",
    "LogConfig.profile_steps": "[10, 12]",
    "KernelConfig": "{full: auto, windowed: auto}",
}


def example(names: Iterable[str]) -> str | None:
    """The first of these classes or fields that has an example, as one would write it."""
    return next((EXAMPLES[name] for name in names if name in EXAMPLES), None)
