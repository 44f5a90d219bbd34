"""Rules of the analysis for primitives that take from, or write to, places that data say."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsparse.trace.conditions import NEVER, all_of
from jaxsparse.trace.program import where
from jaxsparse.trace.rules import rule
from jaxsparse.trace.values import Val, fixed

if TYPE_CHECKING:
    from jaxsparse.trace.analysis import Analysis


@rule("gather")
def gather(a, eqn, args):
    """Take slices at places that data say; known places along one axis are a choice of its entries."""
    x, index, p = args[0], args[1], eqn.params
    d, sizes, out = p["dimension_numbers"], p["slice_sizes"], fixed(eqn.outvars[0].aval)
    lost = {*d.collapsed_slice_dims, *d.operand_batching_dims}
    batch = [o for o in range(len(out.shape)) if o not in d.offset_dims]
    for i, o in zip([i for i in range(len(x.shape)) if i not in lost], d.offset_dims, strict=True):
        if sizes[i] == x.shape[i]:
            out.axes[o], out.zero[o] = x.axes[i], x.zero[i]
        else:
            a.spaces.freeze(x.axes[i], where(eqn, "taken from at traced places"))
    for b, ids in zip(batch, index.axes[:-1], strict=True):
        if d.operand_batching_dims:
            a.spaces.freeze(ids, where(eqn, "taken from at traced places"))
        elif index.const is None:
            out.axes[b], out.zero[b] = ids, NEVER
    for i in sorted(lost):
        picks = np.array([-1]) if index.const is None else index.const.reshape(-1)
        alone = (i,) == d.start_index_map and len(batch) == 1 and not d.operand_batching_dims
        if alone and (picks >= 0).all() and (picks < x.shape[i]).all():
            if x.axes[i] is not None and len(picks) > 1:  # x[:, [2, 0, 1]]
                out.axes[batch[0]], out.zero[batch[0]] = x.axes[i][picks], x.zero[i]
            elif x.axes[i] is not None:
                a.spaces.freeze(x.axes[i][picks], where(eqn, "a single entry that is taken out"))
        else:
            a.spaces.freeze(x.axes[i], where(eqn, "indexed by data"))
    return out


@rule("dynamic_slice")
def dynamic_slice(a, eqn, args):
    """Take a slice at a traced place; axes that are taken whole pass."""
    x, out = args[0], fixed(eqn.outvars[0].aval)
    for i, n in enumerate(eqn.params["slice_sizes"]):
        if n == x.shape[i]:
            out.axes[i], out.zero[i] = x.axes[i], x.zero[i]
        else:
            a.spaces.freeze(x.axes[i], where(eqn, "taken from at traced places"))
    return out


@rule("dynamic_update_slice")
def dynamic_update_slice(a, eqn, args):
    """Write a slice at a traced place; axes that are written whole are the same."""
    x, y = args[:2]
    return _written(a, eqn, x, y, {i: i for i, n in enumerate(y.shape) if n == x.shape[i]})


@rule(
    "scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter-min", "scatter-max", "scatter-sub"
)
def scatter(a, eqn, args):
    """Write slices at places that data say; axes that are written whole are the same."""
    x, index, y = args[:3]
    d = eqn.params["dimension_numbers"]
    window = [i for i in range(len(x.shape)) if i not in {*d.inserted_window_dims, *d.operand_batching_dims}]
    pairs = zip(window, d.update_window_dims, strict=True)
    for ids in index.axes:
        a.spaces.freeze(ids, where(eqn, "places to write to"))
    return _written(a, eqn, x, y, {i: j for i, j in pairs if x.shape[i] == y.shape[j]})


def _written(a: "Analysis", eqn: Any, x: Val, y: Val, whole: dict[int, int]) -> Val:
    """y written into x: axes of x that are those of y, all others stay."""
    out = fixed(eqn.outvars[0].aval)
    for i, j in whole.items():
        out.axes[i] = a.unify_all([x.axes[i], y.axes[j]], where(eqn))
        out.zero[i] = all_of(x.zero[i], y.zero[j])
    for operand, seen in ((x, set(whole)), (y, set(whole.values()))):
        for i, ids in enumerate(operand.axes):
            if i not in seen:
                a.spaces.freeze(ids, where(eqn, "written to at traced places"))
    return out
