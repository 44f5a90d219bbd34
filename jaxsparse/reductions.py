"""Exact sums and counts, several in one pass where a backend would not fuse them by itself.

XLA's CPU backend writes the operand of a sum to memory before it adds, and splits a sum over more than 32 entries into
two kernels, each of which it compiles. It does neither to one reduction of several arrays. Other backends fuse sums.
"""

import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["all_false", "any_true", "count_true", "in_one_pass", "sums"]

# float32 holds every integer up to here, so sums of zeros and ones are exact.
_EXACT_IN_FLOAT32 = 1 << 24

_WINDOW = 32  # entries, up to which XLA's CPU backend adds in one kernel


def count_true(mask: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Counts True entries as int32, exactly.

    Args:
      mask: bool, any shape.
      axis: axes to sum over, which are kept with length 1; ``None`` for all of them and a scalar result.
    """
    if not in_one_pass(mask.ndim, axis):
        return _sum(mask, axis)
    together = lambda mask: _together([mask, ~mask], axis)[0]  # noqa: E731
    return jax.lax.platform_dependent(mask, cpu=together, default=lambda mask: _sum(mask, axis))


def all_false(masks: Mapping[str, jax.Array]) -> list[str]:
    """The names of the masks without any True, but for those of size 0 and traced ones, of which nothing is known."""
    known = {name: mask for name, mask in masks.items() if mask.size and not isinstance(mask, jax.core.Tracer)}
    live = jax.device_get({name: jnp.any(mask) for name, mask in known.items()})
    return [name for name, any_left in live.items() if not any_left]


def any_true(mask: jax.Array) -> jax.Array:
    """Whether any entry is True: :func:`jax.numpy.any`, but one kernel on a CPU."""
    return jnp.any(mask) if mask.size <= _WINDOW else count_true(mask) > 0


def sums(arrays: list[jax.Array], axis: tuple[int, ...] | None = None) -> list[jax.Array]:
    """Sums of several arrays of one shape, by one pass where that is fast.

    Args:
      arrays: bool, of which the True entries are counted as int32, or integers, whose sums keep their dtype.
      axis: as for :func:`count_true`.
    """
    if len(arrays) == 1 or not in_one_pass(arrays[0].ndim, axis):
        return [_sum(array, axis) for array in arrays]
    return jax.lax.platform_dependent(
        arrays, cpu=lambda arrays: _together(arrays, axis), default=lambda arrays: [_sum(x, axis) for x in arrays]
    )


def in_one_pass(ndim: int, axis: tuple[int, ...] | None) -> bool:
    """Whether to add several arrays up in one pass: where that is fast, which on a CPU needs the last axis to go.

    Not on a CPU of several devices: of arrays that are sharded only sums become all-reduces.
    """
    alone = jax.default_backend() != "cpu" or jax.device_count() == 1
    return alone and (axis is None or ndim - 1 in axis)


def _together(arrays: list[jax.Array], axis: tuple[int, ...] | None) -> list[jax.Array]:
    over = tuple(range(arrays[0].ndim)) if axis is None else axis
    numbers = [x.astype(jnp.int32) if x.dtype == jnp.bool_ else x for x in arrays]
    zeros = tuple(np.zeros((), x.dtype) for x in numbers)
    found = jax.lax.reduce(tuple(numbers), zeros, lambda a, b: tuple(map(operator.add, a, b)), over)
    found = jax.lax.optimization_barrier(found)  # or XLA would drop a sum that nobody asks for, and with it the rest
    return list(found) if axis is None else [jnp.expand_dims(n, over) for n in found]


def _sum(array: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    if array.dtype != jnp.bool_:
        return jnp.sum(array, axis=axis, keepdims=axis is not None, dtype=array.dtype)
    reduced = array.shape if axis is None else [array.shape[d] for d in axis]
    if np.prod(reduced, dtype=np.int64) <= _EXACT_IN_FLOAT32:  # several times faster than a sum of integers
        return jnp.sum(array, axis=axis, keepdims=axis is not None, dtype=jnp.float32).astype(jnp.int32)
    return jnp.sum(array, axis=axis, keepdims=axis is not None, dtype=jnp.int32)
