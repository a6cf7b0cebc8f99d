"""`python -m megahybrid`: the same as the `megahybrid` command."""

import sys

from megahybrid.cli import main

sys.exit(main())
