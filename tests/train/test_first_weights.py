"""ZeRO 3 draws a parameter, cuts it and lets it go: the same bits as a model drawn whole."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import LEARNING_RATE, PERSISTENT_ELEMENTS, Case

# (what of the model, tensor degree, precision), in launches of two and of four ranks; `tied`
# shares one parameter between two modules, `kv_heads=1` keeps replicated ones beside cut ones.
FAMILIES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "replicated": {"tied": False, "kv_heads": 1},
}
LAYOUTS = {2: (("tied", 1, "fp32"),), 4: (("replicated", 2, "bf16"),)}


def both_ways(
    ranks: distributed.Ranks, layouts: tuple[tuple[str, int, str], ...]
) -> list[tuple[list[list[tuple]], list[float], float]]:
    """Of each layout: fragments drawn whole and drawn one by one, the losses of two steps each,
    and what share of the model was held at most while the second was made."""
    return [_both_ways(ranks, *layout) for layout in layouts]


def _both_ways(
    ranks: distributed.Ranks, family: str, tensor: int, precision: str
) -> tuple[list[list[tuple]], list[float], float]:
    from megahybrid.model.init import draw, initialise
    from megahybrid.model.transformer import Transformer
    from megahybrid.train.engine import Engine, MicroBatch, engine, zero3_init

    mesh = ranks.mesh(tensor)
    shape = model("layernorm-per_head", **FAMILIES[family])
    case = Case(shape, tensor, mesh.data.size, 3, precision=precision, seed=7)
    run = case.run_config()
    real_settings = engine.engine_settings

    def cutting(*of: Any) -> dict[str, Any]:
        made = real_settings(*of)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        return made

    fragments: list[list[tuple]] = []
    losses: list[float] = []
    held: list[int] = []
    for whole in (True, False):
        place = mesh if whole else replace(mesh, device=torch.device("meta"))
        built = Transformer(shape, place)
        local = sum(parameter.numel() for parameter in built.parameters())
        if whole:
            initialise(built, run.seed, run.optimizer)

        def watched(parameter: Any, *of: Any, built: Transformer = built) -> None:
            there = [p for p in built.parameters() if not p.is_meta]
            cut = sum(p.ds_tensor.numel() for p in there)  # type: ignore[attr-defined]
            held.append(sum(p.data.numel() for p in there if p.data.dim()) + cut)
            draw(parameter, *of)

        with (
            mock.patch.object(engine, "engine_settings", cutting),
            mock.patch.object(zero3_init, "draw", watched),
        ):
            made = Engine(built, run, mesh)
        fragments.append(
            [(f.tensor, f.state, f.box, f.flat, np.array(f.data)) for f in made.fragments()]
        )
        for step in range(2):
            share = case.micro_batches(step)[mesh.data.rank : mesh.data.rank + 1]
            batches = [MicroBatch(each.tokens, each.targets, each.starts) for each in share]
            losses.append(made.train_step(batches, LEARNING_RATE, audit=True).loss)
        made.close()
    return fragments, losses, max(held) / local


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_weights_drawn_one_by_one_are_those_of_a_model_drawn_whole(world_size: int) -> None:
    for told in distributed.run(world_size, both_ways, LAYOUTS[world_size], timeout_seconds=240):
        for layout, (fragments, losses, held) in zip(LAYOUTS[world_size], told, strict=True):
            whole, one_by_one = fragments
            assert [part[:4] for part in whole] == [part[:4] for part in one_by_one], layout
            for mine, other in zip(whole, one_by_one, strict=True):
                assert np.array_equal(mine[4].view(np.uint32), other[4].view(np.uint32)), mine[:4]
            assert losses[:2] == losses[2:], layout
            data = world_size // layout[1]
            assert held <= 1 / data + 0.01, f"{layout}: {held:.2f} of the model were held"
