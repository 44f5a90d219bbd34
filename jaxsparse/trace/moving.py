"""Rules of the analysis for primitives that only move entries: reshapes, slices, concatenations, paddings."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsparse.trace.conditions import ALWAYS, NEVER, all_of
from jaxsparse.trace.program import where
from jaxsparse.trace.rules import rule, without
from jaxsparse.trace.values import Val, fixed

if TYPE_CHECKING:
    from jaxsparse.trace.analysis import Analysis

__all__ = ["blocks", "take"]


@rule("transpose")
def transpose(a, eqn, args):
    """Reorder the axes."""
    x, order = args[0], eqn.params["permutation"]
    view = x.view and (x.view[0], tuple(x.view[1][i] for i in order))
    return Val(tuple(eqn.outvars[0].aval.shape), [x.axes[i] for i in order], [x.zero[i] for i in order], view=view)


@rule("broadcast_in_dim")
def broadcast_in_dim(a, eqn, args):
    """New axes, and those that were of size 1, are made at full size, then cut; zeros are zeros anywhere."""
    x, to = args[0], eqn.params["broadcast_dimensions"]
    out = a.new(eqn.outvars[0].aval, ALWAYS if x.const is not None and not x.const.any() else NEVER)
    for i, j in enumerate(to):
        if x.shape[i] == out.shape[j]:
            out.axes[j], out.zero[j] = x.axes[i], x.zero[i]
    if x.view and all(n == 1 for j, n in enumerate(out.shape) if j not in to):
        names = [x.view[1][to.index(j)] if j in to else () for j in range(len(out.shape))]
        out.view = (x.view[0], tuple(names))
    return out


@rule("squeeze")
def squeeze(a, eqn, args):
    """Drop axes of size 1."""
    out, keep = without(args[0], eqn.params["dimensions"]), eqn.params["dimensions"]
    if args[0].view:
        out.view = (args[0].view[0], tuple(v for i, v in enumerate(args[0].view[1]) if i not in keep))
    return out


@rule("reshape")
def reshape(a, eqn, args):
    """Merge axes into all their combinations, and split others into them."""
    x, out, named = args[0], fixed(eqn.outvars[0].aval), {}
    for ins, outs in blocks(x.shape, out.shape):
        names = [x.view[1][i] for i in ins] if x.view else [None]
        if len(outs) == 1 and None not in names:
            named[outs[0]] = tuple(name for of_axis in names for name in of_axis or ())
        if len(ins) == len(outs) == 1:
            out.axes[outs[0]], out.zero[outs[0]] = x.axes[ins[0]], x.zero[ins[0]]
            continue
        zero = all_of(*(x.zero[i] for i in ins if a.spaces.expand(x.axes[i]) is not None))
        merged = a.spaces.merge([x.axes[i] for i in ins], [x.shape[i] for i in ins])
        parts = a.spaces.split(merged, [out.shape[i] for i in outs], where(eqn))
        for i, ids in zip(outs, parts, strict=True):
            out.axes[i], out.zero[i] = ids, zero
    if x.view:
        out.view = (x.view[0], tuple(named.get(i, () if n == 1 else None) for i, n in enumerate(out.shape)))
    return out


def blocks(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a shape become which of another: pairs of lists whose sizes have the same product; none of size 1.

    Examples:
      >>> blocks((2, 3, 4), (6, 2, 2))
      [([0, 1], [0]), ([2], [1, 2])]
    """
    if 0 in a or 0 in b:  # any axis may become any other
        return [([i for i, n in enumerate(a) if n != 1], [j for j, n in enumerate(b) if n != 1])]
    found, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        ins, outs = list(range(i, min(i + 1, len(a)))), list(range(j, min(j + 1, len(b))))
        while (left := math.prod(a[k] for k in ins)) != (right := math.prod(b[k] for k in outs)):
            if left < right:
                ins.append(i + len(ins))
            else:
                outs.append(j + len(outs))
        i, j = i + len(ins), j + len(outs)
        ins, outs = [k for k in ins if a[k] != 1], [k for k in outs if b[k] != 1]
        if ins or outs:
            found.append((ins, outs))
    return found


def take(a: "Analysis", eqn: Any, x: Val, picks: dict[int, np.ndarray]) -> Val:
    """The same value with fewer or other entries along some axes: axis -> their places."""
    axes, shape = list(x.axes), list(x.shape)
    for i, pick in picks.items():
        shape[i], ids = len(pick), x.axes[i]
        if ids is not None:
            axes[i] = ids[pick]
            if len(pick) == 1:
                a.spaces.freeze(axes[i], where(eqn, "a single entry that is taken out"))
    view = x.view and (x.view[0], tuple(None if i in picks else name for i, name in enumerate(x.view[1])))
    return dataclasses.replace(x, shape=tuple(shape), axes=axes, zero=list(x.zero), const=None, view=view)


@rule("slice")
def slice_(a, eqn, args):
    """Take a range of entries."""
    p, shape = eqn.params, args[0].shape
    steps = p["strides"] or [1] * len(shape)
    ranges = [np.arange(*r) for r in zip(p["start_indices"], p["limit_indices"], steps, strict=True)]
    return take(a, eqn, args[0], {i: r for i, r in enumerate(ranges) if len(r) != shape[i]})


@rule("rev")
def rev(a, eqn, args):
    """Reverse axes."""
    return take(a, eqn, args[0], {i: np.arange(args[0].shape[i])[::-1] for i in eqn.params["dimensions"]})


@rule("split")
def split(a, eqn, args):
    """Take ranges one after the other."""
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    return [take(a, eqn, args[0], {axis: np.arange(e - n, e)}) for n, e in zip(sizes, np.cumsum(sizes), strict=True)]


@rule("concatenate")
def concatenate(a, eqn, args):
    """Join entries along one axis; the other axes are the same."""
    d, out = eqn.params["dimension"], fixed(eqn.outvars[0].aval)
    for i in range(len(out.shape)):
        if i == d:
            out.axes[i] = _joined(a, [x.axes[i] for x in args], [x.shape[i] for x in args])
            out.zero[i] = all_of(*(x.zero[i] for x in args if a.spaces.expand(x.axes[i]) is not None))
        else:
            out.axes[i] = a.unify_all([x.axes[i] for x in args], where(eqn))
            out.zero[i] = all_of(*(x.zero[i] for x in args))
    return out


def _joined(a, axes, sizes):
    axes = [a.spaces.expand(ids) for ids in axes]
    width = max((ids.shape[1] for ids in axes if ids is not None), default=0)
    if not width:
        return None
    axes = [np.zeros((n, 0), np.int64) if ids is None else ids for ids, n in zip(axes, sizes, strict=True)]
    return np.concatenate([np.pad(ids, ((0, 0), (0, width - ids.shape[1]))) for ids in axes])


@rule("pad")
def pad(a, eqn, args):
    """Put entries around others; what is put there is zero, or no axis has zeros where entries go away."""
    x, config, out = args[0], eqn.params["padding_config"], fixed(eqn.outvars[0].aval)
    padded = any(low > 0 or high > 0 or inner for low, high, inner in config)
    zeros = not padded or (args[1].const is not None and not args[1].const.any())
    for i, (low, high, inner) in enumerate(config):
        ids, out.zero[i] = x.axes[i], x.zero[i] if zeros else NEVER
        if ids is not None and (inner or low < 0 or high < 0):
            a.spaces.freeze(ids, where(eqn))
        elif ids is not None and (low or high):
            out.axes[i] = _joined(a, [a.spaces.fresh(low), ids, a.spaces.fresh(high)], [low, len(ids), high])
        else:
            out.axes[i] = ids
    return out


@rule("tile")
def tile(a, eqn, args):
    """Repeat entries, which live and die together with what they repeat."""
    x, out = args[0], a.new(eqn.outvars[0].aval)
    for i, n in enumerate(x.shape):
        if n == out.shape[i]:
            out.axes[i], out.zero[i] = x.axes[i], x.zero[i]
        elif n > 1:
            ids = x.axes[i]
            out.axes[i], out.zero[i] = None if ids is None else ids[np.arange(out.shape[i]) % n], x.zero[i]
    return out


@rule("stack")
def stack(a, eqn, args):
    """Put values side by side along a new axis, which stays; the others are the same."""
    axis, rank = eqn.params["axis"], len(args[0].shape)
    axes = [a.unify_all([x.axes[i] for x in args], where(eqn)) for i in range(rank)]
    zero = [all_of(*(x.zero[i] for x in args)) for i in range(rank)]
    shape = tuple(eqn.outvars[0].aval.shape)
    return Val(shape, [*axes[:axis], None, *axes[axis:]], [*zero[:axis], ALWAYS, *zero[axis:]])


@rule("unstack")
def unstack(a, eqn, args):
    """Take the values along an axis apart, which stays."""
    axis = eqn.params["axis"]
    a.spaces.freeze(args[0].axes[axis], where(eqn, "single entries that are taken out"))
    return [without(args[0], [axis]) for _ in eqn.outvars]
