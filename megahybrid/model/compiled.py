"""torch.compile's own settings, set the same way everywhere."""

import os
from pathlib import Path

# Two programs for each kind of layer, and each of these again for every (rows, length) of a run:
# torch's own limit of 8 would refuse a stage that mixes a few lengths.
MOST_PROGRAMS = 256


def prepare_compiler() -> None:
    """What a compiler needs before its first program."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_PROGRAMS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_PROGRAMS


def keep_programs(folder: Path) -> None:
    """Compiled programs outlive the process in `folder`, unless the user has named a place: a
    restart takes them from there. Call it before anything is compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))
