"""Flax layers that compute with masks, and gates that a gradient transformation cannot provide."""

from jaxsparse.nn.gates import HardConcreteGate
from jaxsparse.nn.sparse import SparseConv, SparseDense, mask_collection

__all__ = ["HardConcreteGate", "SparseConv", "SparseDense", "mask_collection"]
