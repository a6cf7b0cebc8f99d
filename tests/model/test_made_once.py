"""Masks, boundaries, rotations and query factors are made once per batch and window, whatever the
number of layers; and what every batch shares is made once."""

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

from megahybrid.config.attention import Rope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.model import rotary, score_scale
from megahybrid.model.kernels import blocked, flex, sdpa, varlen
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity.cases import model
from tests.parity.cases import score_scale as scaled
from tests.plain_model import random_tensors

LENGTH = 720  # longer than what kernels treat as short
LAYERS = 12
WINDOWS = (70, 200)


def many_layers() -> Any:
    """Two windows, rotated, and full layers whose queries are scaled; each four times."""
    rotated = {"position": {"kind": "rope", "theta": 10000.0}}
    full = {"position": {"kind": "nope"}} | scaled(kind="llama4", floor=64, coefficient=0.1)
    schemes = {f"w{window}": rotated | {"window": window} for window in WINDOWS} | {"full": full}
    plan = {"num_layers": LAYERS, "pattern": list(schemes), "schemes": schemes}
    return model("rope").model_copy(update={"layer_plan": LayerPlan.model_validate(plan)})


MAKERS = {
    "band": (blocked, "visible"),
    "band of a tail": (blocked, "_tail_masks"),
    "documents apart": (sdpa, "_masks"),
    "rotation": (rotary.RotaryTable, "build"),
    "frequencies": (Rope, "frequencies"),
    "factor": (score_scale, "query_factor"),
    "spans": (Documents, "spans"),
}


def counted(run: Any) -> Counter[str]:
    """How often each maker was called while `run` ran."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, (owner, attribute) in MAKERS.items():
            real = getattr(owner, attribute)

            def call(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                counts[name] += 1
                return real(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, attribute, call))
        run()
    return counts


@pytest.mark.parametrize("apart", [True, False], ids=["documents", "one-document"])
def test_nothing_is_made_per_layer(apart: bool) -> None:
    config = many_layers()
    built = Transformer(config, ParallelMesh.single())
    built.load_canonical(random_tensors(config, 0, torch.float32))
    tokens = torch.randint(config.vocab_size, (2, LENGTH))
    starts = Documents.from_lengths([[100, 620], [720]]).starts if apart else None
    blocked._plain_mask.cache_clear()
    score_scale._plain_factor.cache_clear()
    rotary.plain_table.cache_clear()
    rotary._frequencies.cache_clear()

    def step() -> None:
        built(tokens, tokens, starts)[0].backward()

    counts = counted(step)
    assert counts["rotation"] == 1  # one rotation serves both windows
    assert counts["factor"] == 1
    if apart:
        assert counts["band of a tail"] == len(WINDOWS)
        assert counts["documents apart"] == 1
        assert counts["band"] == 2 * len(WINDOWS)  # the head's, and the plain one under a tail's
    else:
        assert counts["band"] <= 2 * len(WINDOWS)
    again = counted(step)
    assert again["factor"] == int(apart)
    assert again["rotation"] == int(apart)
    assert again["frequencies"] == 0  # a copy from the host to a device
    assert again["band"] == (len(WINDOWS) if apart else 0)


def test_boundaries_of_packed_rows_are_kept_and_plain_ones_shared() -> None:
    cut = Documents.from_lengths([[3, 5], [8]])
    first = cut.keep("varlen", lambda: varlen.packed_boundaries(cut))
    assert cut.keep("varlen", lambda: pytest.fail("made twice")) is first
    assert first[0].tolist() == [0, 3, 8, 16] and first[1] == 8
    device = torch.device("cpu")
    assert varlen.plain_boundaries(2, 8, device) is varlen.plain_boundaries(2, 8, device)
    assert varlen.plain_boundaries(2, 8, device).tolist() == [0, 8, 16]
    assert flex._plain_mask(4, 128, device) is flex._plain_mask(4, 128, device)


def test_documents_find_their_spans_before_they_move() -> None:
    cut = Documents.from_lengths([[3, 5]])
    assert cut.to("cpu").spans() is cut.spans()
