"""Pruning granularity (structure): the units of a leaf that are kept or dropped as one.

A leaf is *prunable* or *dense*. What is kept or dropped as one inside a prunable leaf is
its *structure*: :class:`weight`, :class:`block`, :class:`kernel`, :class:`channel`, or
:class:`n_of_m`, which keeps single weights but so many of each group.

A structure divides a leaf into *units* of one size, its :meth:`Structure.tile`. What is said of units is an
array with one entry for each, of the leaf's rank, so the mask of ``block(64, 64)`` on a matrix of (1024, 512)
is (16, 8): what a block-sparse matrix product takes.

Units are made of inputs and outputs, whichever axes of a leaf they are: see :mod:`jaxsparse.layouts`. A structure by
itself takes the last axis but one for the inputs and the last for the outputs; :func:`leaf_structures` gives every
leaf's structure the layout of that leaf.
"""

from jaxsparse.structures.base import Structure, unit_scores
from jaxsparse.structures.leaves import (
    StructureLike,
    check_structure,
    check_units,
    leaf_structures,
    made_of,
    mask_structures,
    require_signs,
)
from jaxsparse.structures.n_m import n_of_m
from jaxsparse.structures.units import block, channel, kernel, weight

__all__ = [
    "Structure", "StructureLike", "block", "channel", "check_structure", "check_units", "kernel", "leaf_structures",
    "made_of", "mask_structures", "n_of_m", "require_signs", "unit_scores", "weight",
]  # fmt: skip
