"""Slurm: submit a run, keep it alive, say in one line what it does.

Knows runs only by their files: it imports megahybrid.config, megahybrid.errors and
megahybrid.heartbeat, so it works on a login node in a second.
"""
