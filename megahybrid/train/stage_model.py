"""`StageModel`: the model of a stage, with the windows and thetas of its layers after so many
tokens. Its schemes are self-tested before they train; where the stage anneals, it follows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from megahybrid.config import RunConfig
from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.context import Exchange, Layout
from megahybrid.config.context_plan import parts_of
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.memory_estimate import policies_of
from megahybrid.config.stages import Recompute, RecomputeBudget
from megahybrid.ledger import AnnealEvent, EventSink, RecomputeEvent
from megahybrid.model.compiled import whole_serves
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.row_shards import ContextRanks, RowShards
from megahybrid.model.selftest import HeadShape, run_context_test, run_self_test
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import alike
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.train.metrics import StepFlops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Crossed(NamedTuple):
    """A scheme, and how its queries meet keys of other context ranks."""

    scheme: AttentionScheme
    axis: Axis
    layout: Layout
    exchanges: tuple[Exchange, ...]


class StageModel:
    """A model and the plan in force in it, which is a function of the tokens seen.

    Every scheme is self-tested on its kernel before a step is made with it. `tell` is called with
    the event of each change.
    """

    def __init__(
        self,
        run: RunConfig,
        mesh: ParallelMesh,
        kernels: ChosenKernels,
        tell: EventSink,
    ) -> None:
        self._run, self._mesh, self._kernels, self._tell = run, mesh, kernels, tell
        self._tested: list[AttentionScheme] = []
        self._crossed: set[_Crossed] = set()
        self._context = ContextRanks(mesh, run.model, run.parallel)
        self._lengths: list[int] = []  # of the stage's rows
        self.self_test_seconds = 0.0

    def build(self, index: int, tokens: int) -> Transformer:
        """The model of stage `index` as it is when `tokens` have been seen; for ZeRO 3 without
        storage, which the engine gives it."""
        run = self._run
        self._lengths = sorted(run.stages[index].lengths)
        self._adopt(run.plan_in_force(tokens))
        meta = run.parallel.zero_stage == 3
        self.model = Transformer(
            run.model,
            replace(self._mesh, device=torch.device("meta")) if meta else self._mesh,
            plan=self.plan,
            kernels=self._kernel_names(self.plan),
            recompute=self._policies(index),
            norm=run.kernels.norm,
            compiler=self._kernels.compiler,
            keeps_weights=run.parallel.zero_stage < 3,
            context=self._context,
        )
        return self.model

    def _policies(self, index: int) -> list[Recompute]:
        """The recompute policy of each layer. Those that a budget leads to make an event."""
        policies = policies_of(self._run, index, self._mesh.data.size)
        if isinstance(self._run.stages[index].recompute, RecomputeBudget):
            tally = ", ".join(f"{name} {policies.count(name)}" for name in dict.fromkeys(policies))
            self._tell(RecomputeEvent(layers=tally, policies=tuple(policies)))
        return policies

    def follow(self, tokens: int) -> bool:
        """Give the model the layers of the step that begins with `tokens` seen; return whether they
        changed."""
        plan = self._run.plan_in_force(tokens)
        if plan == self.plan:
            return False
        before = self.plan
        self._adopt(plan)
        self.model.adopt(plan, self._kernel_names(plan))
        self._tell(
            AnnealEvent(changes=_changes(before, plan), self_test_seconds=self.self_test_seconds)
        )
        return True

    def _adopt(self, plan: LayerPlan) -> None:
        new = {name: s for name, s in plan.schemes.items() if s not in self._tested}
        kernels = {name: self._kernels.of(scheme) for name, scheme in plan.schemes.items()}
        shape = head_shape(self._run, self._mesh)

        def alone() -> list[tuple[str, str, float]]:
            return run_self_test(
                plan.schemes,
                shape,
                kernels=kernels,
                rank=self._mesh.rank,
                passed=[name for name in plan.schemes if name not in new],
                compiler=self._kernels.compiler,
                whole=compiled_whole(self._run),
            )

        if self._mesh.context.size == 1:
            tested = alone()
        else:
            tested = alike(self._mesh.world, alone) + self._adopt_across(plan, shape, kernels)
        self._tested += new.values()
        self.self_test_seconds = round(sum(seconds for *_, seconds in tested), 3)
        self.plan = plan
        self.flops = StepFlops.of_plan(self._run.model, plan)

    def _adopt_across(
        self, plan: LayerPlan, shape: HeadShape, kernels: dict[str, str]
    ) -> list[tuple[str, str, float]]:
        """Self-test over the edges of shards what was not tested so: each scheme with each exchange
        and layout that rows of the stage's lengths have."""
        tested: list[tuple[str, str, float]] = []
        for shards, keys in self._crossings(plan):
            passed = [name for name, key in keys.items() if key in self._crossed]
            tested += run_context_test(
                plan.schemes, shape, kernels, shards, self._mesh.world, passed=passed
            )
            self._crossed |= set(keys.values())
        return tested

    def audit(self) -> None:
        """Self-test what crosses the edges of shards once more, on short rows: memory or a wire may
        fail on the way. Collective; nothing to do without context ranks.

        Raises AuditError on all ranks, as before the first step.
        """
        kernels = {name: self._kernels.of(scheme) for name, scheme in self.plan.schemes.items()}
        shape, asked = head_shape(self._run, self._mesh), set[_Crossed]()
        for shards, keys in self._crossings(self.plan):
            passed = [name for name, key in keys.items() if key in asked]
            run_context_test(
                self.plan.schemes,
                shape,
                kernels,
                shards,
                self._mesh.world,
                passed=passed,
                short=True,
            )
            asked |= set(keys.values())

    def _crossings(self, plan: LayerPlan) -> Iterator[tuple[RowShards, dict[str, _Crossed]]]:
        """Yield how rows of each of the stage's lengths lie on context ranks, if they do, and how
        each scheme's queries meet their keys there."""
        for length in self._lengths:
            shards = self._context.shards(plan, length)
            if shards is not None:
                where = (shards.axis, shards.layout)
                yield (
                    shards,
                    {
                        name: _Crossed(
                            scheme, *where, tuple(map(shards.exchange, parts_of(scheme)))
                        )
                        for name, scheme in plan.schemes.items()
                    },
                )

    def _kernel_names(self, plan: LayerPlan) -> list[str]:
        return [self._kernels.of(scheme) for scheme in plan.expand()]


def head_shape(run: RunConfig, mesh: ParallelMesh) -> HeadShape:
    """Return what one rank computes of each layer's attention."""
    model, tensor = run.model, mesh.tensor.size
    return HeadShape(
        model.num_heads // tensor,
        max(1, model.num_kv_heads // tensor),
        model.head_dim,
        DTYPES[run.precision],
        mesh.device,
    )


def compiled_whole(run: RunConfig) -> bool:
    """Return whether compiled layers are one region on each side of attention, not pieces."""
    return run.parallel.tensor == 1 and run.parallel.zero_stage < 3 and whole_serves()


def _changes(before: LayerPlan, after: LayerPlan) -> dict[str, Any]:
    """{"local.window": 640, "local.position.theta": 20000.0}: what annealing changed."""
    found: dict[str, Any] = {}
    for name, scheme in after.schemes.items():
        old = before.schemes[name]
        if scheme.window != old.window:
            found[f"{name}.window"] = scheme.window
        rope = rotation_of(scheme.position)
        if rope is not None and rope != old.position:
            found[f"{name}.position.theta"] = rope.theta
    return found
