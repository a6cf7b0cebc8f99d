"""`megahybrid study`: a grid of runs, each through the commands, and what came out of them."""
