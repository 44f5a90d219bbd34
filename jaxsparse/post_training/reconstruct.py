"""Reconstruction: the least-squares weights of a matrix under a mask, whoever chose it."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.post_training.damping import check_damping, factored, scaled, warn_of_damping
from jaxsparse.post_training.matrix import as_gram, as_kernel
from jaxsparse.selection import count_true
from jaxsparse.user_warnings import warn

__all__ = ["reconstruct"]

_ENTRIES = 1 << 24  # of the systems that are solved side by side


def reconstruct(kernel: ArrayLike, gram: ArrayLike, mask: ArrayLike, *, damping: ArrayLike = 1e-4) -> jax.Array:
    r"""Compute the weights under a mask whose outputs are nearest to those of the dense matrix.

    For each output, with :math:`w` its dense weights, :math:`m` its mask and :math:`H` the Gram matrix of the inputs,

    .. math:: \min_{v} \; (v - w)^T H (v - w) + \lambda \, \|v - w\|^2 \quad \text{where } v = m \odot v

    is solved exactly, by a Cholesky decomposition of the kept rows and columns of :math:`H + \lambda I`, where
    :math:`\lambda` is ``damping`` times the mean of the diagonal. The error in the outputs is never larger than that of
    the dense weights with the mask on them. Weights of an input that never fires stay.

    It takes about (kept weights of an output)^3 / 3 multiply-adds for every output; where the mask is traced,
    (inputs)^3 / 3. The systems are solved in chunks, in 64 MiB of memory or what one of them takes.

    Args:
      kernel: the dense weights, floats, (inputs, outputs).
      gram: floats, (inputs, inputs): the sum, or the mean, of :math:`x x^T` over calibration data.
      mask: bool, (inputs, outputs): the weights that stay.
      damping: relative to the mean of the diagonal. More of it keeps weights nearer to what they were, which helps
        where there are few rows of data. Where it leaves the matrix not positive definite, ten times as much is tried
        until it is; outside of ``jit`` a warning says so.

    Returns:
      float32 (float64 for a float64 kernel), (inputs, outputs), exactly 0 where the mask is False.

    Raises:
      ValueError: for shapes that do not fit, options out of range, and, outside of ``jit``, a Gram matrix with NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel, gram = jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> mask = jnp.array([[False], [True]])
      >>> [round(float(w), 4) for w in reconstruct(kernel, gram, mask, damping=0.0)[:, 0]]  # 2 + 1 * 1 / 2
      [0.0, 2.5]
    """
    kernel, mask = as_kernel(kernel), jnp.asarray(mask)
    gram = as_gram(gram, kernel)
    if mask.shape != kernel.shape or mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool of the kernel's shape {kernel.shape}, got {mask.dtype} of {mask.shape}")
    check_damping(damping)
    kept = inputs = kernel.shape[0]
    if not isinstance(mask, jax.core.Tracer):
        step = -(-inputs // 16)  # a few programs for all masks of a shape
        kept = min(inputs, -(-int(jnp.max(count_true(mask, (0,)), initial=0)) // step) * step)
    if kept == 0 or not kernel.size:
        return jnp.zeros_like(kernel)
    found, used, failed = _reconstruct(kernel, gram, mask, jnp.asarray(damping, kernel.dtype), kept)
    warn_of_damping(used, damping)
    if not isinstance(failed, jax.core.Tracer) and failed > 0:
        warn(
            f"the weights of {int(failed)} outputs cannot be solved for and stay as they are: give more damping than "
            f"{float(damping):.3g}",
        )
    return found


@functools.partial(jax.jit, static_argnames="kept")
def _reconstruct(kernel, gram, mask, damping, kept):
    """The weights, the damping that was used, and how many outputs could not be solved for.

    The changes of the weights that stay are solved for, rather than the weights: their errors are smaller.
    """
    gram, _ = scaled(gram)
    _, used = factored(gram, damping, jnp.linalg.cholesky)
    damped = gram + used * jnp.eye(len(gram), dtype=gram.dtype)
    missing = jnp.matmul(gram, jnp.where(mask, 0, kernel), precision="highest")

    def changes(of_output):
        stays, lacks = of_output
        order = jnp.argsort(~stays, stable=True)[:kept]
        live = stays[order]
        matrix = jnp.where(live[:, None] & live[None], damped[order][:, order], 0) + jnp.diag(
            1 - live.astype(damped.dtype)
        )
        factor = jnp.linalg.cholesky(matrix)
        change = jax.scipy.linalg.cho_solve((factor, True), jnp.where(live, lacks[order], 0))
        return jnp.zeros_like(lacks).at[order].set(change)

    chunk = min(max(1, _ENTRIES // kept**2), kernel.shape[1])
    change = jax.lax.map(changes, (mask.T, missing.T), batch_size=chunk).T
    solved = jnp.all(jnp.isfinite(change), axis=0)
    return jnp.where(mask, kernel + jnp.where(solved[None], change, 0), 0), used, jnp.sum(~solved)
