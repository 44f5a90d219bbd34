"""Matrices of constant fan-in: every output keeps equally many inputs, or none. Two dense arrays, and a product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.artifacts.encodings import require

__all__ = ["FanIn"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FanIn:
    """A matrix whose outputs have k inputs each, except for ablated ones, which have none.

    ``x @ matrix`` multiplies from the left, ``matrix.todense()`` is the matrix. It is a pytree, so it goes through
    ``jax.jit``. To train it, take gradients of its values alone: ``jax.grad(lambda values: loss(dataclasses.replace(
    matrix, values=values)))(matrix.values)``.

    Attributes:
      indices: int32, (k, live outputs): the inputs of each output, in increasing order.
      values: (k, live outputs): the weight of each of them.
      outputs: int32, (live outputs,): which outputs these are, in increasing order.
      shape: inputs and outputs of the matrix.

    Examples:
      >>> matrix = FanIn(jnp.array([[0], [2]]), jnp.array([[5.0], [3.0]]), jnp.array([1]), shape=(3, 2))
      >>> matrix.todense().tolist()
      [[0.0, 5.0], [0.0, 0.0], [0.0, 3.0]]
      >>> (jnp.array([1.0, 10.0, 100.0]) @ matrix).tolist()
      [0.0, 305.0]
    """

    indices: jax.Array
    values: jax.Array
    outputs: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    __array_ufunc__ = None  # so that NumPy leaves the product to __rmatmul__

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """The sum of x[indices[i, r]] * values[i, r] over i, for every output r: (..., inputs) to (..., outputs)."""
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.shape[0]:
            raise ValueError(f"the last axis must be the {self.shape[0]} inputs of the matrix, got shape {x.shape}")
        live = jnp.einsum("...io,io->...o", x[..., self.indices], self.values)
        return jnp.zeros((*x.shape[:-1], self.shape[1]), live.dtype).at[..., self.outputs].set(live)

    def todense(self) -> jax.Array:
        """The matrix, (inputs, outputs), with zeros."""
        values = jnp.asarray(self.values)
        return jnp.zeros(self.shape, values.dtype).at[self.indices, jnp.asarray(self.outputs)[None]].set(values)

    def check(self) -> None:
        """Raises a ValueError for indices or outputs that are out of range, out of order or there twice."""
        for name, index, size in (("indices", self.indices, self.shape[0]), ("outputs", self.outputs, self.shape[1])):
            index = np.asarray(index)
            require(not index.size or (index.min() >= 0 and index.max() < size), f"its {name} are not all below {size}")
            require((np.diff(index, axis=0) > 0).all(), f"its {name} do not increase, or are there twice")
        k, live = np.shape(self.values)
        fits = np.shape(self.indices) == (k, live) and np.shape(self.outputs) == (live,)
        require(fits, "its indices, values and outputs are not of one shape")


def fan_in_of(leaf: np.ndarray, mask: np.ndarray) -> FanIn:
    """A matrix on its mask; a ValueError unless all outputs keep equally many weights, or none."""
    kept = mask.sum(0)
    outputs = np.flatnonzero(kept)
    few, many = kept[outputs].min(initial=mask.shape[0]), kept[outputs].max(initial=0)
    require(few >= many, f"its outputs keep {few} to {many} of {mask.shape[0]} inputs, not equally many or none")
    index = np.nonzero(mask.T)[1].reshape(outputs.size, many).T
    parts = index.astype(np.int32), leaf[index, outputs], outputs.astype(np.int32)
    indices, values, live = map(jnp.asarray, parts)
    return FanIn(indices, values, live, shape=leaf.shape)
