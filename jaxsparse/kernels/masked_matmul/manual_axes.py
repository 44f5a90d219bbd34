"""Mesh axes along which arrays vary from device to device inside ``jax.shard_map``.

They are part of each array's type there, so new arrays have to get the right ones.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["shape_like", "vary_together", "zeros_like"]


def vary_together(arrays: Sequence[jax.Array | None]) -> list[jax.Array | None]:
    """Make all arrays vary along every axis along which any of them varies, so that gradients are summed correctly."""
    given = [array for array in arrays if array is not None]
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in given))

    def vary(array):
        missing = axes - jax.typeof(array).mat.varying if array is not None else None
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return [vary(array) for array in arrays]


def zeros_like(array: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Zeros that vary along the same axes as ``array``."""
    return vary_together([jnp.zeros(shape, dtype), array])[0]  # type: ignore[return-value]


def shape_like(array: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's output that varies along the same axes as ``array``."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).mat)
