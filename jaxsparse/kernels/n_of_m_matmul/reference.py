"""The definition of the product, and its implementation by XLA."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsparse.kernels.n_of_m_matmul.compressed import decompress_n_of_m

__all__ = ["n_of_m_matmul"]


def n_of_m_matmul(
    x: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    m: int,
    dtype: DTypeLike,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """``x @ w`` with the decompressed matrix, accumulated in float32."""
    w = decompress_n_of_m(values, positions, m=m)
    return jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32).astype(dtype)
