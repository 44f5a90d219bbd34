"""The k largest entries of an array or of a whole tree, exactly, without a sort.

Floats order like their bit patterns, so the k-th largest is found by bisection:
each of at most 32 rounds counts how many entries reach a candidate threshold.
Entries equal to the threshold are taken in the order of their flat index, found
by a second bisection that runs only where there are such ties. A count is a sum
of integers, therefore

* ``k`` may be a traced number,
* on a sharded array a round is one scalar all-reduce: no weight is gathered,
* the answer is the same, bit for bit, however the array is laid out,
* one pass over the weights a round is all it costs: on a CPU an order of
  magnitude less than ``jnp.sort`` or ``jax.lax.top_k``.

NaN ranks below every number: it is selected only when nothing else is left.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["count_true", "global_top_k_masks", "random_scores", "top_k_mask", "top_k_masks"]

# float32 holds every integer up to here, so sums of zeros and ones are exact.
_EXACT_IN_FLOAT32 = 1 << 24


def top_k_mask(
    scores: ArrayLike, k: ArrayLike, *, where: ArrayLike | None = None, axis: int | None = None
) -> jax.Array:
    """Marks the ``k`` largest entries of one array.

    Args:
      scores: floats of any shape (float16, bfloat16, float32, float64). Infinities
        are ordinary values, the two zeros are equal, NaN ranks last.
      k: how many to mark, an integer from 0 to ``scores.size``, possibly traced.
        A traced ``k`` outside that range is clipped to it. With ``axis``, one
        number for each index of that axis.
      where: bool, the shape of ``scores``: only these entries may be marked. If
        there are fewer than ``k``, all of them are.
      axis: ``None`` marks the ``k`` largest of the whole array; a number marks the
        ``k[j]`` largest of every slice ``j`` along that axis.

    Returns:
      A bool array of the shape of ``scores`` with exactly ``k`` entries True. Of
      equal scores those of lower flat (row-major) index are marked.

    Raises:
      ValueError: if ``scores`` are not floats, if ``where`` has another shape or
        dtype, or if a concrete ``k`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> top_k_mask(jnp.array([0.5, 3.0, 0.5, 2.0]), 3).tolist()
      [True, True, False, True]
    """
    scores = jnp.asarray(scores)
    if axis is None:
        return top_k_masks([scores], [k], where=None if where is None else [where])[0]
    axis = range(scores.ndim)[axis]
    shape = [1] * scores.ndim
    shape[axis] = scores.shape[axis]
    ks = jnp.asarray(k, jnp.int32).reshape(shape)
    others = tuple(d for d in range(scores.ndim) if d != axis)
    return _select([[_checked(scores, where)]], [ks], others)[0][0]


def top_k_masks(scores: Any, ks: Any, *, where: Any | None = None) -> Any:
    """Marks the ``k`` largest entries of every leaf, each leaf with its own ``k``.

    The same as :func:`top_k_mask` leaf by leaf, but all leaves share one loop,
    which compiles faster and, on sharded leaves, communicates less often.

    Args:
      scores: a pytree of float arrays.
      ks: one integer a leaf, possibly traced: a pytree like ``scores`` or an
        array of shape (number of leaves,).
      where: a pytree like ``scores`` of bool arrays: only these may be marked.

    Returns:
      A pytree like ``scores`` of bool arrays.

    Raises:
      ValueError: as :func:`top_k_mask`.

    Examples:
      >>> import jax.numpy as jnp
      >>> masks = top_k_masks({"a": jnp.arange(4.0), "b": jnp.arange(3.0)}, {"a": 1, "b": 2})
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([False, False, False, True], [False, True, True])
    """
    leaves, treedef = jax.tree.flatten(scores)
    eligible = [None] * len(leaves) if where is None else treedef.flatten_up_to(where)
    ks = list(ks) if isinstance(ks, (jax.Array, np.ndarray)) else treedef.flatten_up_to(ks)
    groups = [[_checked(x, w)] for x, w in zip(leaves, eligible, strict=True)]
    ks = [_checked_k(k, group[0][0].size) for k, group in zip(ks, groups, strict=True)]
    return treedef.unflatten([masks[0] for masks in _select(groups, ks)])


def global_top_k_masks(scores: Any, k: ArrayLike, *, where: Any | None = None) -> Any:
    """Marks the ``k`` largest entries of a whole tree, all leaves ranked together.

    Args:
      scores: a pytree of float arrays. Leaves of different float types are
        compared in the type they promote to.
      k: how many to mark in all, an integer, possibly traced.
      where: a pytree like ``scores`` of bool arrays: only these may be marked.

    Returns:
      A pytree like ``scores`` of bool arrays with exactly ``k`` entries True in
      all (fewer only if ``where`` leaves fewer). Of equal scores those of the
      earlier leaf, then of the lower flat index, are marked.

    Raises:
      ValueError: as :func:`top_k_mask`, and if the tree has 2**31 entries or more.

    Examples:
      >>> import jax.numpy as jnp
      >>> masks = global_top_k_masks({"a": jnp.array([1.0, 5.0]), "b": jnp.array([4.0, 2.0])}, 2)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([False, True], [True, False])
    """
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        return scores
    eligible = [None] * len(leaves) if where is None else treedef.flatten_up_to(where)
    dtype = jnp.result_type(*leaves)
    group = [_checked(jnp.asarray(x, dtype), w) for x, w in zip(leaves, eligible, strict=True)]
    k = _checked_k(k, sum(x.size for x, _ in group))
    return treedef.unflatten(_select([group], [k])[0])


def random_scores(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Scores whose ``k`` largest are a uniformly random choice of ``k`` entries.

    Returns:
      float32 of the given shape: 30 random bits read as a non-negative float. Only
      their order means anything. (``jax.random.uniform`` has 23 random bits: among
      millions of weights the many ties would favour low indices.)

    Examples:
      >>> import jax
      >>> int(top_k_mask(random_scores(jax.random.key(0), (3, 4)), 5).sum())
      5
    """
    return jax.lax.bitcast_convert_type(jax.random.bits(key, tuple(shape), jnp.uint32) >> 2, jnp.float32)


def count_true(mask: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Counts True entries as int32, exactly; several times faster than an integer sum.

    Args:
      mask: bool, any shape.
      axis: axes to sum over, which are kept with length 1; ``None`` for all of
        them and a scalar result.
    """
    keepdims = axis is not None
    reduced = mask.shape if axis is None else [mask.shape[d] for d in axis]
    if np.prod(reduced, dtype=np.int64) <= _EXACT_IN_FLOAT32:
        return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32).astype(jnp.int32)
    if axis is None and mask.ndim > 1 and mask.size // mask.shape[-1] <= _EXACT_IN_FLOAT32:
        columns = jnp.sum(mask, axis=tuple(range(mask.ndim - 1)), dtype=jnp.float32)
        return jnp.sum(columns.astype(jnp.int32))
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.int32)


def _checked_k(k: ArrayLike, size: int) -> jax.Array:
    if size >= 1 << 31:
        raise ValueError(f"selection counts in int32 and can rank fewer than 2**31 entries at once, got {size}")
    if not isinstance(k, jax.core.Tracer) and not 0 <= int(k) <= size:
        raise ValueError(f"k must be between 0 and the number of entries, {size}, got {int(k)}")
    return jnp.asarray(k, jnp.int32)


def _checked(scores: ArrayLike, where: ArrayLike | None) -> tuple[jax.Array, jax.Array | None]:
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be floats, got an array of dtype {scores.dtype} and shape {scores.shape}")
    if where is None:
        return scores, None
    where = jnp.asarray(where)
    if where.shape != scores.shape or where.dtype != jnp.bool_:
        raise ValueError(
            f"where must be bool of the scores' shape {scores.shape}, got {where.dtype} of shape {where.shape}"
        )
    return scores, where


def _keys(scores: jax.Array, where: jax.Array | None) -> jax.Array:
    """Integers ordered like the scores; NaN is the lowest but one, ineligible the lowest."""
    integer = jnp.dtype(f"int{8 * scores.dtype.itemsize}")
    lowest = jnp.iinfo(integer).min
    bits = jax.lax.bitcast_convert_type(scores, integer)
    # Sign and magnitude to two's complement: -0.0 and 0.0 both become 0.
    keys = jnp.where(bits < 0, lowest - bits, bits)
    keys = jnp.where(jnp.isnan(scores), jnp.asarray(lowest + 1, integer), keys)
    return keys if where is None else jnp.where(where, keys, jnp.asarray(lowest, integer))


@functools.partial(jax.jit, static_argnames="axes")  # jitted, so that an eager call compiles once for each shape
def _select(groups: list[list[tuple]], ks: list[jax.Array], axes: tuple[int, ...] | None = None):
    """Masks of the ``ks[g]`` largest of each group of (scores, where); a group's arrays are ranked together.

    With ``axes`` the arrays are reduced over those axes only, and ``ks[g]`` has
    the reduced shape (axes kept): one selection for each remaining index.

    Keys and indices are made anew inside each pass: computing them costs less
    than holding them in memory would.
    """
    if not groups:
        return []

    def count(group, hit, at=0):
        hits, offset = [], 0
        for scores, where in group:
            # Bound to the candidate, so that XLA does not lift keys and indices out of the loop into memory.
            scores, where, zero, at = jax.lax.optimization_barrier((scores, where, 0, at))
            hits.append(count_true(hit(_keys(scores, where), _index(scores.shape, axes, offset + zero), at), axes))
            offset += _extent(scores.shape, axes)
        return sum(hits[1:], hits[0])

    # --- The threshold. Kept true all along: count(keys >= low) >= k >= count(keys >= high).
    low, high, at_low, at_high, chosen = [], [], [], [], []
    for group, k in zip(groups, ks, strict=True):
        info = jnp.iinfo(f"int{8 * group[0][0].dtype.itemsize}")
        eligible = count(group, lambda x, _, at, lowest=info.min: x > lowest)
        low.append(jnp.full(eligible.shape, info.min + 1, info.dtype))
        high.append(jnp.full(eligible.shape, info.max, info.dtype))  # above infinity
        at_low.append(eligible)
        at_high.append(jnp.zeros_like(eligible))
        chosen.append(jnp.clip(k, 0, eligible))
    ks = chosen

    def tied(at_low, at_high):
        return [(a != k) & (b != k) for k, a, b in zip(ks, at_low, at_high, strict=True)]

    def unresolved(bounds):
        low, high, at_low, at_high = bounds
        return _any(t & (lo + 1 < hi) for t, lo, hi in zip(tied(at_low, at_high), low, high, strict=True))

    def halve(bounds):
        halves = []
        for group, k, lo, hi, a, b in zip(groups, ks, *bounds, strict=True):
            middle = (lo & hi) + ((lo ^ hi) >> 1)  # the mean, without overflow
            n = count(group, lambda x, _, at: x >= at, middle)
            up = n >= k
            halves.append(
                (jnp.where(up, middle, lo), jnp.where(up, hi, middle), jnp.where(up, n, a), jnp.where(up, b, n))
            )
        return tuple(list(column) for column in zip(*halves, strict=True))

    low, high, at_low, at_high = jax.lax.while_loop(unresolved, halve, (low, high, at_low, at_high))

    # --- Ties: of the entries in [low, high), all equal there, those whose index is below a cutoff.
    need = [k - b for k, b in zip(ks, at_high, strict=True)]
    extents = [sum(_extent(scores.shape, axes) for scores, _ in group) for group in groups]
    split = tied(at_low, at_high)  # elsewhere it is all of them or none
    none = [jnp.where(s | (n == 0), 0, e) for s, n, e in zip(split, need, extents, strict=True)]
    every = [jnp.where(s, e, c) for s, c, e in zip(split, none, extents, strict=True)]

    def unsettled(cuts):
        return _any(a < b for a, b in zip(*cuts, strict=True))

    def halve_cut(cuts):
        halves = []
        for group, lo, hi, n, a, b in zip(groups, low, high, need, *cuts, strict=True):
            middle = a + (b - a) // 2
            reached = count(group, lambda x, i, at, lo=lo, hi=hi: (x >= lo) & (x < hi) & (i < at), middle)
            halves.append((jnp.where((reached < n) & (a < b), middle + 1, a), jnp.where(reached < n, b, middle)))
        return tuple(list(column) for column in zip(*halves, strict=True))

    cuts, _ = jax.lax.while_loop(unsettled, halve_cut, (none, every))

    masks: list[list[jax.Array]] = []
    for group, lo, hi, cut in zip(groups, low, high, cuts, strict=True):
        masks.append([])
        offset = 0
        for scores, where in group:
            x = _keys(scores, where)
            masks[-1].append((x >= hi) | ((x >= lo) & (_index(scores.shape, axes, offset) < cut)))
            offset += _extent(scores.shape, axes)
    return masks


def _any(flags) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(flag) for flag in flags]))


def _extent(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> int:
    return int(np.prod(shape if axes is None else [shape[d] for d in axes], dtype=np.int64))


def _index(shape: tuple[int, ...], axes: tuple[int, ...] | None, offset: int) -> jax.Array:
    """Row-major index within the group, built from iotas: nothing moves between devices."""
    index, stride = jnp.full(shape, offset, jnp.int32), 1
    for d in reversed(range(len(shape)) if axes is None else axes):
        index = index + stride * jax.lax.broadcasted_iota(jnp.int32, shape, d)
        stride *= shape[d]
    return index
