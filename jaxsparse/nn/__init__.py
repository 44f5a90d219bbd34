"""Flax layers with sparsity in them, for what a gradient transformation cannot do."""

from jaxsparse.nn.gates import HardConcreteGate

__all__ = ["HardConcreteGate"]
