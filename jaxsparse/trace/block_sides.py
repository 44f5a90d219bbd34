"""Blocks of masks seen along the axes of an array: how far its mask is constant, and what changes of layout do to that.

The side of an axis is a number n such that the mask does not change within entries i * n to (i + 1) * n along it: the
block's side, 1 for nothing of the kind, 0 where nobody said.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsparse.layouts import Layout
from jaxsparse.structures import Structure, block, check_structure, made_of
from jaxsparse.trace.moving import blocks
from jaxsparse.trees import by_pattern

__all__ = ["given_blocks", "leaf_sides", "merged", "moved"]

Sides = tuple[int, ...]


def given_blocks(given: Any, layouts: Mapping[str, Layout], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve the option ``block=`` for leaves: path -> (inputs, outputs) of a block, None where it is not known.

    Raises:
      ValueError: for anything else but pairs and structures, naming the leaf.
    """
    if isinstance(given, Mapping):
        chosen: Callable = by_pattern(given, list(leaves), "block").get
    else:
        chosen = given if callable(given) and not isinstance(given, Structure) else lambda path: given
    return {path: _pair(chosen(path), path, layouts[path], leaf.shape) for path, leaf in leaves.items()}


def _pair(given: Any, path: str, layout: Layout, shape: Sequence[int]) -> tuple[int, int] | None:
    if isinstance(given, str | Structure):
        check_structure(given)
        unit = made_of(given)
        fits = isinstance(unit, block) and layout.is_matrix and block(unit.bm, unit.bn, layout=layout).fits(shape)
        return (unit.bm, unit.bn) if fits else None  # type: ignore[attr-defined]
    if given is None:
        return None
    sides = tuple(given) if isinstance(given, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"block of {path} must be (inputs, outputs), a structure or None, got {given!r}")
    return sides[0], sides[1]


def leaf_sides(pair: tuple[int, int] | None, layout: Layout, shape: Sequence[int]) -> Sides:
    """Sides along the axes of a leaf whose mask is made of blocks of (inputs, outputs)."""
    at, sides = layout.of_rank(len(shape)), [1] * len(shape)
    if pair is None or not layout.is_matrix:
        return (0,) * len(shape)
    for side, axes in zip(pair, (at.inputs, at.outputs), strict=True):
        for axis, along in zip(axes, split(side, [shape[i] for i in axes]), strict=True):  # type: ignore[arg-type,union-attr]
            sides[axis] = along
    return tuple(sides)


def merged(sides: Sequence[int], sizes: Sequence[int]) -> int:
    """The side of several axes seen as one, the last of which varies fastest."""
    total = 1
    for i in reversed(range(len(sizes))):
        first = math.prod(sizes[:i]) == 1
        if sides[i] == 0:
            return total if total > 1 else 0
        if sides[i] < sizes[i]:
            return total * (sides[i] if first else math.gcd(sides[i], sizes[i]))
        total *= sizes[i] if not first else sides[i]
    return total


def split(side: int, sizes: Sequence[int]) -> Sides:
    """The sides of several axes that an axis is split into."""
    if side == 0:
        return (0,) * len(sizes)
    found: list[int] = []
    for i in reversed(range(len(sizes))):
        if i and side % sizes[i] == 0:
            found.append(sizes[i])
            side //= sizes[i]
        else:
            found.append(side if i == 0 else math.gcd(side, sizes[i]))
            side = 1
    return tuple(found[::-1])


def moved(eqn: Any, sides: Sides) -> list[Sides]:
    """The sides of the outputs of a change of layout, of an array with these sides."""
    name, p = eqn.primitive.name, eqn.params
    before, outs = eqn.invars[0].aval.shape, [v.aval.shape for v in eqn.outvars]
    if name == "transpose":
        return [tuple(sides[i] for i in p["permutation"])]
    if name == "squeeze":
        return [tuple(side for i, side in enumerate(sides) if i not in p["dimensions"])]
    if name == "reshape":
        return [_reshaped(sides, before, outs[0])]
    if name == "broadcast_in_dim":
        at = {j: i for i, j in enumerate(p["broadcast_dimensions"])}
        return [tuple(sides[at[j]] if j in at and before[at[j]] == n else n for j, n in enumerate(outs[0]))]
    if name == "split":
        starts = [sum(p["sizes"][:i]) for i in range(len(outs))]
        return [_shifted(sides, before, out, {p["axis"]: int(start)}) for start, out in zip(starts, outs, strict=True)]
    if name == "slice" and p["strides"] is None:
        return [_shifted(sides, before, outs[0], dict(enumerate(p["start_indices"])))]
    return [_shifted(sides, before, outs[0], {})]


def _shifted(sides, before, after, starts) -> Sides:
    """Sides of a part: as they were along axes that are whole or cut at the edge of a block."""
    return tuple(
        side if n == whole or (side and i in starts and starts[i] % side == 0) else 1 if side == 1 else 0
        for i, (side, whole, n) in enumerate(zip(sides, before, after, strict=True))
    )


def _reshaped(sides, before, after) -> Sides:
    found = [1] * len(after)
    for ins, outs in blocks(before, after):
        side = merged([sides[i] for i in ins], [before[i] for i in ins])
        for axis, along in zip(outs, split(side, [after[i] for i in outs]), strict=True):
            found[axis] = along
    return tuple(found)
