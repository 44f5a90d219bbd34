"""The product by XLA's dense product with a masked copy of the weights, for all devices."""

import jax
import jax.numpy as jnp

from jaxsparse.kernels.masked_matmul.block_info import BlockInfo
from jaxsparse.kernels.masked_matmul.config import Config

__all__ = ["backward_w", "backward_x", "dot", "forward"]


def forward(x, w, mask, info: BlockInfo | None, config: Config, dtype):
    """``x @ (w * mask)``."""
    del info
    return dot(x, jnp.where(mask, w, jnp.zeros_like(w)), (1, 0), config).astype(dtype)


def backward_x(dy, w, mask, info: BlockInfo | None, config: Config, dtype):
    """``dy @ (w * mask).T``."""
    del info
    return dot(dy, jnp.where(mask, w, jnp.zeros_like(w)), (1, 1), config).astype(dtype)


def backward_w(x, dy, mask, info: BlockInfo | None, config: Config, dtype):
    """``(x.T @ dy) * mask``; with the mask None, ``x.T @ dy``."""
    del info
    dw = dot(x, dy, (0, 0), config).astype(dtype)
    return dw if mask is None else jnp.where(mask, dw, jnp.zeros_like(dw))


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], config: Config) -> jax.Array:
    """``a`` times ``b``, summed over one axis of each, in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    dtype = jnp.promote_types(a.dtype, b.dtype)  # the gradient of the result may be wider than x and w
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, precision=config.precision, preferred_element_type=jnp.float32)
