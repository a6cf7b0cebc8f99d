"""Steps through DeepSpeed: micro-batches in, one update out, all else behind this door."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.checkpoint.fragments import STATES, Fragment
from megahybrid.config.run import RunConfig
from megahybrid.model.init import KINDS, parameter_rule
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import all_reduce, broadcast
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.mpu import Mpu
from megahybrid.train.engine.adamw import ObservedAdamW
from megahybrid.train.engine.audit import (
    audit_gradients,
    check_audit,
    check_data_replicas,
    check_replicas,
    check_tensor_parallel_flags,
    squared_norms,
)
from megahybrid.train.engine.buckets import in_buckets
from megahybrid.train.engine.context_audit import check_shared_rows, check_sums, own_targets
from megahybrid.train.engine.offload import OffloadedAdamW
from megahybrid.train.engine.optimizer_state import PartitionedState, ReadFlat
from megahybrid.train.engine.settings import (
    device_by_local_rank,
    engine_settings,
    prepare_deepspeed,
    run_overlaps,
)
from megahybrid.train.engine.step_timer import StepTimer
from megahybrid.train.engine.zero3_init import draw_partitioned


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward on one rank: on the mesh's device, but for `starts`."""

    tokens: Tensor  # [batch, seq] int64
    targets: Tensor  # [batch, seq] int64, -100 where a target does not count
    # [batch, seq] int64, on the host, where kernels' boundaries are found; None: every row is one
    # document.
    starts: Tensor | None


@dataclass(frozen=True)
class StepResult:
    """One optimizer update, the same on every rank."""

    loss: float  # nats per valid token over the whole step
    valid_tokens: int
    gradient_norm: float  # before clipping
    gradient_norm_by_kind: dict[str, float]  # summed from what the optimizer was given
    skipped: bool  # the update was not applied: the gradient was not finite, or refused
    seconds_forward_backward: float
    seconds_update: float
    refused: str | None = None  # why a finite gradient was not applied
    z_loss: float | None = None  # what the z-loss adds to `loss`, which is without it


class _Update(NamedTuple):
    """The part of a `StepResult` that the update makes known."""

    loss: float
    valid_tokens: int
    gradient_norm: float
    gradient_norm_by_kind: dict[str, float]
    skipped: bool
    refused: str | None
    z_loss: float | None

    @classmethod
    def skip(cls, loss: float, valid_tokens: float, z_loss: float | None = None) -> "_Update":
        """Return the update that a gradient which was not finite makes: none."""
        by_kind = dict.fromkeys(KINDS, math.inf)
        return cls(loss, int(valid_tokens), math.inf, by_kind, True, None, z_loss)


# Told loss and gradient norm, the same on every rank; says why not to apply the gradient, or None.
UpdateGate = Callable[[float, float], str | None]


class Engine:
    """A model, its AdamW and DeepSpeed's ZeRO around both."""

    def __init__(self, model: Transformer, run: RunConfig, mesh: ParallelMesh) -> None:
        """Takes `model` with its first weights set; casts it to the run's precision.

        Under ZeRO 3 it may come without storage, on the meta device: its weights are then drawn
        here, one parameter at a time.
        """
        prepare_deepspeed(mesh.device)
        self._environment = contextlib.ExitStack()
        self._environment.enter_context(device_by_local_rank(mesh.device))
        import deepspeed

        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        settings = engine_settings(run, model.config.hidden_size, mesh.replica)
        if model.final_norm.weight.is_meta:
            draw_partitioned(model, run, mesh, settings)
        self.model = model
        self.mesh = mesh
        self.zero_stage = run.parallel.zero_stage
        self.clip_norm = run.optimizer.clip_norm
        self.model.head.z_loss = run.z_loss or 0.0
        self.parameters = model.sharded_parameters()
        kind = OffloadedAdamW if run.parallel.offload == "moments" else ObservedAdamW
        self.optimizer = kind(
            self._groups(run),
            lr=0.0,
            betas=run.optimizer.betas,
            eps=run.optimizer.eps,
            fused=mesh.device.type == "cuda",
        )
        check_tensor_parallel_flags(self.parameters, mesh)
        # In bf16 DeepSpeed prints its memory to stdout, where our own output belongs.
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=settings,
                mpu=Mpu(mesh),
                dist_init_required=False,
            )
        from megahybrid.train.engine.gradient_accumulation import (
            patch_gradient_sums,  # which is DeepSpeed's own class
        )

        patch_gradient_sums(self.deepspeed.optimizer, model, mesh, run_overlaps(run, mesh.replica))
        self.state = PartitionedState(
            self.deepspeed.optimizer, self.optimizer, self.zero_stage, self.parameters
        )
        self.optimizer.observe = self._observe
        self._kind_pieces = self._pieces_by_flat(run)
        self._squares = torch.zeros(len(KINDS), dtype=torch.float64, device=mesh.device)

    def _groups(self, run: RunConfig) -> list[dict]:
        """Parameter groups by (weight decay, learning rate) of the table in model/init.py."""
        groups: dict[tuple[float, float], list] = {}
        for parameter, spec in self.parameters.values():
            rule = parameter_rule(spec.segments[0].name, self.model.config, run.optimizer)
            groups.setdefault((rule.weight_decay, rule.learning_rate), []).append(parameter)
        settings = [
            {
                "params": parameters,
                "weight_decay": run.optimizer.weight_decay * decay,
                "learning_rate_multiplier": multiplier,
            }
            for (decay, multiplier), parameters in groups.items()
        ]
        # ZeRO cuts each group, and gradients travel to those who update them group by group.
        by_group = self.zero_stage == 1 and run.precision == "bf16" and self.mesh.replica.size > 1
        return in_buckets(settings, self.model) if by_group else settings

    def _pieces_by_flat(self, run: RunConfig) -> dict[int, tuple[list[slice], Tensor]]:
        """Return what this rank counts in a norm, by flat partition: pieces, and their kinds."""
        table: dict[int, list[tuple[slice, int]]] = {}
        counts_replicated = self.mesh.tensor.rank == 0
        for piece in self.state.pieces:
            if not (piece.spec.sharded or counts_replicated):
                continue
            if self.zero_stage == 0 and self.mesh.replica.rank != 0:
                continue
            # By segment: the parallel block fuses attention and MLP into one parameter.
            for name, _, _, _, within in piece.segments():
                kind = KINDS.index(parameter_rule(name, self.model.config, run.optimizer).kind)
                place = slice(piece.offset + within.start, piece.offset + within.stop)
                table.setdefault(id(piece.flat), []).append((place, kind))
        return {
            flat: (
                [place for place, _ in places],
                torch.tensor(
                    [[kind == of for _, kind in places] for of in range(len(KINDS))],
                    device=self.mesh.device,
                ),
            )
            for flat, places in table.items()
        }

    def _observe(self, flat: Tensor, gradient: Tensor) -> None:
        if id(flat) not in self._kind_pieces:
            return
        places, of_kind = self._kind_pieces[id(flat)]
        values = gradient.detach().reshape(-1)
        # Summed in one order: index_add_ has none on CUDA.
        of_pieces = squared_norms([values[place] for place in places])
        self._squares += torch.where(of_kind, of_pieces, 0).sum(dim=1)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        learning_rate: float,
        *,
        audit: bool = False,
        gate: UpdateGate | None = None,
        between: Callable[[], object] | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update unless `gate`
        refuses it.

        `between` is called between two micro-batches, on every rank; what it raises leaves weights
        and moments as they were, and then the engine is good for saving alone.

        Every gradient is d(sum of losses / N), N the valid tokens of all micro-batches of all
        ranks: a mean per micro-batch would be wrong wherever these differ.
        """
        timer = StepTimer(self.mesh.device)
        if audit and self.zero_stage < 3:
            self._wait_for_weights()
            # Before the update, which gives every rank its owner's copy again.
            check_data_replicas(self.parameters, self.mesh)
        # Counts and sums stay where they are made until the step is done: reading one would have
        # the device wait for the host, and then the host for the device.
        valid = torch.stack([(batch.targets != -100).sum() for batch in micro_batches]).sum()
        # Context ranks are given the whole rows that they share.
        shared = self.model.context_degree(micro_batches[0].tokens.shape[1])
        valid = all_reduce(valid.to(torch.float64), self.mesh.replica) / shared
        audit_context = audit and self.mesh.context.size > 1
        if audit_context:
            axis = self.mesh.context_of(shared)
            check_shared_rows([vars(batch) for batch in micro_batches], axis)
        # DeepSpeed averages over the replicas; multiplying by their number makes that a sum.
        scale = self.mesh.replica.size / valid.clamp(min=1)
        self.deepspeed.train()
        # Of the losses, and of what the z-loss adds to them.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        z_sum = torch.zeros_like(loss_sum) if self.model.head.z_loss else None
        whole_losses, targets = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss, per_token = self.deepspeed(batch.tokens, batch.targets, batch.starts)
            self.deepspeed.backward(loss * scale.to(loss.dtype), scale_wrt_gas=False)
            loss_sum += loss.detach()
            if z_sum is not None:
                z_terms = self.model.head.z_terms
                assert z_terms is not None
                loss_sum -= z_terms
                z_sum += z_terms
            if audit_context:
                whole_losses += per_token.sum(dtype=torch.float64) / shared
                targets += own_targets(self.model, batch.targets)
            if between is not None and index < len(micro_batches) - 1:
                between()
        sums = loss_sum if z_sum is None else torch.stack([loss_sum, z_sum])
        means = (all_reduce(sums, self.mesh.replica) / valid.clamp(min=1)).reshape(-1)
        loss_mean = means[0]
        if audit_context:
            check_sums(loss_mean, valid, whole_losses, targets, self.mesh)
        timer.lap()
        found = audit_gradients(self.parameters, self.mesh) if audit else None
        update = self._update(learning_rate, means, valid, gate)
        if found is not None:
            if not update.skipped:
                check_audit(found, update.gradient_norm, update.gradient_norm_by_kind)
            check_replicas(self.parameters, self.mesh)
        forward_backward, updating = timer.seconds()
        return StepResult(
            **update._asdict(),
            seconds_forward_backward=forward_backward,
            seconds_update=updating,
        )

    def _update(
        self, learning_rate: float, means: Tensor, valid: Tensor, gate: UpdateGate | None
    ) -> "_Update":
        """The update, and the one reading of what the step computed. `means` are those of the loss
        and, where there is one, of the z-loss."""
        self.optimizer.set_learning_rate(learning_rate)
        self._squares.zero_()
        plain = self._plain_norm() if self.zero_stage == 0 else None
        if plain is not None and not math.isfinite(plain):
            self.deepspeed.zero_grad()
            return _Update.skip(*torch.cat([means[:1], valid[None], means[1:]]).tolist())
        verdict: list[str | None] = []

        def refuse() -> bool:
            # DeepSpeed asks once per group, when it knows the norm of them all.
            if not verdict and gate is not None:
                known = self.deepspeed.optimizer._global_grad_norm if plain is None else plain
                verdict.append(gate(float(means[0]), float(known)))
            return bool(verdict and verdict[0])

        self.optimizer.refuse = refuse
        self.deepspeed.step()
        squares = all_reduce(all_reduce(self._squares, self.mesh.replica), self.mesh.tensor)
        known = self.deepspeed.get_global_grad_norm() if plain is None else plain
        there = [known.double()] if isinstance(known, Tensor) else []
        # The one moment when the host waits.
        numbers = torch.stack([*squares, valid, *means, *there]).tolist()
        by_kind, (valid_tokens, loss, *z_loss) = (
            numbers[: len(KINDS)],
            numbers[len(KINDS) :][: 1 + len(means)],
        )
        if getattr(self.deepspeed.optimizer, "overflow", False):
            return _Update.skip(loss, valid_tokens, *z_loss)
        norm = numbers[-1] if there else float(known)
        # The optimizer saw clipped gradients. What clipping divided by is taken from its rule, not
        # from these sums: scaled to `norm` they would agree with it however wrong it is.
        clipped_by = max(1.0, (norm + 1e-6) / self.clip_norm) if self.clip_norm else 1.0
        norms = [math.sqrt(square) * clipped_by for square in by_kind]
        refused = verdict[0] if verdict else None
        return _Update(
            loss,
            int(valid_tokens),
            norm,
            dict(zip(KINDS, norms, strict=True)),
            refused is not None,
            refused,
            z_loss[0] if z_loss else None,
        )

    def _wait_for_weights(self) -> None:
        """Weights may still be on their way from those who updated them; layers wait for theirs."""
        if hasattr(self.deepspeed.optimizer, "wait_for_weights"):
            self.deepspeed.optimizer.wait_for_weights()

    def _plain_norm(self) -> float:
        """The norm at stage 0, where DeepSpeed reports none; there is no tensor axis there."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        squares = [grad.double().square().sum() for grad in gradients if grad is not None]
        return torch.stack(squares).sum().sqrt().item()

    @property
    def optimizer_step(self) -> int:
        """Updates applied so far (steps less skipped ones)."""
        return self.state.optimizer_step

    @torch.no_grad()
    def align_replicas(self) -> None:
        """Give every tensor rank tensor rank 0's masters and moments of replicated parameters.

        A checkpoint holds one copy of them, so a run that goes on must hold that copy as well, or
        it would not be the run that resumes.
        """
        if self.mesh.tensor.size == 1:
            return
        for piece in self.state.pieces:
            if not piece.spec.sharded:
                for state in STATES:
                    view = piece.view(state, self.optimizer)
                    view.copy_(broadcast(view.clone(), self.mesh.tensor))
        self.state.refresh_weights()
        self._wait_for_weights()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and global shape of everything that `fragments` cover."""
        specs = (spec for _, spec in self.parameters.values())
        return {segment.name: segment.shape for spec in specs for segment in spec.segments}

    def fragments(self) -> Iterator[Fragment]:
        """Return what this rank writes to a checkpoint: each element once over all ranks."""
        return self.state.fragments(
            owns_replicated=self.mesh.tensor.rank == 0,
            owns_data=self.zero_stage > 0 or self.mesh.replica.rank == 0,
        )

    def load(self, read: ReadFlat, optimizer_step: int | None) -> None:
        """Set masters (and with `optimizer_step` the moments) from canonical boxes."""
        states = STATES if optimizer_step is not None else ("weight",)
        self.state.load(read, states, optimizer_step)
        self._wait_for_weights()

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers, so that another engine can be built."""
        self.optimizer.observe = self.optimizer.refuse = None
        self.deepspeed.destroy()
        self._environment.close()
