"""Checks and counts that the rules of post-training pruning share; all of them work on one matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.saliency.floats import wide
from jaxsparse.structures import Structure, n_of_m, weight

__all__ = ["as_gram", "as_inputs", "as_kernel", "of_matrix", "pruned_counts"]


def as_kernel(kernel: ArrayLike) -> jax.Array:
    """A kernel in float32 (float64 stays), or a ValueError if it is no matrix of floats."""
    kernel = jnp.asarray(kernel)
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"kernel must be a matrix of floats, (inputs, outputs), got {kernel.dtype} of {kernel.shape}")
    return wide(kernel)


def as_inputs(values: ArrayLike, kernel: jax.Array, name: str) -> jax.Array:
    """A value of each input in the dtype of the kernel, or a ValueError with the argument's name if they do not fit."""
    return _fitting(values, kernel, (kernel.shape[0],), f"{name} must have an entry for each input of the kernel")


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

    Computed in double precision, for float32 cannot tell all the weights of a large matrix. A float32 sparsity stands
    for the decimal of six digits that it is nearest to, if there is one, else for what gives a whole number, if that is
    within the rounding of float32: 0.7 in float32 is a little less, and 7 of 10 must stay 7.

    Args:
      size: how many weights there are, an integer.
      sparsity: the fraction to remove, in [0, 1], one for each size, possibly traced; in float64 where it was computed
        in ``jax.enable_x64``.

    Examples:
      >>> int(pruned_counts(9, 0.5)), int(pruned_counts(10, 0.7)), int(pruned_counts(10, jnp.float32(0.7)))
      (4, 7, 7)
    """
    xp: Any = jnp if any(isinstance(x, jax.core.Tracer) for x in (size, sparsity)) else np

    def in_float32(x: Any) -> Any:  # of which XLA may make nothing if it is written as two casts
        return jax.lax.reduce_precision(x, 8, 23) if xp is jnp else x.astype(np.float32).astype(np.float64)

    with jax.enable_x64(True):
        total, given = xp.asarray(size, xp.float64), xp.asarray(sparsity, xp.float64)
        decimal = xp.round(given * 1e6) / 1e6
        is_decimal, is_float32 = in_float32(decimal) == given, in_float32(given) == given
        unsure = xp.where(is_float32 & ~is_decimal, 2.0**-24, 2.0**-50)  # relative: half an ulp of float32, or float64
        exact = total * xp.where(is_decimal, decimal, given)
        whole = xp.round(exact)
        return jnp.asarray(xp.where(xp.abs(exact - whole) <= exact * unsure, whole, xp.floor(exact)), jnp.int32)
