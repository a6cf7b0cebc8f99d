"""A budget of memory becomes a recompute policy per layer: as little as fits, cheapest first."""

from pathlib import Path

import pytest

from megahybrid.config import RunConfig, check_run, load
from megahybrid.config.counting import layer_flops_per_token
from megahybrid.config.memory_estimate import memory_per_rank, policies_of, working
from megahybrid.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
COST = {"none": 0, "selective": 0, "chunked": 0.3, "full": 1, "offload": 1}


def long_stage(budget: float, *more: str) -> RunConfig:
    """The 8 B shape at 64k on tensor 4, with a budget."""
    return load(
        CONFIGS / "runs/paper_rnope_swa_8b.yaml",
        [f"stages.1.recompute={{budget_gib: {budget}}}", *more],
    )


def needed(run: RunConfig, policies: list[str]) -> float:
    memory = memory_per_rank(
        run.model,
        run.stages[1],
        tensor=run.parallel.tensor,
        data_degree=8,
        zero_stage=run.parallel.zero_stage,
        precision=run.precision,
        policies=policies,
    )
    return memory.total / 2**30


@pytest.mark.parametrize("device,inputs", [("cpu", 1), ("cuda", 2)])
def test_an_offloaded_layers_input_comes_back_and_on_a_device_the_next_ones_with_it(
    device: str, inputs: int
) -> None:
    # A vocabulary whose loss takes less than a layer.
    model = long_stage(1000).model.model_copy(update={"vocab_size": 1024})
    one = 2 * 2**15 * model.hidden_size
    full, away = (
        working(model, [policy] * 32, 2**15, 1, "bf16", device) for policy in ("full", "offload")
    )
    assert away - full == inputs * one


def test_what_fits_is_not_recomputed() -> None:
    run = long_stage(1000)
    assert set(policies_of(run, 1, 8)) == {"none"}


def test_every_budget_is_met_with_as_few_flops_as_the_next_smaller_policy_would_break() -> None:
    before = 0.0
    run = long_stage(1000)
    most = needed(run, ["none"] * 32)
    least = needed(run, ["offload"] * 32)
    for step in range(1, 9):
        budget = most - (most - least) * step / 8.5
        run = long_stage(budget)
        policies = policies_of(run, 1, 8)
        assert needed(run, policies) <= budget
        cost = sum(COST[policy] for policy in policies)
        assert cost >= before  # less memory never costs fewer FLOPs
        before = cost
        full = [layer for layer, policy in enumerate(policies) if policy == "full"]
        if full and "offload" not in policies:
            weakened = [*policies]
            weakened[full[-1]] = "chunked"
            assert needed(run, weakened) > budget


def test_the_layers_with_the_fewest_flops_are_recomputed_first() -> None:
    run = long_stage(30)
    policies = policies_of(run, 1, 8)
    flops = [layer_flops_per_token(run.model, s, 65536) for s in run.plan_at(1).expand()]
    recomputed = [flops[n] for n, policy in enumerate(policies) if policy == "full"]
    spared = [flops[n] for n, policy in enumerate(policies) if policy != "full"]
    assert recomputed and spared and max(recomputed) <= max(spared)
    assert max(recomputed) == min(flops)


def test_a_budget_that_nothing_meets_is_refused_by_check() -> None:
    run = long_stage(5)
    with pytest.raises(ConfigError, match=r"budget_gib=5 is less than a step takes .*Lower"):
        check_run(run, 32)
    check_run(run)  # without ranks nobody can tell


def test_a_budget_must_be_a_number_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"stages\.1\.recompute\.budget_gib=0 must be greater"):
        long_stage(0)
    with pytest.raises(ConfigError, match=r"budget_gb is not a field.*budget_gib"):
        load(CONFIGS / "runs/paper_rnope_swa_8b.yaml", ["stages.1.recompute={budget_gb: 3}"])
