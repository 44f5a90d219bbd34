"""Positions of n of every m weights along the inputs, as sparse matrix hardware takes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse.artifacts.encodings import in_bytes, require
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.structures import StructureLike, check_structure, leaf_structures, made_of, n_of_m, weight
from jaxsparse.trees import is_masked_node, leaf_paths

__all__ = ["decode_n_of_m", "encode_n_of_m", "exact_n_of_m", "in_groups", "leaf_units", "order_of_axes"]

_LENGTHS = (4, 8, 16, 32)  # of groups that are found without being asked for


def order_of_axes(structure: n_of_m, rank: int) -> tuple[tuple[int, ...], int]:
    """The order of a leaf's axes in which groups follow one another, with the axes along which they lie last.

    Of a matrix (inputs, outputs) it is (outputs, inputs), as hardware has the sparse operand, and of a convolution
    (stack, outputs, places, inputs).

    Args:
      structure: with the layout of the leaf.
      rank: of the leaf.

    Returns:
      The order, and how many of its last axes the groups lie along.

    Examples:
      >>> order_of_axes(n_of_m(2, 4), 4)
      ((3, 0, 1, 2), 1)
      >>> order_of_axes(n_of_m(2, 4, layout=Layout(inputs=(0, 1), outputs=2)), 3)
      ((2, 0, 1), 2)
    """
    if isinstance(structure.axis, int):
        one = structure.axis % rank
        return (*(axis for axis in range(rank) if axis != one), one), 1
    layout = structure.layout
    at = (Layout(rank - 2, rank - 1) if layout is None or layout.is_plain(rank) else layout).of_rank(rank)
    along, others = (at.inputs, at.outputs) if structure.axis == "inputs" else (at.outputs, at.inputs)
    return (*at.stack, *others, *at.places(rank), *along), len(along)  # type: ignore[misc, arg-type]


def in_groups(leaf: np.ndarray, m: int, axes: Sequence[int]) -> np.ndarray:
    """A leaf with its axes in another order, by groups: (groups, m)."""
    return leaf.transpose(axes).reshape(-1, m)


def exact_n_of_m(mask: np.ndarray, layout: Layout) -> tuple[int, int] | None:
    """The n and m of a mask that keeps exactly n of every m weights along its inputs; None if there are none.

    Examples:
      >>> exact_n_of_m(np.tile([[True], [False], [False], [True]], (2, 5)), Layout(0, 1))
      (2, 4)
    """
    if not layout.is_matrix or not mask.size:
        return None
    axes, count = order_of_axes(n_of_m(2, 4, layout=layout), mask.ndim)
    length, seen = math.prod(mask.shape[axis] for axis in axes[-count:]), in_groups(mask, 1, axes)
    for m in _LENGTHS:
        if length % m:
            return None  # nor does a multiple of it divide the inputs
        kept = np.count_nonzero(seen.reshape(-1, m), axis=1)
        if 0 < kept[0] < m and (kept == kept[0]).all():
            return int(kept[0]), m
    return None


def leaf_units(
    tree: Any, kept: Sequence[np.ndarray | None], structure: StructureLike | None, layout: LayoutLike
) -> dict[str, n_of_m]:
    """Choose the leaves to store by n of every m: those that a structure says, or whose masks are exactly so.

    Args:
      tree: the params.
      kept: the mask of every leaf, None for dense ones.
      structure: as for :func:`jaxsparse.save_sparse`.
      layout: as for :func:`jaxsparse.save_sparse`.

    Returns:
      Path -> the structure of each of these leaves, with its layout.

    Raises:
      ValueError: for other structures, and patterns that match no sparse leaf.
    """
    names, treedef = leaf_paths(tree), jax.tree.structure(tree)
    if structure is not None:
        check_structure(structure)
        for given in structure.values() if isinstance(structure, Mapping) else [structure]:
            if not isinstance(made_of(given), n_of_m | weight):
                raise ValueError(f'structure of a file must be n_of_m or "weight", got {given!r}')
        prunable = treedef.unflatten([mask is not None for mask in kept])
        units = jax.tree.leaves(leaf_structures(structure, tree, prunable, layout=layout), is_leaf=is_masked_node)
        return {name: unit for name, unit in zip(names, units, strict=True) if isinstance(unit, n_of_m) and unit.m > 1}
    found, layouts = {}, leaf_layouts(tree, layout)
    for name, mask in zip(names, kept, strict=True):
        if mask is not None and (pair := exact_n_of_m(mask, layouts[name])):
            found[name] = n_of_m(*pair, layout=layouts[name])
    return found


def encode_n_of_m(mask: np.ndarray, n: int, m: int, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode a mask that keeps at most n of every m weights, with n positions for every group.

    A group that keeps fewer has the first of its free positions too, so that every group has n.

    Args:
      mask: bool, of the leaf's shape.
      n: how many positions a group has.
      m: how many weights a group has.
      axes: the order of :func:`order_of_axes`.

    Returns:
      The bytes; the positions, (groups, n), in increasing order; and which of them are of the mask, bool (groups, n).

    Raises:
      ValueError: if a group keeps more than n.

    Examples:
      >>> packed, positions, live = encode_n_of_m(np.array([[1, 0], [0, 0], [1, 0], [0, 1]], bool), 2, 4, (1, 0))
      >>> positions.tolist(), live.tolist()
      ([[0, 2], [0, 3]], [[True, True], [False, True]])
      >>> [f"{byte:08b}" for byte in packed]  # the lowest two bits are the first position; then the bits of ``live``
      ['11001000', '11010000']
    """
    seen = in_groups(mask, m, axes)
    kept = np.count_nonzero(seen, axis=1)
    most = kept.max(initial=0)
    require(most <= n, f"a group of {m} weights keeps {most} of them, more than {n}")
    if (kept == n).all():
        positions = np.flatnonzero(seen).reshape(-1, n) % m
    else:
        positions = np.sort(np.argsort(~seen, axis=1, kind="stable")[:, :n], axis=1)
    live = np.take_along_axis(seen, positions, axis=1)
    bits = (positions.reshape(-1, 1) >> np.arange(_width(m)) & 1).astype(np.uint8)
    packed = [np.packbits(bits, bitorder="little"), *([] if live.all() else [np.packbits(live)])]
    return np.concatenate(packed), positions, live


def decode_n_of_m(packed: np.ndarray, size: int, kept: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode the result of :func:`encode_n_of_m`.

    Args:
      packed: the bytes, uint8.
      size: the number of weights of the leaf, a multiple of m.
      kept: how many of them the mask keeps, at most n of every m.
      n: how many positions a group has.
      m: how many weights a group has.

    Returns:
      The indices of all positions in the flat leaf with its axes in that order, (groups * n,); and which of them are of
      the mask, bool of the same shape.

    Raises:
      ValueError: if the bytes are not the encoding of such a mask.
    """
    slots, width = size // m * n, _width(m)
    first = in_bytes(slots * width)
    fits = packed.size == first + (in_bytes(slots) if kept < slots else 0)
    require(fits, f"its positions are not those of {kept} weights, {n} of every {m} among {size}")
    bits, live = np.unpackbits(packed[:first], bitorder="little"), np.unpackbits(packed[first:])
    padded = bits[slots * width :].any() or live[slots:].any()
    require(not padded, "the bits that pad its last byte are not 0")
    positions = np.zeros(slots, np.int64)
    for i in range(width):
        positions |= bits[i : slots * width : width].astype(np.int64) << i
    groups = positions.reshape(-1, n)
    increase = (groups[:, 1:] > groups[:, :-1]).all() and positions.max(initial=0) < m
    require(increase, f"the positions in a group do not increase, or run past its {m} weights")
    live = live[:slots].view(bool) if kept < slots else np.ones(slots, bool)
    require(np.count_nonzero(live) == kept, f"its positions do not keep {kept} weights")
    return (np.arange(groups.shape[0])[:, None] * m + groups).ravel(), live


def _width(m: int) -> int:
    """How many bits a position among m weights has."""
    return (m - 1).bit_length()
