"""Tokens on disk, the order in which a run meets them, and the batches it is given."""
