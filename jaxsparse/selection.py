"""The k largest entries of an array or of a whole tree, exactly, without a sort.

Floats order like their bit patterns, so the k-th largest is found by bisection: each round counts how many entries
reach each of a few candidate thresholds. Entries equal to the threshold are taken in the order of their flat index,
found by further rounds that run only where there are such ties. A count is a sum of integers, therefore

* ``k`` may be a traced number,
* on a sharded array a round is an all-reduce of a few scalars: no weight is gathered,
* the answer is the same, bit for bit, however the array is laid out,
* a round is one pass over the weights, and nothing of their size is held in memory. On a CPU it all costs an order of
  magnitude less than ``jnp.sort`` or ``jax.lax.top_k``.

NaN ranks below every number: it is selected only when nothing else is left.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.bisection import select
from jaxsparse.placement import lies_anywhere
from jaxsparse.reductions import count_true

__all__ = ["count_true", "global_top_k_masks", "random_scores", "top_k_mask", "top_k_masks"]


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
    return select([[_checked(scores, where)]], [ks], absolute, (others,))[0][0]


def top_k_masks(scores: Any, ks: Any, *, where: Any | None = None, absolute: bool = False, enough: bool = False) -> Any:
    """Marks the ``k`` largest entries of every leaf, each leaf with its own ``k``.

    The same as :func:`top_k_mask` leaf by leaf, but all leaves share one loop,
    which compiles faster and, on sharded leaves, communicates less often.

    Args:
      scores: a pytree of float arrays.
      ks: one integer a leaf, possibly traced: a pytree like ``scores`` or an
        array of shape (number of leaves,).
      where: a pytree like ``scores`` of bool arrays: only these may be marked.
      absolute: rank by absolute value.
      enough: the caller knows that ``where`` marks at least ``ks``, which saves counting them.

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
    return treedef.unflatten([masks[0] for masks in select(groups, ks, absolute, enough=enough)])


def top_k_along(
    scores: Sequence[jax.Array],
    ks: Sequence[jax.Array],
    axes: Sequence[tuple[int, ...]],
    where: Sequence[jax.Array | None],
    *,
    absolute: bool = False,
    enough: bool = False,
) -> list[jax.Array]:
    """:func:`top_k_mask` of arrays along axes of their own, compiled as one search.

    Args:
      scores: floats.
      ks: int32: how many of each array to mark along its axes, which have length 1 here.
      axes: of each array, those that are searched together; there is a search for each index of the others.
      where: for each array None or bool of its shape: only these may be marked.
      absolute, enough: as for :func:`top_k_masks`.
    """
    pairs, axes = [_checked(x, w) for x, w in zip(scores, where, strict=True)], tuple(axes)
    # As one vector, the searches compile once. On several devices it is short: a search for each member of a stack.
    members = all(set(over) == set(range(1, x.ndim)) for (x, _), over in zip(pairs, axes, strict=True))
    anywhere = all(lies_anywhere(x) for pair in pairs for x in pair if x is not None)
    if len({x.dtype for x, _ in pairs}) == 1 and anywhere and (members or jax.device_count() == 1):
        joined = jnp.concatenate([k.reshape(-1) for k in ks])
        return select([pairs], [joined], absolute, axes, rows=True, enough=enough)[0]
    return [masks[0] for masks in select([[pair] for pair in pairs], list(ks), absolute, axes, enough=enough)]


def global_top_k_masks(
    scores: Any,
    k: ArrayLike,
    *,
    where: Any | None = None,
    absolute: bool = False,
    sizes: Any | None = None,
    at_least: ArrayLike = 0,
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
    where = None if where is None else treedef.flatten_up_to(where)
    sizes = (1,) * len(leaves) if sizes is None else tuple(map(operator.index, treedef.flatten_up_to(sizes)))
    starts = tuple(np.cumsum([0, *(np.size(x) for x in leaves)])[:-1].tolist())
    return treedef.unflatten(top_k_of_all(leaves, k, where, starts, sizes, absolute=absolute, at_least=at_least))


def top_k_of_all(
    arrays: Sequence[jax.Array],
    k: ArrayLike,
    where: Sequence[jax.Array] | None,
    starts: tuple[int | tuple[int, ...], ...],
    sizes: tuple[int, ...],
    *,
    absolute: bool = False,
    at_least: ArrayLike = 0,
) -> list[jax.Array]:
    """:func:`global_top_k_masks` of arrays and stacks of arrays.

    Args:
      arrays: floats.
      k, absolute, at_least: as for :func:`global_top_k_masks`.
      where: for each array bool of its shape: only these may be marked.
      starts: for each array, the index of its first entry among those of all; of a stack, of each member's first entry.
      sizes: for each array, how much an entry counts.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays)
    eligible = [None] * len(arrays) if where is None else where
    group = [_checked(jnp.asarray(x, dtype), w) for x, w in zip(arrays, eligible, strict=True)]
    if min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1, got {list(sizes)}")
    k = _checked_k(k, sum(size * x.size for size, (x, _) in zip(sizes, group, strict=True)))
    first = None
    if isinstance(at_least, jax.core.Tracer) or at_least:
        fewest = jnp.asarray(at_least, jnp.int32)
        rows = [pair if isinstance(start, tuple) else jax.tree.map(lambda leaf: leaf[None], pair)
                for pair, start in zip(group, starts, strict=True)]  # fmt: skip
        ks = [jnp.full(len(x), jnp.minimum(fewest, x[0].size)) for x, _ in rows]
        marked = select([[row] for row in rows], ks, absolute, rows=True)
        first = [mask.reshape(x.shape) for (mask,), (x, _) in zip(marked, group, strict=True)]
        k = jnp.maximum(k - sum(size * count_true(mask) for size, mask in zip(sizes, first, strict=True)), 0)
        group = [(x, ~mask if w is None else w & ~mask) for (x, w), mask in zip(group, first, strict=True)]
    rest = select([group], [k], absolute, sizes=sizes, starts=starts)[0]
    return rest if first is None else [a | b for a, b in zip(first, rest, strict=True)]


def top_k_of_stacks(
    stacks: Sequence[jax.Array],
    ks: jax.Array,
    where: Sequence[jax.Array | None],
    *,
    absolute: bool = False,
    enough: bool = False,
) -> list[jax.Array]:
    """:func:`top_k_masks` of the members of stacks: arrays of shape (members, ...), compiled as one computation.

    Args:
      stacks: floats.
      ks: int32, an entry for every member of every stack.
      where: for each stack None or bool of its shape: only these may be marked.
      absolute, enough: as for :func:`top_k_masks`.
    """
    kinds: dict[Any, list[int]] = {}
    for i, stack in enumerate(stacks):
        kinds.setdefault(stack.dtype, []).append(i)
    ends = np.cumsum([len(stack) for stack in stacks])
    groups = [[_checked(stacks[i], where[i]) for i in members] for members in kinds.values()]
    if len(kinds) > 1:
        each = [np.concatenate([np.arange(ends[i] - len(stacks[i]), ends[i]) for i in members])
                for members in kinds.values()]  # fmt: skip
        split = [ks[chosen] for chosen in each]
    else:
        split = [ks]
    found = select(groups, split, absolute, rows=True, enough=enough)
    masks = dict(pair for members, new in zip(kinds.values(), found, strict=True)
                 for pair in zip(members, new, strict=True))  # fmt: skip
    return [masks[i] for i in range(len(stacks))]


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
