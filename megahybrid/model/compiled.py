"""torch.compile's own settings, set the same way everywhere."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Two programs for each kind of layer, and each of these again for every (rows, length) of a run:
# torch's own limit of 8 would refuse a stage that mixes a few lengths.
MOST_PROGRAMS = 256


def traced_whole(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`function` compiled at its first call, by input shapes. What cannot be traced whole is an
    error, never a slower program."""
    import torch

    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def prepare_compiler() -> None:
    """What a compiler needs before its first program."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_PROGRAMS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_PROGRAMS


def keep_programs(folder: Path) -> None:
    """Compiled programs outlive the process in `folder`, unless the user has named a place: a
    restart takes them from there. Call it before anything is compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))
