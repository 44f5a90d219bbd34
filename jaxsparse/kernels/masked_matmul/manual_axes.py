"""Inside ``jax.shard_map``: the mesh axes along which arrays differ from device to device.

``shard_map`` knows them as a part of each array's type, and what is made anew has to be told its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["shape_like", "together", "zeros_like"]


def together(arrays: Sequence[jax.Array | None]) -> list[jax.Array | None]:
    """The arrays, each varying along all the axes along which any of them does; the gradients are then summed right."""
    given = [array for array in arrays if array is not None]
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in given))

    def vary(array):
        missing = axes - jax.typeof(array).mat.varying if array is not None else None
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return [vary(array) for array in arrays]


def zeros_like(array: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Zeros that vary as ``array`` does."""
    return together([jnp.zeros(shape, dtype), array])[0]  # type: ignore[return-value]


def shape_like(array: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's output that varies as ``array`` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).mat)
