"""Meshes, collectives and sharded layers: the only package that calls torch.distributed."""
