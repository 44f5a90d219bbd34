"""The search behind :mod:`jaxsparse.selection`: bisection of thresholds, with counts in place of a sort.

Floats order like their bit patterns, so the k-th largest is found by bisection: each round counts how many entries
reach each of a few candidate thresholds. Entries equal to the threshold are taken in the order of their flat index,
found by further rounds of the same loop, which run only where there are such ties.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.placement import lies_anywhere
from jaxsparse.positions import row_major
from jaxsparse.reductions import any_true, count_true, in_one_pass, sums

__all__ = ["select"]

_SEVERAL = 3  # candidates are counted in one pass over memory, which takes hardly longer than one

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
) -> list[list[jax.Array]]:
    """Masks of the ``ks[g]`` largest of each group of (scores, where); a group's arrays are ranked together.

    ``sizes``, for each array of a group, is how much an entry counts. Then there may be no threshold, or no cut among
    the ties, that gives ``ks[g]`` exactly: the searches end at the last that does not exceed it.

    With ``axes`` the arrays of group g are reduced over ``axes[g]`` only, and ``ks[g]`` has
    the reduced shape (axes kept): one selection for each remaining index.

    With ``rows`` all arrays are stacks, every member is ranked by itself, and ``ks[g]`` is a vector: a number for each
    member of each stack of the group. With ``axes`` as well there is one group, array i is reduced over ``axes[i]``,
    and there is a number for each index of its other axes.

    ``starts``, for each array of a single group, is the index of its first entry; of a stack, of each array's in it.

    With ``enough`` no ``ks[g]`` exceeds the number of eligible entries.
    """
    if not groups:
        return []
    each: list = [None] * len(groups) if axes is None else list(axes)
    if sizes is None and not rows and len(groups) == len(groups[0]) == 1 and _is_few(groups[0][0][0], each[0]):
        scores, where = groups[0][0]
        return [[_by_rank(scores, where, ks[0], absolute, each[0])]]
    reduced = [[each[g] if not rows else tuple(range(1, x.ndim)) if axes is None else axes[i]
                for i, (x, _) in enumerate(group)] for g, group in enumerate(groups)]  # fmt: skip
    shapes = [[tuple(1 if d in (over or ()) else n for d, n in enumerate(x.shape))
               for (x, _), over in zip(group, overs, strict=True)]
              for group, overs in zip(groups, reduced, strict=True)]  # fmt: skip
    lengths = [[int(np.prod(shape)) for shape in of_group] for of_group in shapes]
    extents = [[_extent(x.shape, over) for (x, _), over in zip(group, overs, strict=True)]
               for group, overs in zip(groups, reduced, strict=True)]  # fmt: skip

    def begin(g, i):
        return 0 if rows else sum(extents[g][:i]) if starts is None else np.asarray(starts[i], np.int32)

    def part(g, i, vector):
        """The entries of a vector (with ``rows``) that belong to array i of the group."""
        if not rows:
            return vector
        first = sum(lengths[g][:i])
        return vector[first : first + lengths[g][i]].reshape(shapes[g][i])

    def keys(g, i, x, where):
        return _keys(x, where, absolute).astype(_integer(groups[g]))

    def count(g, at, search):
        """How many entries reach each candidate of ``at``, of its shape; zeros or any for searches that are done.

        Keys are made anew in each pass, which costs less than to hold them in memory. The barrier binds them to the
        candidates, or XLA would lift them out of the loop.
        """

        def of(i):
            over, first = reduced[g][i], begin(g, i)
            now, threshold = [part(g, i, candidate) for candidate in at], part(g, i, search.threshold)
            (x, where), first, now = jax.lax.optimization_barrier((groups[g][i], first, now))
            key, ends = keys(g, i, x, where), jnp.iinfo(threshold.dtype)
            order = jnp.zeros_like(key) + ~row_major(x.shape, over, first).astype(key.dtype)  # sharded as the keys are
            ties = jnp.where(key == threshold, order, jnp.where(key > threshold, ends.max, ends.min))
            value = jnp.where(threshold == ends.max, key, ties)
            counts = sums([value >= candidate for candidate in now], over)
            counts = [n * sizes[i] for n in counts] if sizes is not None and sizes[i] > 1 else counts
            return [n.reshape(-1) for n in counts] if rows else counts

        def if_any(going, compute):
            """The counts; where nothing is sought any more, which waits for the rest, zeros."""
            return jax.lax.cond(any_true(going), compute, lambda: [jnp.zeros_like(going, jnp.int32)] * len(at))

        arrays = range(len(groups[g]))
        if rows:
            of_arrays = [if_any(part(g, i, search.going).reshape(-1), functools.partial(of, i)) for i in arrays]
            flat = [n for of_candidate in zip(*of_arrays, strict=True) for n in of_candidate]
            return jnp.concatenate(flat).reshape(at.shape)
        of_all = lambda: list(map(sum, zip(*map(of, arrays), strict=True)))  # noqa: E731
        return jnp.stack(of_all() if len(groups) == 1 else if_any(search.going, of_all))

    def narrowed(g, search):
        """The search after a round. Where no value gives the target, those equal to it compete for what is left."""
        arrays = [(x.ndim, over) for (x, _), over in zip(groups[g], reduced[g], strict=True)]
        several = all(in_one_pass(*array) for array in arrays)
        at = _between(search.low, search.high, _SEVERAL if several else 1)
        low, high = search.narrowed(at, count(g, at, search))
        turns = (search.threshold == jnp.iinfo(low.dtype).max) & (low < high) & ~(low < high - 1)
        every = np.repeat(extents[g], lengths[g]) if rows else np.asarray(sum(extents[g]))
        return _Search(
            low=jnp.where(turns, -every.astype(low.dtype), low),
            high=jnp.where(turns, 0, high),
            threshold=jnp.where(turns, low, search.threshold),
            target=search.target,
        )

    searches = []
    for g, k in enumerate(ks):
        integer, ends = _integer(groups[g]), jnp.iinfo(_bits(groups[g][0][0]))
        eligible = None if enough else _eligible(groups[g], reduced[g], extents[g], sizes, lengths[g] if rows else None)
        k = k if enough else jnp.clip(k, 0, eligible)
        k = k + _nothing(groups[g], reduced[g], lengths[g] if rows else None)
        # Not even infinity reaches the highest; all that is eligible, NaN too, reaches the lowest but one.
        high = jnp.full_like(k, ends.max, integer)
        high = high if enough else jnp.where(k == eligible, ends.min + 1, high)
        low = jnp.where(k == 0, high, ends.min + 1)
        searches.append(_Search(low, high, jnp.full_like(low, jnp.iinfo(integer).max), k))
    searches = jax.lax.while_loop(
        lambda searches: functools.reduce(operator.or_, [any_true(search.going) for search in searches]),
        lambda searches: [narrowed(g, search) for g, search in enumerate(searches)],
        searches,
    )

    masks: list[list[jax.Array]] = []
    for g, (group, search) in enumerate(zip(groups, searches, strict=True)):
        masks.append([])
        ends = jnp.iinfo(search.high.dtype)
        ties = search.threshold < ends.max
        threshold, cut = jnp.where(ties, search.threshold, search.high), jnp.where(ties, search.high, ends.min)
        for i, (x, where) in enumerate(group):
            key, order = keys(g, i, x, where), ~row_major(x.shape, reduced[g][i], begin(g, i)).astype(cut.dtype)
            equal = (key == part(g, i, threshold)) & (order >= part(g, i, cut))
            masks[-1].append((key > part(g, i, threshold)) | equal)
    return masks


class _Search(NamedTuple):
    """Where the k-th largest of each group is sought: first its value, and then, among equal ones, its index.

    Attributes:
      low, high: between these integers. More than ``target`` entries reach low, and fewer reach high, which is low + 1
        when nothing is left between them; low >= high where exactly as many reach both.
      threshold: the highest integer while the value is sought. Then it is the value, and the integers are ~index, of
        which the lowest index wins.
      target: int32.
    """

    low: jax.Array
    high: jax.Array
    threshold: jax.Array
    target: jax.Array

    @property
    def going(self) -> jax.Array:
        """Whether there is something between low and high. (low + 1 could overflow.)"""
        return self.low < self.high - 1

    def narrowed(self, at: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Low and high after ``n[j]`` entries were found to reach ``at[j]``."""
        low = jnp.max(jnp.where(n >= self.target[None], at, self.low[None]), axis=0)
        high = jnp.min(jnp.where(n <= self.target[None], at, self.high[None]), axis=0)
        return jnp.where(self.going, low, self.low), jnp.where(self.going, high, self.high)


def _is_few(scores: jax.Array, axes: tuple[int, ...] | None) -> bool:
    """Whether to compare every two entries, which compiles faster than the searches and, of a very few, runs faster."""
    if not lies_anywhere(scores):
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
    before = jnp.squeeze(count_true((other > one) | ((other == one) & earlier), (axis + 1,)), axis + 1)
    return ((before < k) & (key > jnp.iinfo(key.dtype).min)).reshape(scores.shape)


def _between(low: jax.Array, high: jax.Array, n: int) -> jax.Array:
    """``n`` ascending integers that part what lies from ``low`` to ``high`` equally, along a new first axis."""
    unsigned = jnp.dtype(f"uint{8 * low.dtype.itemsize}")
    width = jax.lax.bitcast_convert_type(high, unsigned) - jax.lax.bitcast_convert_type(low, unsigned)
    whole, rest = (width // (n + 1))[None], (width % (n + 1))[None]  # (a product with the width itself could overflow)
    j = np.arange(1, n + 1, dtype=unsigned).reshape(n, *[1] * low.ndim)
    return low[None] + jax.lax.bitcast_convert_type(whole * j + rest * j // (n + 1), low.dtype)


def _eligible(group, reduced, extents, sizes, lengths):
    """How much of a group may be marked: of all arrays together, or with ``lengths`` in each search of each array."""
    numbers = []
    for i, ((_, where), over, extent) in enumerate(zip(group, reduced, extents, strict=True)):
        n = jnp.int32(extent) if where is None else count_true(where, over)
        n = n * sizes[i] if sizes is not None else n
        numbers.append(n)
    return _of_searches(numbers, lengths)


def _nothing(group, reduced, lengths):
    """Zeros of the type that the counts of a group have, where types say on which devices arrays are."""
    zeros = []
    for (x, where), over in zip(group, reduced, strict=True):
        told = not all(lies_anywhere(array) for array in (x, where) if array is not None)
        none = jnp.isnan(x) & False & (True if where is None else where)
        zeros.append(count_true(none, over) if told else jnp.int32(0))
    return _of_searches(zeros, lengths)


def _of_searches(numbers, lengths):
    """Numbers of arrays, together; or one after the other, broadcast to the searches in each."""
    if lengths is None:
        return functools.reduce(operator.add, numbers)
    return jnp.concatenate([jnp.broadcast_to(n.reshape(-1), k) for n, k in zip(numbers, lengths, strict=True)])


def _bits(scores: jax.Array) -> np.dtype:
    """The integers of the same width as the scores."""
    return jnp.dtype(f"int{8 * scores.dtype.itemsize}")


def _integer(group: list[tuple]) -> np.dtype:
    """The integers of a search: those of the scores, or wider ones, which hold an index too."""
    return max(jnp.dtype(jnp.int32), _bits(group[0][0]), key=lambda dtype: dtype.itemsize)


def _extent(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> int:
    return int(np.prod(shape if axes is None else [shape[d] for d in axes], dtype=np.int64))


def _keys(scores: jax.Array, where: jax.Array | None, absolute: bool) -> jax.Array:
    """Integers ordered like the scores; NaN is the lowest but one, ineligible the lowest."""
    integer = _bits(scores)
    lowest = jnp.iinfo(integer).min
    bits = jax.lax.bitcast_convert_type(scores, integer)
    # Sign and magnitude to two's complement: -0.0 and 0.0 both become 0.
    keys = bits & ~lowest if absolute else jnp.where(bits < 0, lowest - bits, bits)
    keys = jnp.where(jnp.isnan(scores), jnp.asarray(lowest + 1, integer), keys)
    if where is None:
        return keys
    # Compared as a byte: on a CPU, XLA's select on a stored bool is not vectorised.
    return jnp.where(where.astype(jnp.uint8) != 0, keys, jnp.asarray(lowest, integer))
