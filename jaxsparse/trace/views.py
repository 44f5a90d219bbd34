"""Leaves of params in another layout: which axes of the leaf every axis is made of.

An axis is a tuple of pieces of the leaf's axes, the last of which varies fastest; ``()`` where it is of size 1 or a
repetition, ``None`` where it is only a part of what it was. A piece ``(axis, stride, size, of)`` runs through
``size`` entries of an axis of ``of``, ``stride`` apart; a whole axis is ``((axis, 1, n, n),)``.
"""

import dataclasses
import math
from typing import Any

import jax

from jaxsparse.trace.moving import blocks
from jaxsparse.trace.rules import ELEMENTWISE, IDENTITY

__all__ = ["View", "lost", "viewed", "whole_axes", "whole_leaf"]

Piece = tuple[int, int, int, int]
Axis = tuple[Piece, ...] | None


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is made of params and constants alone.

    Attributes:
      value: an array.
      path: the leaf that it is made of, of several the first; None if it is made of constants alone.
      axes: what every axis is made of.
      scanned: the axes of the leaf that the scans around it go over.
      others: the other leaves that it is made of.
    """

    value: Any
    path: str | None
    axes: tuple[Axis, ...] = ()
    scanned: tuple[int, ...] = ()
    others: tuple[str, ...] = ()


jax.tree_util.register_dataclass(View, data_fields=["value"], meta_fields=["path", "axes", "scanned", "others"])


def whole_leaf(path: str, value: Any) -> View:
    """A leaf as it is."""
    return View(value, path, tuple(((i, 1, n, n),) if n > 1 else () for i, n in enumerate(value.shape)))


def lost(path: str | None, value: Any, others: tuple[str, ...] = ()) -> View:
    """A value made of a leaf, and of others, whose axes are not known."""
    return View(value, path, (None,) * value.ndim, others=others)


def whole_axes(axes: list[Axis]) -> tuple[int, ...] | None:
    """The axes of the leaf that these axes together go through, in this order; None if they are not whole ones."""
    if any(axis is None for axis in axes):
        return None
    pieces, found = [piece for axis in axes for piece in axis or ()], []  # type: ignore[union-attr]
    while pieces:
        axis, stride, size, of = pieces.pop(0)
        if stride * size != of:
            return None
        while stride > 1:
            if not pieces or pieces[0][0] != axis or pieces[0][1] * pieces[0][2] != stride:
                return None
            stride = pieces.pop(0)[1]
        found.append(axis)
    return tuple(found)


def viewed(eqn: Any, args: list[Any], outs: list[Any]) -> list[View]:
    """The results of a primitive whose operands are views and literals."""
    views = [arg for arg in args if isinstance(arg, View)]
    named = [view for view in views if view.path is not None]
    if not named:
        return [View(out, None) for out in outs]
    shape = eqn.outvars[0].aval.shape
    paths = dict.fromkeys(path for view in named for path in (view.path, *view.others) if path is not None)
    followed = next((v for v in named if v.value.shape == shape and any(axis is not None for axis in v.axes)), None)
    if followed and eqn.primitive.name in IDENTITY | ELEMENTWISE:
        others = tuple(path for path in paths if path != followed.path)
        return [dataclasses.replace(followed, value=out, others=others) for out in outs]
    others, axes = tuple(paths)[1:], _moved(eqn, named[0].axes) if named[0] is args[0] else None
    if axes is None:
        return [lost(named[0].path, out, others) for out in outs]
    return [
        dataclasses.replace(named[0], value=out, axes=own, others=others) for out, own in zip(outs, axes, strict=True)
    ]


def _moved(eqn, axes) -> list[tuple[Axis, ...]] | None:
    """The axes of the results of a change of layout; None if the leaf is lost."""
    name, p = eqn.primitive.name, eqn.params
    before, outs = eqn.invars[0].aval.shape, [v.aval.shape for v in eqn.outvars]
    if name == "transpose":
        return [tuple(axes[i] for i in p["permutation"])]
    if name == "squeeze":
        if any(axes[i] is None for i in p["dimensions"]):
            return None  # one of many, such as a layer of a stack
        return [tuple(axis for i, axis in enumerate(axes) if i not in p["dimensions"])]
    if name == "reshape":
        return [_reshaped(axes, before, outs[0])]
    if name == "broadcast_in_dim":
        at = {j: i for i, j in enumerate(p["broadcast_dimensions"])}
        return [tuple(axes[at[j]] if j in at and before[at[j]] == n else () for j, n in enumerate(outs[0]))]
    if name in ("slice", "split", "dynamic_slice", "tile"):
        return [
            tuple(axis if n == m else () if n == 1 else None for axis, n, m in zip(axes, before, out, strict=True))
            for out in outs
        ]
    return None


def _reshaped(axes, before, after) -> tuple[Axis, ...]:
    found: list[Axis] = [()] * len(after)
    for ins, outs in blocks(before, after):
        pieces: list[Axis]
        if len(ins) == len(outs) == 1:
            pieces = [axes[ins[0]]]
        elif any(axes[i] is None for i in ins):
            pieces = [None] * len(outs)
        else:
            pieces = _split([piece for i in ins for piece in axes[i]], [after[i] for i in outs])
        for axis, own in zip(outs, pieces, strict=True):
            found[axis] = own
    return tuple(found)


def _split(pieces: list[Piece], sizes: list[int]) -> list[Axis]:
    """Deals pieces out to axes of these sizes, from the last one on."""
    if math.prod(size for _, _, size, _ in pieces) != math.prod(sizes):
        return [None] * len(sizes)
    pieces, found = list(pieces), list[Axis]()
    for size in reversed(sizes):
        own: list[Piece] = []
        while size > 1:
            axis, stride, there, of = pieces.pop()
            part = math.gcd(there, size)
            if part == 1 or (part < there and part < size):
                return [None] * len(sizes)
            own.insert(0, (axis, stride, part, of))
            if part < there:
                pieces.append((axis, stride * part, there // part, of))
            size //= part
        found.append(tuple(own))
    return found[::-1]
