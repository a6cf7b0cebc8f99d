"""Slurm: submit a run, keep it alive, say in one line what it does.

Knows runs only by their files: it imports megahybrid.config, megahybrid.errors and
megahybrid.heartbeat, so it works on a login node in a second.
"""

import sys

if __name__ == "launch":
    # A batch script of megahybrid 0.1 starts `python -m launch.supervise`; code 2 keeps Slurm from
    # starting it again.
    print(
        "megahybrid: this batch script was written before megahybrid 0.2 (it starts "
        "launch.supervise, now megahybrid.launch.supervise). Submit the run again: "
        "`megahybrid launch submit` with its run file goes on from its newest checkpoint.",
        file=sys.stderr,
    )
    sys.exit(2)
