"""Checks and counts that the rules of post-training pruning share; all of them work on one matrix."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.saliency.floats import wide
from jaxsparse.structures import Structure, n_of_m, weight

__all__ = ["as_gram", "as_kernel", "as_squares", "of_matrix", "pruned_counts"]


def as_kernel(kernel: ArrayLike) -> jax.Array:
    """A kernel in float32 (float64 stays), or a ValueError if it is no matrix of floats."""
    kernel = jnp.asarray(kernel)
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"kernel must be a matrix of floats, (inputs, outputs), got {kernel.dtype} of {kernel.shape}")
    return wide(kernel)


def as_squares(mean_square: ArrayLike, kernel: jax.Array) -> jax.Array:
    """The squares of the inputs in the dtype of the kernel, or a ValueError if they do not fit it."""
    return _fitting(
        mean_square, kernel, (kernel.shape[0],), "mean_square must have an entry for each input of the kernel"
    )


def as_gram(gram: ArrayLike, kernel: jax.Array) -> jax.Array:
    """The Gram matrix of the inputs in the dtype of the kernel, or a ValueError if it does not fit it."""
    size = kernel.shape[0]
    return _fitting(gram, kernel, (size, size), "gram must be the Gram matrix of the kernel's inputs")


def _fitting(values: ArrayLike, kernel: jax.Array, shape: tuple[int, ...], what: str) -> jax.Array:
    values = jnp.asarray(values)
    if values.shape != shape or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"{what}: expected floats of shape {shape} for a kernel of {kernel.shape}, got {values.dtype} of "
            f"{values.shape}"
        )
    return values.astype(kernel.dtype)


def of_matrix(structure: str | Structure, kernel: jax.Array) -> weight | n_of_m:
    """The structure of a matrix (inputs, outputs): single weights, or n of every m inputs.

    Args:
      structure: "weight", or a structure, also that of a leaf with a layout.
      kernel: the matrix.

    Raises:
      ValueError: for other structures, and for inputs that m does not divide.
    """
    if structure == "weight" or isinstance(structure, weight):
        return weight()
    if not isinstance(structure, n_of_m) or structure.axis not in ("inputs", 0, -2):
        raise ValueError(f'structure must be "weight" or made by jaxsparse.n_of_m along the inputs, got {structure!r}')
    if kernel.shape[0] % structure.m:
        raise ValueError(
            f"{structure} needs a number of inputs that {structure.m} divides, got a kernel of {kernel.shape[0]} "
            f"inputs and {kernel.shape[1]} outputs"
        )
    return dataclasses.replace(structure, axis="inputs", layout=None)


def pruned_counts(size: ArrayLike, sparsity: ArrayLike) -> jax.Array:
    """The number of weights to remove, rounded down as the authors of Wanda and SparseGPT do: int32.

    Args:
      size: how many weights there are, an integer.
      sparsity: the fraction to remove, in [0, 1), one for each size, possibly traced.

    Examples:
      >>> int(pruned_counts(9, 0.5)), int(pruned_counts(10, 0.7))
      (4, 7)
    """
    exact = jnp.asarray(size, jnp.float32) * jnp.asarray(sparsity, jnp.float32)
    return jnp.floor(exact * (1 + 2.0**-22)).astype(jnp.int32)  # 0.7 in float32 is a little less, and 7 must stay 7
