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
import operator
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
    scores: ArrayLike,
    k: ArrayLike,
    *,
    where: ArrayLike | None = None,
    absolute: bool = False,
    axis: int | Sequence[int] | None = None,
) -> jax.Array:
    """Marks the ``k`` largest entries of one array.

    Args:
      scores: floats of any shape (float16, bfloat16, float32, float64). Infinities
        are ordinary values, the two zeros are equal, NaN ranks last.
      k: how many to mark, an integer from 0 to ``scores.size``, possibly traced.
        A traced ``k`` outside that range is clipped to it. With ``axis``, one
        number for each index of that axis or these axes, or one for all.
      where: bool, the shape of ``scores``: only these entries may be marked. If
        there are fewer than ``k``, all of them are.
      absolute: rank by absolute value, without a copy of the array.
      axis: ``None`` marks the ``k`` largest of the whole array; a number marks the
        ``k[j]`` largest of every slice ``j`` along that axis; several, in increasing
        order, those of every slice along all of them.

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
        return top_k_masks([scores], [k], where=None if where is None else [where], absolute=absolute)[0]
    kept = [range(scores.ndim)[d] for d in ([axis] if isinstance(axis, int) else axis)]
    others = tuple(d for d in range(scores.ndim) if d not in kept)
    ks = jnp.expand_dims(jnp.broadcast_to(jnp.asarray(k, jnp.int32), [scores.shape[d] for d in kept]), others)
    return _select([[_checked(scores, where)]], [ks], absolute, others)[0][0]


def top_k_masks(scores: Any, ks: Any, *, where: Any | None = None, absolute: bool = False) -> Any:
    """Marks the ``k`` largest entries of every leaf, each leaf with its own ``k``.

    The same as :func:`top_k_mask` leaf by leaf, but all leaves share one loop,
    which compiles faster and, on sharded leaves, communicates less often.

    Args:
      scores: a pytree of float arrays.
      ks: one integer a leaf, possibly traced: a pytree like ``scores`` or an
        array of shape (number of leaves,).
      where: a pytree like ``scores`` of bool arrays: only these may be marked.
      absolute: rank by absolute value.

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
    return treedef.unflatten([masks[0] for masks in _select(groups, ks, absolute)])


def global_top_k_masks(
    scores: Any,
    k: ArrayLike,
    *,
    where: Any | None = None,
    absolute: bool = False,
    sizes: Any | None = None,
    at_least: ArrayLike = 0,
    stacks: Sequence[Sequence[int]] = (),
) -> Any:
    """Marks the ``k`` largest entries of a whole tree, all leaves ranked together.

    Args:
      scores: a pytree of float arrays. Leaves of different float types are
        compared in the type they promote to.
      k: how many to mark in all, an integer, possibly traced.
      where: a pytree like ``scores`` of bool arrays: only these may be marked.
      absolute: rank by absolute value.
      sizes: a pytree like ``scores`` of Python ints >= 1: how much an entry of each
        leaf counts, for instance the number of weights of a block. ``k`` counts in
        the same measure, up to the sum of size times entries.
      at_least: mark this many, the largest, of every leaf in any case (all, of a leaf that has fewer), and give only
        the rest of ``k`` to the largest of the whole tree. A ``k`` too small for that is exceeded. Possibly traced.
      stacks: numbers of leaves (in the order of ``jax.tree.leaves``) of one shape and size, to be stacked. That copies
        them, compiles once for all of a stack, and changes no result.

    Returns:
      A pytree like ``scores`` of bool arrays with exactly ``k`` entries True in
      all (fewer only if ``where`` leaves fewer). Of equal scores those of the
      earlier leaf, then of the lower flat index, are marked. With ``sizes``, the
      entries from the largest down to the first that would exceed ``k``, which may
      fall short of ``k`` by less than that one's size.

    Raises:
      ValueError: as :func:`top_k_mask`, for sizes below 1, and if the tree has 2**31
        entries or more (or as much by their sizes).

    Examples:
      >>> import jax.numpy as jnp
      >>> scores = {"a": jnp.array([1.0, 5.0]), "b": jnp.array([4.0, 2.0])}
      >>> masks = global_top_k_masks(scores, 2)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([False, True], [True, False])
      >>> masks = global_top_k_masks(scores, 9, sizes={"a": 1, "b": 6})  # 1 + 6, and another 6 is too much
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([False, True], [True, False])
    """
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        return scores
    eligible = [None] * len(leaves) if where is None else treedef.flatten_up_to(where)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*leaves)
    group = [_checked(jnp.asarray(x, dtype), w) for x, w in zip(leaves, eligible, strict=True)]
    counted = (1,) * len(leaves) if sizes is None else tuple(map(operator.index, treedef.flatten_up_to(sizes)))
    if min(counted) < 1:
        raise ValueError(f"sizes must be at least 1, got {list(counted)}")
    k = _checked_k(k, sum(size * x.size for size, (x, _) in zip(counted, group, strict=True)))
    if isinstance(at_least, jax.core.Tracer) or at_least:
        fewest = jnp.asarray(at_least, jnp.int32)
        first = _select([[each] for each in group], [jnp.minimum(fewest, x.size) for x, _ in group], absolute)
        first = [marked[0] for marked in first]  # (not stacked: it is seldom asked for)
        k = jnp.maximum(k - sum(size * count_true(marked) for size, marked in zip(counted, first, strict=True)), 0)
        group = [(x, ~marked if w is None else w & ~marked) for (x, w), marked in zip(group, first, strict=True)]
        rest = _select_stacked(group, k, absolute, counted, stacks)
        return treedef.unflatten([a | b for a, b in zip(first, rest, strict=True)])
    return treedef.unflatten(_select_stacked(group, k, absolute, counted, stacks))


def random_scores(key: jax.Array, shape: Sequence[int], sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """Random scores, of which the ``k`` largest are a uniformly random choice of ``k`` entries.

    Args:
      key: a PRNG key.
      shape: of the scores.
      sharding: draw them on the devices of this sharding, in its parts: the same numbers in every layout.

    Returns:
      float32 of the given shape: 30 random bits read as a non-negative float. Only
      their order means anything. (``jax.random.uniform`` has 23 random bits: among
      millions of weights the many ties would favour low indices.)

    Examples:
      >>> import jax
      >>> int(top_k_mask(random_scores(jax.random.key(0), (3, 4)), 5).sum())
      5
    """
    traced = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)

    def draw(key):
        bits = jax.random.bits(key, tuple(shape), jnp.uint32, out_sharding=sharding if traced else None)
        return jax.lax.bitcast_convert_type(bits >> 2, jnp.float32)

    return draw(key) if sharding is None or traced else jax.jit(draw, out_shardings=sharding)(key)


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


def _keys(scores: jax.Array, where: jax.Array | None, absolute: bool) -> jax.Array:
    """Integers ordered like the scores; NaN is the lowest but one, ineligible the lowest."""
    integer = _integer(scores)
    lowest = jnp.iinfo(integer).min
    bits = jax.lax.bitcast_convert_type(scores, integer)
    # Sign and magnitude to two's complement: -0.0 and 0.0 both become 0.
    keys = bits & ~lowest if absolute else jnp.where(bits < 0, lowest - bits, bits)
    keys = jnp.where(jnp.isnan(scores), jnp.asarray(lowest + 1, integer), keys)
    if where is None:
        return keys
    # Compared as a byte: on a CPU, XLA's select on a stored bool is not vectorised.
    return jnp.where(where.astype(jnp.uint8) != 0, keys, jnp.asarray(lowest, integer))


def _select_stacked(
    group: list[tuple], k: jax.Array, absolute: bool, sizes: tuple[int, ...], stacks: Sequence[Sequence[int]]
) -> list[jax.Array]:
    """:func:`_select` of one group, some of whose arrays are stacked meanwhile."""
    starts = np.cumsum([0, *(x.size for x, _ in group)])
    stacked = {i for stack in stacks for i in stack}
    members = [*stacks, *([i] for i in range(len(group)) if i not in stacked)]
    arrays: list[Any] = []
    begins: list[Any] = []
    for stack in members:
        if len(stack) == 1:
            arrays.append(group[stack[0]])
            begins.append(int(starts[stack[0]]))
        else:
            arrays.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(group[i] for i in stack)))
            begins.append(tuple(int(starts[i]) for i in stack))
    counted = tuple(sizes[stack[0]] for stack in members)
    found = _select([arrays], [k], absolute, sizes=counted, starts=tuple(begins))[0]
    masks: list[Any] = [None] * len(group)
    for stack, mask in zip(members, found, strict=True):
        for i, part in zip(stack, [mask] if len(stack) == 1 else list(mask), strict=True):
            masks[i] = part
    return masks


# Jitted: an eager call compiles once for a shape.
@functools.partial(jax.jit, static_argnames=("absolute", "axes", "sizes", "starts"))
def _select(
    groups: list[list[tuple]],
    ks: list[jax.Array],
    absolute: bool,
    axes: tuple[int, ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    starts: tuple[int | tuple[int, ...], ...] | None = None,
):
    """Masks of the ``ks[g]`` largest of each group of (scores, where); a group's arrays are ranked together.

    ``sizes``, for each array of a group, is how much an entry counts. Then there may be no threshold, or no cut among
    the ties, that gives ``ks[g]`` exactly: the searches end at the last that does not exceed it.

    With ``axes`` the arrays are reduced over those axes only, and ``ks[g]`` has
    the reduced shape (axes kept): one selection for each remaining index.

    ``starts``, for each array of a single group, is the index of its first entry; of a stack, of each array's in it.
    """
    if not groups:
        return []
    extents = [[_extent(scores.shape, axes) for scores, _ in group] for group in groups]
    groups = [
        [(scores, where, sum(extent[:i]) if starts is None else np.asarray(starts[i], np.int32))
         for i, (scores, where) in enumerate(group)]
        for group, extent in zip(groups, extents, strict=True)
    ]  # fmt: skip

    def count(group, hit, at):
        """How many entries satisfy ``hit(key, index, at)``.

        Keys and indices are made anew in each pass, which costs less than to hold them in memory. The barrier binds
        them to the candidate, or XLA would lift them out of the loop.
        """
        hits = []
        for i, (scores, where, start) in enumerate(group):
            scores, where, start, at = jax.lax.optimization_barrier((scores, where, start, at))
            hits.append(count_true(hit(_keys(scores, where, absolute), _index(scores.shape, axes, start), at), axes))
            if sizes is not None and sizes[i] > 1:
                hits[-1] = hits[-1] * sizes[i]
        return sum(hits[1:], hits[0])

    # The threshold: the highest that at least k entries reach; the search ends early where exactly k do.
    low, high, wanted = [], [], []
    for group, k in zip(groups, ks, strict=True):
        integer = _integer(group[0][0])
        lowest, highest = (jnp.asarray(end, integer) for end in (jnp.iinfo(integer).min, jnp.iinfo(integer).max))
        eligible = count(group, lambda key, _, at: key > at, lowest)
        k = jnp.clip(k, 0, eligible)
        # Not even infinity reaches the highest; all that is eligible, NaN too, reaches the lowest but one.
        low.append(jnp.where(k == 0, highest, lowest + 1))
        high.append(jnp.where(k == eligible, low[-1], highest))
        wanted.append(k)
    low, high, above = _search(
        lambda i, at: count(groups[i], lambda key, _, at: key >= at, at), jnp.greater, wanted, low, high
    )

    # Where more than k reach it, those equal to it compete for what is left: the lowest indices win.
    tied = [lo < hi for lo, hi in zip(low, high, strict=True)]
    room = [k - n for k, n in zip(wanted, above, strict=True)]
    every = [jnp.full_like(k, sum(extent)) for k, extent in zip(wanted, extents, strict=True)]
    cut, _, _ = _search(
        lambda i, at: count(groups[i], lambda key, index, at: (key == low[i]) & (index < at), at),
        jnp.less,
        room,
        [jnp.where(t, 0, n) for t, n in zip(tied, every, strict=True)],
        [jnp.where(t, n + 1, n) for t, n in zip(tied, every, strict=True)],
    )

    masks: list[list[jax.Array]] = []
    for group, threshold, end in zip(groups, low, cut, strict=True):
        masks.append([])
        for scores, where, start in group:
            key = _keys(scores, where, absolute)
            masks[-1].append((key > threshold) | ((key == threshold) & (_index(scores.shape, axes, start) < end)))
    return masks


def _search(count, further, targets, low, high):
    """Bisects integers between each ``low`` and ``high`` for where ``count(i, at)`` is the target.

    Args:
      count: the count of group i at a candidate, monotone in it.
      further: ``further(n, target)``: whether to look above a candidate with count n.
      targets, low, high: one array a group, all of one shape; nothing is sought where low >= high - 1.

    Returns:
      low, high, and the count at high. Where some candidate has the target's count, low == high, else low + 1 == high.
    """

    def sought(bounds):
        return jnp.any(jnp.stack([jnp.any(lo < hi - 1) for lo, hi in zip(bounds[0], bounds[1], strict=True)]))

    def narrow(bounds):
        narrower = []
        for i, (target, lo, hi, at_high) in enumerate(zip(targets, *bounds, strict=True)):
            going = lo < hi - 1  # (lo + 1 could overflow)
            middle = (lo & hi) + ((lo ^ hi) >> 1)  # the mean, without overflow
            # Groups that are done are not counted while others go on.
            n = jax.lax.cond(jnp.any(going), lambda i=i, at=middle: count(i, at), lambda n=at_high: n)
            found, up = going & (n == target), going & further(n, target)
            down = going & ~up
            narrower.append(
                (jnp.where(found | up, middle, lo), jnp.where(down, middle, hi), jnp.where(down, n, at_high))
            )
        return tuple(list(column) for column in zip(*narrower, strict=True))

    return jax.lax.while_loop(sought, narrow, (low, high, [jnp.zeros_like(t) for t in targets]))


def _integer(scores: jax.Array) -> np.dtype:
    """The integers of the same width as the scores."""
    return jnp.dtype(f"int{8 * scores.dtype.itemsize}")


def _extent(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> int:
    return int(np.prod(shape if axes is None else [shape[d] for d in axes], dtype=np.int64))


def _index(shape: tuple[int, ...], axes: tuple[int, ...] | None, start: int | jax.Array) -> jax.Array:
    """Row-major index within the group, built from iotas: nothing moves between devices."""
    axes = tuple(range(len(shape))) if axes is None else axes
    if jnp.ndim(start):  # one for each array of a stack
        start, axes = jnp.expand_dims(start, range(1, len(shape))), axes[1:]
    index, stride = jnp.full(shape, start, jnp.int32), 1
    for d in reversed(axes):
        index = index + stride * jax.lax.broadcasted_iota(jnp.int32, shape, d)
        stride *= shape[d]
    return index
