"""Causal attention with a window, documents and grouped heads, by whichever kernel fits.

A kernel that cannot do what is asked refuses; none attends to more or less than asked.
"""

from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.kernel import Halves
from megahybrid.model.kernels.registry import KERNELS, attend, choose, halves
from megahybrid.model.kernels.spec import AttentionSpec, Place

__all__ = ["KERNELS", "AttentionSpec", "Documents", "Halves", "Place", "attend", "choose", "halves"]
