"""`python -m megahybrid`: the same as the `megahybrid` command."""

import gc
import sys

from megahybrid.cli import main


def run() -> int:
    """Run the command of this process, which then ends."""
    code = main()
    # Else the interpreter looks for cycles among all of torch's modules before it lets go of them,
    # half a second of a core in every process.
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(run())
