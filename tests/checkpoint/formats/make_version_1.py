"""How `version-1/` was written, by the writer of that day. Never run it again: a reader that only
reads what today's writer writes would pass."""

import sys
from pathlib import Path

from tests.checkpoint.examples import save_together, snapshot

if __name__ == "__main__":
    parts = snapshot(3).fragments
    (result, *_) = save_together(
        Path(sys.argv[1]), [snapshot(3, parts[rank::2]) for rank in range(2)]
    )
    print(result.path)
