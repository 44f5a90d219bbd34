"""Gram matrices made positive definite: scaled, damped, and factored."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.user_warnings import warn

__all__ = ["Scaled", "check_damping", "factored", "scaled", "warn_of_damping"]

_LEAST, _MOST = 1e-6, 1e3  # what a damping of 0 is raised to, and where raising it ends


class Scaled(NamedTuple):
    """A Gram matrix in a unit in which the mean of its diagonal is 1.

    Attributes:
      gram: ``(inputs, inputs)``, with 1 on the diagonal for an input that never fires.
      silent: bool, ``(inputs,)``: the inputs that never fire. None is said to be if that holds for all of them.
    """

    gram: jax.Array
    silent: jax.Array


def scaled(gram: jax.Array) -> Scaled:
    """Divide a Gram matrix by the mean of its diagonal.

    An input that never fires counts there as 1, as in the authors' code of SparseGPT, but not as more than the mean of
    the others, or it would dominate where activations are small.
    """
    squares = jnp.diagonal(gram)
    fires = squares != 0  # a matrix with a negative one is none of a Gram matrix, and must not pass for silent
    live = jnp.sum(fires).astype(gram.dtype)
    of_live = jnp.where(live > 0, jnp.sum(jnp.maximum(squares, 0)) / jnp.maximum(live, 1), 1)
    mean = jnp.mean(jnp.where(fires, jnp.maximum(squares, 0), jnp.minimum(of_live, 1)))
    return Scaled(gram / mean + jnp.diag(1 - fires.astype(gram.dtype)), ~fires & jnp.any(fires))


def factored(
    gram: jax.Array, damping: ArrayLike, factor: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Factor a damped Gram matrix, with ten times the damping until that succeeds.

    Args:
      gram: whose diagonal has mean 1, ``(inputs, inputs)``.
      damping: what to add to the diagonal first.
      factor: a function of the damped matrix, such as the Cholesky decomposition, that is not finite where it fails.

    Returns:
      The factor, and the damping that it took; NaN if none was enough, as where the matrix has NaN.
    """
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    first = jnp.asarray(damping, gram.dtype)

    def failed(state):
        return ~state[2] & (state[0] < _MOST)

    def attempt(state):
        previous, started, _, _ = state
        now = jnp.where(started, jnp.maximum(10 * previous, _LEAST), first)
        found = factor(gram + now * eye)
        return now, jnp.ones((), bool), jnp.all(jnp.isfinite(found)), found

    start = jnp.zeros_like(first), jnp.zeros((), bool), jnp.zeros((), bool), jnp.zeros_like(gram)
    used, _, done, found = jax.lax.while_loop(failed, attempt, start)
    return found, jnp.where(done, used, jnp.nan)


def check_damping(damping: ArrayLike) -> None:
    """Raises a ValueError for a concrete damping that is negative or not finite."""
    if not isinstance(damping, jax.core.Tracer) and not 0 <= float(damping) < float("inf"):
        raise ValueError(f"damping must be a number >= 0, got {damping}")


def warn_of_damping(used: jax.Array, damping: ArrayLike) -> None:
    """Warns if the damping had to be raised, and raises a ValueError if none was enough. Nothing is known under jit."""
    if isinstance(used, jax.core.Tracer) or isinstance(damping, jax.core.Tracer):
        return
    if not jnp.isfinite(used):
        raise ValueError("gram cannot be made positive definite: it has values that are not finite, or negative ones")
    if float(used) > 1.5 * float(damping):
        warn(
            f"gram is not positive definite with damping {float(damping):.3g}, so {float(used):.3g} was used: are "
            "there fewer rows of calibration data than inputs?",
        )
