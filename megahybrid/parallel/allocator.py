"""The settings of torch's CUDA allocator, made before it is first used."""

import os

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expandable_segments() -> None:
    """Let the allocator's segments grow, unless the user has set it up.

    Stages of other lengths then do not leave holes that no later tensor fits. Without effect once
    CUDA is in use, and on CPU.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ[NAMES[0]] = "expandable_segments:True"
