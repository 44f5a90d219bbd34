"""The product by XLA, visiting only live blocks: less work on a CPU if they are few.

It loops over the live blocks column by column. The number of iterations is traced, so the work is that of the live
blocks, and no column is padded to the fullest one. The sum of a column stays in the cache until it is complete.
"""

import jax
import jax.numpy as jnp

from jaxsparse.kernels.masked_matmul.block_info import BlockInfo
from jaxsparse.kernels.masked_matmul.config import Config
from jaxsparse.kernels.masked_matmul.manual_axes import zeros_like
from jaxsparse.kernels.masked_matmul.xla_dense import dot

__all__ = ["backward_w", "backward_x", "forward"]


def forward(x, w, mask, info: BlockInfo, config: Config, dtype):
    """``y[:, j] = sum over the live i of x[:, i] @ w[i, j]``."""
    del mask
    tk, tn = config.tile

    def block(i, j):
        return dot(_columns(x, i, tk), jax.lax.dynamic_slice(w, _at(i * tk, j * tn), (tk, tn)), (1, 0), config)

    return _sum_lines(block, info.by_column, x, w.shape[1], tn, dtype)


def backward_x(dy, w, mask, info: BlockInfo, config: Config, dtype):
    """``dx[:, i] = sum over the live j of dy[:, j] @ w[i, j].T``."""
    del mask
    tk, tn = config.tile

    def block(j, i):
        return dot(_columns(dy, j, tn), jax.lax.dynamic_slice(w, _at(i * tk, j * tn), (tk, tn)), (1, 1), config)

    return _sum_lines(block, info.by_row, dy, w.shape[0], tk, dtype)


def backward_w(x, dy, mask, info: BlockInfo, config: Config, dtype):
    """``dw[i, j] = x[:, i].T @ dy[:, j]`` for the live (i, j), 0 for the others."""
    del mask
    tk, tn = config.tile
    blocks = info.by_column

    def column(j, dw):
        dy_j = _columns(dy, j, tn)

        def block(t, dw):
            i = blocks.position[t]
            product = dot(_columns(x, i, tk), dy_j, (0, 0), config).astype(dtype)
            return jax.lax.dynamic_update_slice(dw, product, _at(i * tk, j * tn))

        return jax.lax.fori_loop(blocks.starts[j], blocks.starts[j + 1], block, dw)

    zeros = _zeros((x.shape[1], dy.shape[1]), dtype, blocks.line[0])
    return jax.lax.fori_loop(0, dy.shape[1] // tn, column, zeros)


def _zeros(shape, dtype, natural):
    """Zeros for a loop to write to, made from a traced number that is not negative, a different one for each loop.

    XLA would make constant zeros once, and copy them for each loop that writes to them.
    """
    return jnp.full(shape, jnp.minimum(natural, 0), dtype)


def _at(*indices):
    """Indices of one dtype, as slicing wants them: with JAX_ENABLE_X64 Python's ints would be of another than lists."""
    return tuple(jnp.asarray(index, jnp.int32) for index in indices)


def _columns(x, index, width):
    return jax.lax.dynamic_slice(x, _at(0, index * width), (x.shape[0], width))


def _sum_lines(block, blocks, x, width, tile, dtype):
    """(rows of x, width): its columns of width ``tile`` are the sums of ``block(position, line)`` over a line."""

    def line(j, out):
        total = jax.lax.fori_loop(
            blocks.starts[j],
            blocks.starts[j + 1],
            lambda t, total: total + block(blocks.position[t], j),
            zeros_like(x, (x.shape[0], tile), jnp.float32),
        )
        return jax.lax.dynamic_update_slice(out, total.astype(dtype), _at(0, j * tile))

    return jax.lax.fori_loop(0, width // tile, line, _zeros((x.shape[0], width), dtype, blocks.count[0]))
