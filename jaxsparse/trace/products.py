"""Products of a weight with activations, as products of matrices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["PRODUCTS", "as_matrices", "dot_parts", "is_pointwise_conv", "multiply_adds_of"]

PRODUCTS = ("dot_general", "conv_general_dilated")

Axes = list[int]


def dot_parts(eqn: Any, weight: int) -> list[tuple[Axes, Axes, Axes]]:
    """The (batch, contracted, free) axes of both operands of a dot_general, those of the weight first.

    Args:
      eqn: the equation.
      weight: which operand the weight is, 0 or 1.
    """
    contract, batch = eqn.params["dimension_numbers"]
    parts = []
    for side in (weight, 1 - weight):
        rank = len(eqn.invars[side].aval.shape)
        free = [i for i in range(rank) if i not in contract[side] and i not in batch[side]]
        parts.append((list(batch[side]), list(contract[side]), free))
    return parts


def as_matrices(
    eqn: Any, weight: int, w: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """The operands of a dot_general as stacks of matrices, with the contracted axes in the order of the weight.

    Args:
      eqn: the equation.
      weight: which operand the weight is, 0 or 1.
      w: the weight, or an array of its shape.
      x: the other operand.

    Returns:
      w as (batch, inputs, outputs), x as (batch, rows, inputs), and a function that makes of their product, (batch,
      rows, outputs), what the equation returns.
    """
    (wb, wc, wf), (xb, xc, xf) = dot_parts(eqn, weight)
    order = sorted(range(len(wc)), key=lambda i: wc[i])
    wc, xc = [wc[i] for i in order], [xc[i] for i in order]
    sizes = [[a.shape[i] for i in axes] for a, axes in ((w, wb), (w, wc), (w, wf), (x, xf))]
    b, k, n, rows = map(math.prod, sizes)
    w = jnp.transpose(w, wb + wc + wf).reshape(b, k, n)
    x = jnp.transpose(x, xb + xf + xc).reshape(b, rows, k)

    def back(y: jax.Array) -> jax.Array:
        y = y.reshape(*sizes[0], *sizes[3], *sizes[2])
        if weight == 0:  # the result has the free axes of the first operand first
            nb, nx = len(wb), len(xf)
            y = jnp.transpose(y, [*range(nb), *range(nb + nx, y.ndim), *range(nb, nb + nx)])
        return y

    return w, x, back


def is_pointwise_conv(eqn: Any) -> bool:
    """Whether a convolution is a product of matrices: 1 x 1, in one group, without padding."""
    p = eqn.params
    window = [eqn.invars[1].aval.shape[i] for i in p["dimension_numbers"].rhs_spec[2:]]
    return (
        set(window) <= {1}
        and p["feature_group_count"] == p["batch_group_count"] == 1
        and not any(map(any, p["padding"]))
        and set(p["lhs_dilation"]) <= {1}
    )


def multiply_adds_of(eqn: Any) -> int:
    """The multiply-adds of a dot_general or a convolution.

    Those of a convolution with zeros that pad an image count, as everywhere; those with zeros between its pixels, of a
    transposed convolution, do not.
    """
    (x, w), out = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return math.prod(out) * math.prod(x[i] for i in contract)
    d, groups = eqn.params["dimension_numbers"], eqn.params["batch_group_count"]
    places = math.prod(x[i] for i in d.lhs_spec[2:]), math.prod(out[i] for i in d.out_spec[2:])
    dilated = any(step > 1 for step in eqn.params["lhs_dilation"])
    return x[d.lhs_spec[0]] // groups * math.prod(w) * places[not dilated]
