"""What every worker of a pool imports, done once in the process that forks them.

A worker that imports these itself spends some ten seconds of a core on it: four on DeepSpeed, four
on the compilers, which the first engine and the first checkpointed block import, and the rest on
our own modules and on what modules of tests import. `gc.freeze` leaves what stands here out of
every later collection: DeepSpeed collects at each start of ZeRO-3, half a second of walking over
modules that never go away.
"""

import contextlib
import gc
import sys

# A test may read what the session's processes print, and DeepSpeed greets.
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx

    # Its optimizers are looked at by every ZeRO engine; importing one compiles a function.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, isort: skip

    import megahybrid.train.run  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()
