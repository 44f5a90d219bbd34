"""The search behind :mod:`jaxsparse.selection`: bisection of thresholds, with counts in place of a sort.

Floats order like their bit patterns, so the k-th largest is found by bisection: each of at most 32 rounds counts how
many entries reach a candidate threshold. Entries equal to the threshold are taken in the order of their flat index,
found by a second bisection that runs only where there are such ties.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["count_true", "select"]

# float32 holds every integer up to here, so sums of zeros and ones are exact.
_EXACT_IN_FLOAT32 = 1 << 24

_FEW, _VERY_FEW = 256, 8  # entries, and entries along an axis: up to here every two are compared


# Jitted: an eager call compiles once for a shape.
@functools.partial(jax.jit, static_argnames=("absolute", "axes", "sizes", "starts", "rows", "enough"))
def select(
    groups: list[list[tuple]],
    ks: list[jax.Array],
    absolute: bool,
    axes: tuple[tuple[int, ...], ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    starts: tuple[int | tuple[int, ...], ...] | None = None,
    rows: bool = False,
    enough: bool = False,
):
    """Masks of the ``ks[g]`` largest of each group of (scores, where); a group's arrays are ranked together.

    ``sizes``, for each array of a group, is how much an entry counts. Then there may be no threshold, or no cut among
    the ties, that gives ``ks[g]`` exactly: the searches end at the last that does not exceed it.

    With ``axes`` the arrays of group g are reduced over ``axes[g]`` only, and ``ks[g]`` has
    the reduced shape (axes kept): one selection for each remaining index.

    With ``rows`` all arrays are stacks, every member is ranked by itself, and ``ks[g]`` is a vector: a number for each
    member of each stack of the group.

    ``starts``, for each array of a single group, is the index of its first entry; of a stack, of each array's in it.

    With ``enough`` no ``ks[g]`` exceeds the number of eligible entries.
    """
    if not groups:
        return []
    each: list = [None] * len(groups) if axes is None else list(axes)
    if sizes is None and not rows and len(groups) == len(groups[0]) == 1 and _is_few(groups[0][0][0], each[0]):
        scores, where = groups[0][0]
        return [[_by_rank(scores, where, ks[0], absolute, each[0])]]
    reduced = [[tuple(range(1, x.ndim)) if rows else each[g] for x, _ in group] for g, group in enumerate(groups)]
    extents = [[_extent(x.shape, over) for (x, _), over in zip(group, overs, strict=True)]
               for group, overs in zip(groups, reduced, strict=True)]  # fmt: skip

    def begin(g, i):
        return 0 if rows else sum(extents[g][:i]) if starts is None else np.asarray(starts[i], np.int32)

    def part(g, i, vector):
        """The entries of a vector (with ``rows``) that belong to array i of the group."""
        if not rows or vector is None:
            return vector
        first, (x, _) = sum(len(x) for x, _ in groups[g][:i]), groups[g][i]
        return vector[first : first + len(x)].reshape(-1, *(1,) * (x.ndim - 1))

    def count(g, hit, at, going=None):
        """How many entries satisfy ``hit(i, key, index, at)``; any number for members that are not ``going``.

        Keys and indices are made anew in each pass, which costs less than to hold them in memory. The barrier binds
        them to the candidate, or XLA would lift them out of the loop.
        """

        def of(i):
            over = reduced[g][i]
            (x, where), first, now = groups[g][i], begin(g, i), part(g, i, at)
            x, where, first, now = jax.lax.optimization_barrier((x, where, first, now))
            n = count_true(hit(i, _keys(x, where, absolute), _index(x.shape, over, first), now), over)
            n = n * sizes[i] if sizes is not None and sizes[i] > 1 else n
            return n.reshape(-1) if rows else n

        def if_going(some, compute, like):
            if going is None:
                return compute()
            return jax.lax.cond(jnp.any(some), compute, lambda: jnp.zeros_like(like, jnp.int32))

        numbers = range(len(groups[g]))
        if rows:
            counted = [if_going(part(g, i, going), lambda i=i: of(i), part(g, i, at).reshape(-1)) for i in numbers]
            return counted[0] if len(counted) == 1 else jnp.concatenate(counted)
        return if_going(going, lambda: functools.reduce(operator.add, map(of, numbers)), at)

    # The threshold: the highest that at least k entries reach; the search ends early where exactly k do.
    low, high, wanted = [], [], []
    for g, k in enumerate(ks):
        integer = _integer(groups[g][0][0])
        lowest, highest = (jnp.asarray(end, integer) for end in (jnp.iinfo(integer).min, jnp.iinfo(integer).max))
        # Not even infinity reaches the highest; all that is eligible, NaN too, reaches the lowest but one.
        if enough:
            high.append(jnp.full_like(k, highest, integer))
        else:
            at_first = jnp.full_like(k, lowest, integer) if rows else lowest
            eligible = count(g, lambda _, key, __, at: key > at, at_first)
            k = jnp.clip(k, 0, eligible)
            high.append(jnp.where(k == eligible, lowest + 1, highest))
        low.append(jnp.where(k == 0, high[-1], lowest + 1))
        wanted.append(k)
    low, high, above = _search(
        lambda g, at, going: count(g, lambda _, key, __, at: key >= at, at, going), jnp.greater, wanted, low, high
    )

    # Where more than k reach it, those equal to it compete for what is left: the lowest indices win.
    tied = [lo < hi for lo, hi in zip(low, high, strict=True)]
    room = [k - n for k, n in zip(wanted, above, strict=True)]
    every = [np.repeat(extent, [len(x) for x, _ in group]).astype(np.int32) if rows else jnp.full_like(k, sum(extent))
             for k, group, extent in zip(wanted, groups, extents, strict=True)]  # fmt: skip
    cut, _, _ = _search(
        lambda g, at, going: count(g, lambda i, key, index, at: (key == part(g, i, low[g])) & (index < at), at, going),
        jnp.less,
        room,
        [jnp.where(t, 0, n) for t, n in zip(tied, every, strict=True)],
        [jnp.where(t, n + 1, n) for t, n in zip(tied, every, strict=True)],
    )

    masks: list[list[jax.Array]] = []
    for g, group in enumerate(groups):
        masks.append([])
        for i, (x, where) in enumerate(group):
            key, threshold, end = _keys(x, where, absolute), part(g, i, low[g]), part(g, i, cut[g])
            index = _index(x.shape, reduced[g][i], begin(g, i))
            masks[-1].append((key > threshold) | ((key == threshold) & (index < end)))
    return masks


def _is_few(scores: jax.Array, axes: tuple[int, ...] | None) -> bool:
    """Whether to compare every two entries, which compiles faster than the searches and, of a very few, runs faster."""
    if any(jax.typeof(scores).sharding.spec):
        return False
    return scores.size <= _FEW if axes is None else len(axes) == 1 and scores.shape[axes[0]] <= _VERY_FEW


def _by_rank(
    scores: jax.Array, where: jax.Array | None, k: jax.Array, absolute: bool, axes: tuple[int, ...] | None
) -> jax.Array:
    """:func:`select` of a few entries: those with fewer than ``k`` before them."""
    key = _keys(scores, where, absolute)
    key, axis = (key.reshape(-1), 0) if axes is None else (key, axes[0])
    one, other = jnp.expand_dims(key, axis + 1), jnp.expand_dims(key, axis)
    place = jnp.arange(key.shape[axis])
    earlier = jnp.expand_dims(place[None] < place[:, None], [*range(axis), *range(axis + 2, key.ndim + 1)])
    before = jnp.sum((other > one) | ((other == one) & earlier), axis=axis + 1, dtype=jnp.int32)
    return ((before < k) & (key > jnp.iinfo(key.dtype).min)).reshape(scores.shape)


def _search(count, further, targets, low, high):
    """Bisects integers between each ``low`` and ``high`` for where the count is the target.

    Args:
      count: (g, candidate, going) -> the counts of group g at a candidate, monotone in it; needed where it is going.
      further: ``further(n, target)``: whether to look above a candidate with count n.
      targets, low, high: one array for each group; nothing is sought where low >= high - 1.

    Returns:
      low, high, and the count at high. Where some candidate has the target's count, low == high, else low + 1 == high.
    """

    def sought(bounds):
        return jnp.any(jnp.stack([jnp.any(lo < hi - 1) for lo, hi in zip(bounds[0], bounds[1], strict=True)]))

    def narrow(bounds):
        narrower = []
        for g, (target, lo, hi, at_high) in enumerate(zip(targets, *bounds, strict=True)):
            going = lo < hi - 1  # (lo + 1 could overflow)
            middle = (lo & hi) + ((lo ^ hi) >> 1)  # the mean, without overflow
            n = count(g, middle, going)  # of those alone that are going, while others are done
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
