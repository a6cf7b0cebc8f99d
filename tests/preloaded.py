"""What every worker of a pool imports, done once in the process that forks them.

A worker that imports these itself spends some four seconds of a core on it. `gc.freeze` leaves what
stands here out of every later collection: DeepSpeed collects at each start of ZeRO-3, half a second
of walking over modules that never go away.
"""

import contextlib
import gc
import sys

# A test may read what the session's processes print, and DeepSpeed greets.
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed  # noqa: F401
    import torch

    import megahybrid.train.engine  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()
