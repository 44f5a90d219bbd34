"""SparseGPT: weights go one input after the other, and those of later inputs make up for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.allocation import check_sparsity
from jaxsparse.post_training.damping import check_damping, factored, scaled, warn_of_damping
from jaxsparse.post_training.matrix import as_gram, as_kernel, of_matrix, pruned_counts
from jaxsparse.selection import top_k_mask
from jaxsparse.structures import Structure, n_of_m

__all__ = ["sparsegpt", "sparsegpt_with_damping"]


def sparsegpt(
    kernel: ArrayLike,
    gram: ArrayLike,
    sparsity: ArrayLike,
    *,
    structure: str | Structure = "weight",
    block_size: int = 128,
    damping: ArrayLike = 0.01,
) -> tuple[jax.Array, jax.Array]:
    r"""Prune a matrix by SparseGPT, which updates the weights that stay.

    With :math:`H` the Gram matrix of the inputs, plus ``damping`` times the mean of its diagonal on the diagonal, and
    :math:`U` the upper triangular matrix of :math:`H^{-1} = U^T U`, the weights to remove have the smallest

    .. math:: \frac{W_{ij}^2}{U_{ii}^2}

    Inputs are visited in their order. Where :math:`W_{ij}` is removed, its error goes to the inputs after it:

    .. math:: W_{kj} \leftarrow W_{kj} - \frac{W_{ij}}{U_{ii}} \, U_{ik}, \qquad k \ge i

    The weights to remove are chosen for ``block_size`` inputs at a time, among all outputs together, by what the
    weights have become until then; with :class:`jaxsparse.n_of_m` for every m inputs, of each output. As in the
    authors' code

    * the threshold is the score at place ``int(weights of the block * sparsity)``, counted from 0, and goes too: one
      weight more than that number is removed of each block (none if the sparsity is 0). Of equal scores those of lower
      index stay;
    * weights of an input that never fires become 0. Where no input ever fires nothing is known, and weights go by
      magnitude.

    It does not matter whether the Gram matrix is a sum or a mean, unless inputs never fire: in the mean of the
    diagonal these count as 1 as in the authors' code, whose matrix is twice the sum over the number of sequences, but
    not as more than the mean of the others.

    Args:
      kernel: floats, (inputs, outputs).
      gram: floats, (inputs, inputs): the sum of :math:`x x^T` over calibration data, as
        :attr:`jaxsparse.trace.Moments.second` has it.
      sparsity: the fraction to remove, in [0, 1), possibly traced; not used with :class:`jaxsparse.n_of_m`.
      structure: "weight", or :class:`jaxsparse.n_of_m` along the inputs.
      block_size: how many inputs are pruned at a time; with :class:`jaxsparse.n_of_m`, where it changes no more than
        rounding, raised to the next multiple of m.
      damping: relative to the mean of the diagonal. Where that leaves the matrix not positive definite, ten times as
        much is tried until it is; outside of ``jit`` a warning says so.

    Returns:
      The kernel, float32 (float64 for a float64 kernel) and exactly 0 where the mask is False; and the mask, bool.

    Raises:
      ValueError: for shapes that do not fit, options out of range, and, outside of ``jit``, a Gram matrix with NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel, gram = jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> pruned, mask = sparsegpt(kernel, gram, 0.25, damping=0.0)
      >>> mask[:, 0].tolist(), [round(float(w), 4) for w in pruned[:, 0]]  # 2 + 1 * 1 / 2
      ([False, True], [0.0, 2.5])

    References:
      Frantar and Alistarh, `SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot
      <https://arxiv.org/abs/2301.00774>`_, 2023, algorithm 1; https://github.com/IST-DASLab/sparsegpt at 147d215.
    """
    pruned, mask, used = sparsegpt_with_damping(
        kernel, gram, sparsity, structure=structure, block_size=block_size, damping=damping
    )
    warn_of_damping(used, damping)
    return pruned, mask


def sparsegpt_with_damping(
    kernel: ArrayLike,
    gram: ArrayLike,
    sparsity: ArrayLike,
    *,
    structure: str | Structure = "weight",
    block_size: int = 128,
    damping: ArrayLike = 0.01,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prune as :func:`sparsegpt` does, without a warning, and return the damping too.

    Returns:
      The kernel, the mask, and the damping that was used, a scalar: more than ``damping`` where that was not enough,
      NaN where none was.
    """
    kernel = as_kernel(kernel)
    unit = of_matrix(structure, kernel)
    check_damping(damping)
    check_sparsity(sparsity)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    gram = as_gram(gram, kernel)
    if not kernel.size:
        return kernel, jnp.ones(kernel.shape, bool), jnp.asarray(damping, kernel.dtype)
    inputs, outputs = kernel.shape
    size = min(block_size, inputs)
    if isinstance(unit, n_of_m):
        size = -(-size // unit.m) * unit.m
    blocks = -(-inputs // size)
    in_block = np.minimum(size, inputs - size * np.arange(blocks)) * outputs
    zeros = pruned_counts(in_block, sparsity)
    zeros = jnp.where(jnp.asarray(sparsity, jnp.float32) > 0, jnp.minimum(zeros + 1, in_block), 0)
    return _prune(kernel, gram, in_block - zeros, jnp.asarray(damping, kernel.dtype), unit, size)


@functools.partial(jax.jit, static_argnames=("unit", "size"))
def _prune(kernel, gram, kept, damping, unit, size):
    """:func:`sparsegpt_with_damping`, with the number of weights to keep of each block."""
    inputs, outputs = kernel.shape
    gram, silent = scaled(gram)
    kernel = jnp.where(silent[:, None], 0, kernel)
    upper, used = factored(gram, damping, _upper_of_inverse)
    blocks = len(kept)
    beyond = blocks * size - inputs  # inputs that fill the last block
    eye = jnp.eye(beyond, dtype=upper.dtype)
    upper = jax.scipy.linalg.block_diag(upper, eye) if beyond else upper
    kernel = jnp.pad(kernel, ((0, beyond), (0, 0)))
    group = unit.m if isinstance(unit, n_of_m) else size

    def choose(own, diagonal, real, first, keep):
        """The mask of the group of inputs that begins at ``first`` in its block."""
        own, diagonal, real = (jax.lax.dynamic_slice_in_dim(x, first, group) for x in (own, diagonal, real))
        scores = jnp.square(own / diagonal[:, None])
        if isinstance(unit, n_of_m):
            return unit.top(scores)
        return top_k_mask(scores, keep, where=jnp.broadcast_to(real[:, None], scores.shape))

    def prune_block(weights, block):
        start, keep = block
        own = jax.lax.dynamic_slice_in_dim(weights, start, size)
        rows = jax.lax.dynamic_slice_in_dim(upper, start, size)
        square = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        diagonal = jnp.diagonal(square)
        real = start + jnp.arange(size) < inputs

        def prune_input(own, at):
            i, stays = at
            row = jnp.where(stays, own[i], 0)
            error = (own[i] - row) / diagonal[i]
            return own - square[i][:, None] * error[None], (row, error)

        def prune_group(own, first):
            mask = choose(own, diagonal, real, first, keep)
            own, (left, errors) = jax.lax.scan(prune_input, own, (first + jnp.arange(group), mask))
            return own, (left, errors, mask)

        _, found = jax.lax.scan(prune_group, own, jnp.arange(0, size, group))
        left, errors, mask = (x.reshape(size, outputs) for x in found)
        later = jnp.where(jnp.arange(upper.shape[1])[None] >= start + size, rows, 0)
        weights = weights - jnp.matmul(later.T, errors, precision="highest")
        return weights, (left, mask)

    _, (left, mask) = jax.lax.scan(prune_block, kernel, (jnp.arange(0, blocks * size, size), kept))
    left, mask = (x.reshape(-1, outputs)[:inputs] for x in (left, mask))
    return left, mask, used


def _upper_of_inverse(gram: jax.Array) -> jax.Array:
    """U, upper triangular, of the inverse U^T U of a matrix: the inverse of R, upper triangular, of the matrix R R^T.

    R is the Cholesky factor of the matrix with its axes reversed, so the inverse itself need not be computed.
    """
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], jnp.eye(len(gram), dtype=gram.dtype), lower=False)
