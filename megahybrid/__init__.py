"""Pretraining of layer-hybrid transformers in stages, under tensor, sequence and ZeRO degrees."""

__version__ = "0.2.0"
