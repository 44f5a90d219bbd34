"""Flax layers with sparsity in them: what computes with masks, and what a gradient transformation cannot do."""

from jaxsparse.nn.gates import HardConcreteGate
from jaxsparse.nn.sparse import SparseConv, SparseDense, mask_collection

__all__ = ["HardConcreteGate", "SparseConv", "SparseDense", "mask_collection"]
