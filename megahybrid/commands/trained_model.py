"""A model out of a checkpoint, to be looked at rather than trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megahybrid.checkpoint.parameter_io import fill
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.config import RunConfig
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig, either
from megahybrid.config.old_words import SCHEMES, current_tree, silent, tell_once
from megahybrid.config.parallel import ParallelConfig, legal_tensor_degrees
from megahybrid.config.stages import Recompute, Stage
from megahybrid.config.training import KernelConfig
from megahybrid.config.yaml_file import apply_overrides
from megahybrid.errors import ConfigError
from megahybrid.model.kernels.choice import kinds_with_sinks, resolve_kernels
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel import matmul
from megahybrid.parallel.collectives import on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.restore import checkpoint_of, plan_of, run_of
from megahybrid.train.results import write_result


@dataclass(frozen=True)
class TrainedModel:
    """The model as it stood at `step`, after `tokens` of its run, in `stage`."""

    checkpoint: Path
    run: RunConfig
    stage: Stage
    step: int
    tokens: int
    model: Transformer
    mesh: ParallelMesh  # of this process alone, or of tensor and context ranks
    changes: tuple[str, ...] = ()  # of schemes, made for looking only: local.window=64

    @property
    def length(self) -> int:
        """The longest rows of its stage, in tokens."""
        return max(self.stage.lengths)

    @property
    def longest(self) -> int:
        """The longest rows of its stage and those before, in tokens."""
        return self.run.longest_rows(self.tokens)

    @property
    def precision(self) -> str:
        """The precision of weights and activations here: fp32 or bf16."""
        return "bf16" if self.model.final_norm.weight.dtype == torch.bfloat16 else "fp32"


def load_trained_model(path: Path, mesh: ParallelMesh, changes: Sequence[str] = ()) -> TrainedModel:
    """The weights of a checkpoint, or of a run's newest one, of any layout. Collective.

    fp32 on a CPU, the run's precision on CUDA. The layers are those of the stage it was written
    in, with its windows and thetas, but for `changes` such as local.window=null: what a layer kind
    contributes shows when it is changed. Raises ConfigError for a change that would need other
    weights and for a tensor axis that does not divide the model, CheckpointError where the
    checkpoint is missing or damaged in any byte.
    """
    # One rank looks: a run that goes on may publish another meanwhile.
    folder = on_first(mesh.world, lambda: _verified(path))
    with Reader(folder) as reader:
        run, manifest = run_of(reader), reader.manifest
        _check_degree(run.model, mesh.tensor.size)
        # The step that wrote it belongs to the stage of its own last token.
        point = run.stage_plan.at(max(0, manifest.tokens - 1))
        half = mesh.device.type == "cuda" and run.precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        plan = plan_of(run, manifest, folder)
        if changes:
            notice = tell_once if mesh.world.rank == 0 else silent
            fields = current_tree(apply_overrides({}, changes), "--change", notice, (SCHEMES,))
            plan = plan.with_overrides(fields, "--change")
        model = _build(run, plan, mesh, dtype, dict(manifest.train_state))
        _fill(model, reader)
    model.eval()
    told = (manifest.step, manifest.tokens, model, mesh, tuple(changes))
    return TrainedModel(folder, run, point.stage, *told)


def _verified(path: Path) -> Path:
    folder = checkpoint_of(path)
    if folder == path:
        verify(folder)  # the newest one of a run was verified when it was chosen
    return folder


def _check_degree(model: ModelConfig, tensor: int) -> None:
    legal = legal_tensor_degrees(model)
    if tensor not in legal:
        raise ConfigError(
            f"--tensor={tensor} does not divide this model's heads and MLP "
            f"(model.num_heads={model.num_heads}, num_kv_heads={model.num_kv_heads}, "
            f"intermediate_size={model.intermediate_size}). Use {either(legal)}."
        )


def _build(
    run: RunConfig, plan: LayerPlan, mesh: ParallelMesh, dtype: torch.dtype, train_state: dict
) -> Transformer:
    saved = ChosenKernels.from_json(train_state.get("kernels"))
    # Kernels that a run names for its GPUs are no wish for another kind of device.
    same_device = saved is not None and saved.device == mesh.device.type
    wanted = run.kernels if same_device and mesh.context.size == 1 else KernelConfig()
    # What the run had need not serve context ranks, whose queries are the last of more keys.
    crossing = ("full", "windowed") if mesh.context.size > 1 else ()
    sinks = kinds_with_sinks(plan.schemes.values())
    chosen = resolve_kernels(wanted, mesh.device, dtype, run.model.head_dim, saved, crossing, sinks)
    if chosen.products is not None:
        matmul.use(chosen.products)
    kernels = [chosen.of(scheme) for scheme in plan.expand()]
    # What ranks exchange is chosen for this many: the run's own choice was made for its own.
    degrees = ParallelConfig(tensor=mesh.tensor.size, context=mesh.context.size)
    context = ContextRanks(mesh, run.model, degrees)
    # Long texts are what context ranks are for: gate and up of all their tokens are the most that a
    # layer holds.
    policy: Recompute = "none" if mesh.context.size == 1 else "chunked"
    policies = (policy,) * len(kernels)
    model = Transformer(
        run.model, mesh, plan=plan, kernels=kernels, recompute=policies, context=context
    )
    return model.to(dtype)


@torch.no_grad()
def _fill(model: Transformer, reader: Reader) -> None:
    """One parameter at a time, so that the checkpoint is never in memory as a whole."""
    for parameter, spec in model.sharded_parameters().values():
        values = fill(reader, spec, "weight", 0, parameter.numel())
        parameter.view(-1).copy_(torch.from_numpy(values))


def header(trained: TrainedModel) -> dict[str, Any]:
    """Return the fields that say which model a result is of."""
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "tokens": trained.tokens,
        "stage": trained.stage.name,
        "trained_length": trained.length,
        "device": trained.mesh.device.type,
        "precision": trained.precision,
        "changes": list(trained.changes),
    }


def keep(trained: TrainedModel, kind: str, name: str, result: dict[str, Any]) -> Path | None:
    """Writes a result into the run's `evaluations`, for its report: `step-….kind.name.json`.

    None where the checkpoint lies in no run, the run cannot be written to, or schemes were changed:
    the report is about the model as it was trained. Only rank 0 writes.
    """
    if trained.changes or trained.mesh.rank:
        return None
    checkpoints = trained.checkpoint.resolve().parent
    if checkpoints.name != "checkpoints":
        return None
    try:
        return write_result(checkpoints.parent, trained.step, kind, name, result)
    except OSError:
        return None
