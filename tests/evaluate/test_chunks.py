"""Layers with chunks keep no more keys than a chunk has, and go on as the whole text is read."""

import torch

from megahybrid.evaluate.cache import Cache
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity.cases import HEADS, model


def test_a_cache_keeps_one_chunk() -> None:
    ours = Transformer(model("chunk", kv_heads=HEADS), ParallelMesh.single())
    cache = Cache(ours, torch.zeros(2, 1000, dtype=torch.int64))
    chunks = [scheme.chunk for scheme in ours.config.layer_plan.expand()]
    assert [layer.keys.shape[2] for layer in cache.layers.values()] == chunks
