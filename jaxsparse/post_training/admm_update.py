"""Weights after pruning by ADMM: the mask and the weights that stay are found in turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.allocation import check_sparsity
from jaxsparse.post_training.damping import check_damping
from jaxsparse.post_training.matrix import as_gram, as_kernel, of_matrix, pruned_counts
from jaxsparse.selection import top_k_mask
from jaxsparse.structures import Structure, n_of_m

__all__ = ["admm_update"]


def admm_update(
    kernel: ArrayLike,
    gram: ArrayLike,
    sparsity: ArrayLike,
    *,
    structure: str | Structure = "weight",
    iterations: int = 20,
    pruning_iterations: int = 15,
    damping: ArrayLike = 0.1,
) -> tuple[jax.Array, jax.Array]:
    r"""Prune a matrix gradually while ADMM solves for the weights that stay.

    Inputs are scaled to norm 1, so :math:`\tilde W_{ij} = W_{ij} \|x_i\|`, whose magnitude is the score of Wanda, and
    the Gram matrix H has the diagonal 1, plus ``damping`` times its mean. With :math:`V = \tilde W` and :math:`U = 0`
    at the start, each iteration computes

    .. math:: Z = m \odot (V + U), \qquad U \leftarrow U + V - Z, \qquad
              V \leftarrow (H + I)^{-1} \left( H \tilde W + Z - U \right)

    In each of the ``pruning_iterations`` the mask m keeps the largest :math:`|V + U|` of the matrix, at the sparsity
    :math:`s - s (1 - t / T)^3` in iteration t of T; with :class:`jaxsparse.n_of_m` the n largest of each group are
    kept in any case. The result is :math:`m \odot (V + U)` in the old scale. :func:`reconstruct` solves for the weights
    under such a mask exactly, and takes far longer.

    Args:
      kernel: floats, (inputs, outputs).
      gram: floats, (inputs, inputs): the sum, or the mean, of :math:`x x^T` over calibration data.
      sparsity: the fraction to remove, in [0, 1), possibly traced, rounded down to whole weights; not used with
        :class:`jaxsparse.n_of_m`.
      structure: "weight", or :class:`jaxsparse.n_of_m` along the inputs.
      iterations: how many there are in all, at least ``pruning_iterations``.
      pruning_iterations: T, at least 1.
      damping: relative to the mean of the diagonal.

    Returns:
      The kernel, float32 (float64 for a float64 kernel) and exactly 0 where the mask is False; and the mask, bool.

    Raises:
      ValueError: for shapes that do not fit, options out of range, and, outside of ``jit``, a Gram matrix with NaN or
        one that the damping does not make positive definite.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel, gram = jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> pruned, mask = admm_update(kernel, gram, 0.5, iterations=100, damping=0.0)
      >>> mask[:, 0].tolist(), [round(float(w), 4) for w in pruned[:, 0]]  # 2 + 1 * 1 / 2
      ([False, True], [0.0, 2.5])

    References:
      Boza, `Fast and Effective Weight Update for Pruned Large Language Models <https://arxiv.org/abs/2401.02938>`_,
      2024; https://github.com/fmfi-compbio/admm-pruning, whose code for single weights has the last sparsity in every
      iteration.
    """
    kernel = as_kernel(kernel)
    unit = of_matrix(structure, kernel)
    check_damping(damping)
    check_sparsity(sparsity)
    if not 1 <= pruning_iterations <= iterations:
        raise ValueError(
            f"pruning_iterations must be at least 1 and at most iterations={iterations}, got {pruning_iterations}"
        )
    gone = 1 - (1 - np.arange(1, pruning_iterations + 1) / pruning_iterations) ** 3
    if isinstance(unit, n_of_m):  # of those beyond the n of each group, so that none is left in the end
        size = kernel.size // unit.m * (unit.m - unit.n)
    else:
        size = kernel.size
        with jax.enable_x64(True):  # float32 cannot tell all the weights of a large matrix
            gone = jnp.asarray(sparsity, jnp.float64) * gone
    free = size - pruned_counts(size, gone)
    found, mask = _update(kernel, as_gram(gram, kernel), free, jnp.asarray(damping, kernel.dtype), unit, iterations)
    if not isinstance(found, jax.core.Tracer) and not jnp.all(jnp.isfinite(found)):
        raise ValueError(
            "ADMM made weights that are not finite: kernel or gram has values that are not, or gram is not positive "
            f"definite with damping {float(damping):.3g}"
        )
    return found, mask


@functools.partial(jax.jit, static_argnames=("unit", "iterations"))
def _update(kernel, gram, free, damping, unit, iterations):
    """:func:`admm_update`, with the number of weights that each pruning iteration keeps, beyond the n of each group."""
    squares = jnp.diagonal(gram)
    some = jnp.any(squares != 0)
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    # An input that never fires has almost no weight. If none ever fires, all count alike.
    norm = jnp.where(some, jnp.sqrt(squares) + 1e-8 * jnp.sqrt(jnp.mean(squares)), 1)
    gram = jnp.where(some, gram / norm[:, None] / norm[None], eye)
    gram = gram + damping * jnp.mean(jnp.diagonal(gram)) * eye
    start = kernel * norm[:, None]
    target = jnp.matmul(gram, start, precision="highest")
    factor = jnp.linalg.cholesky(gram + eye), True
    inverse = jax.scipy.linalg.cho_solve(factor, eye)

    def choose(weights, keep):
        scores = jnp.abs(weights)
        if not isinstance(unit, n_of_m):
            return top_k_mask(scores, keep)
        top = unit.top(scores)
        return top | top_k_mask(scores, keep, where=~top)

    def turn(weights, dual, mask):
        left = jnp.where(mask, weights + dual, 0)
        dual = dual + weights - left
        return jnp.matmul(inverse, target + left - dual, precision="highest"), dual

    def prune(state, keep):
        weights, dual, _ = state
        mask = choose(weights + dual, keep)
        return (*turn(weights, dual, mask), mask), None

    def settle(_, state):
        weights, dual, mask = state
        return *turn(weights, dual, mask), mask

    state = start, jnp.zeros_like(start), jnp.ones_like(start, bool)
    state, _ = jax.lax.scan(prune, state, free)
    weights, dual, mask = jax.lax.fori_loop(0, iterations - len(free), settle, state)
    return jnp.where(mask, (weights + dual) / norm[:, None], 0), mask
