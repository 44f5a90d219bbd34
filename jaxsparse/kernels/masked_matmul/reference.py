"""The definition of the product, with which all backends are compared."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["block_sparse_matmul", "masked_matmul"]


def masked_matmul(x: jax.Array, w: jax.Array, mask: jax.Array, out_dtype: Any = None) -> jax.Array:
    """``x @ (w * mask)``, accumulated in float32; weights where ``mask`` is False are ignored, even NaN."""
    dtype = out_dtype or jnp.result_type(x, w)
    w = jnp.where(mask, w, jnp.zeros_like(w))
    return jnp.matmul(x, w, precision="highest", preferred_element_type=jnp.float32).astype(dtype)


def block_sparse_matmul(
    x: jax.Array, w: jax.Array, block_mask: jax.Array, block: tuple[int, int], out_dtype: Any = None
) -> jax.Array:
    """The product with a mask of blocks; the edges of ``w`` may cut off the last ones."""
    mask = jnp.repeat(jnp.repeat(block_mask, block[0], 0), block[1], 1)[: w.shape[0], : w.shape[1]]
    return masked_matmul(x, w, mask, out_dtype)
