"""Moments and other statistics of the rows that a leaf of params is multiplied by."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Moments", "Statistic"]


class _OfInputs:
    """Values that belong to the inputs of a leaf."""

    inputs: tuple[int, ...]
    leading: tuple[int, ...]

    def along(self, values: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Shape values of inputs so that they broadcast with the leaf.

        Args:
          values: ``(*leading, inputs)``, such as :attr:`Moments.norm`.
          shape: of the leaf.

        Returns:
          An array of the leaf's rank: sizes of inputs and leading axes as in the leaf, 1 for the others.

        Examples:
          >>> import jax.numpy as jnp
          >>> w = jnp.ones((3, 5))
          >>> moments = Moments.of_rows(jnp.array([[3.0, 0, 1], [4, 0, 0]]), (0,), (), gram=False)
          >>> score = jnp.abs(w) * moments.along(moments.norm, w.shape)
          >>> score[:, 0].tolist()
          [5.0, 0.0, 1.0]
        """
        for i, axis in enumerate(self.leading):
            values = jnp.repeat(values, shape[axis] // values.shape[i], i)  # groups of outputs
        axes: tuple[Any, ...] = (*self.leading, *self.inputs)
        values = values.reshape([shape[axis] for axis in axes])
        values = jnp.transpose(values, sorted(range(len(axes)), key=lambda i: axes[i]))
        return values.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])


@dataclasses.dataclass(frozen=True)
class Moments(_OfInputs):
    """Sums over all rows that a leaf was multiplied by; those of two batches add up by ``+``.

    A row is what arrives at one place of a sequence or an image, of one example: what a matrix takes to one row of
    outputs. A leaf of stacked layers (``scan``) or experts (``vmap``) has sums for each.

    Attributes:
      rows: ``(*leading,)``, float32: the number of rows.
      first: ``(*leading, inputs)``, float32: the sums of the rows.
      second: ``(*leading, inputs)``, float32: the sums of their squares; with ``gram=True`` those of their products,
        ``(*leading, inputs, inputs)``.
      inputs: the axes of the leaf that the inputs are, the last of them varies fastest; those of size 1 are left out.
      leading: the axes of the leaf that the others are: stacked layers, experts, and for a grouped convolution its
        outputs, with one entry for each group of them.
    """

    rows: jax.Array
    first: jax.Array
    second: jax.Array
    inputs: tuple[int, ...]
    leading: tuple[int, ...]

    @classmethod
    def of_rows(cls, rows: jax.Array, inputs: tuple[int, ...], leading: tuple[int, ...], gram: bool) -> "Moments":
        """Sum up rows, ``(*leading, rows, inputs)``."""
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        count = jnp.full(rows.shape[:-2], rows.shape[-2], jnp.float32)
        if gram:
            second = jnp.einsum("...rk,...rl->...kl", rows, rows, precision="highest")
        else:
            second = jnp.square(rows).sum(-2)
        return cls(count, rows.sum(-2), second, inputs, leading)

    def __add__(self, other: "Moments") -> "Moments":
        return jax.tree.map(jnp.add, self, other)

    @property
    def squares(self) -> jax.Array:
        """The sums of squares, ``(*leading, inputs)``; of Gram matrices their diagonals."""
        return self.second if self.second.ndim == self.first.ndim else jnp.diagonal(self.second, axis1=-2, axis2=-1)

    @property
    def mean(self) -> jax.Array:
        """The mean row, ``(*leading, inputs)``; 0 where there were none, as for an expert that nothing goes to."""
        return self.first / jnp.maximum(self.rows, 1)[..., None]

    @property
    def norm(self) -> jax.Array:
        """The norm of every input over all rows, ``(*leading, inputs)``, by which Wanda weighs weights."""
        return jnp.sqrt(self.squares)

    @property
    def variance(self) -> jax.Array:
        """The variance of every input, ``(*leading, inputs)``, not below 0; 0 where there were no rows."""
        return jnp.maximum(self.squares / jnp.maximum(self.rows, 1)[..., None] - jnp.square(self.mean), 0)


@dataclasses.dataclass(frozen=True)
class Statistic(_OfInputs):
    """Sums of a caller's function of the rows that a leaf was multiplied by; those of two batches add up by ``+``.

    Attributes:
      rows: ``(*leading,)``, float32: the number of rows.
      value: ``(*leading, inputs)``: the sums of what the function gave.
      inputs, leading: the axes of the leaf that these are, as in :class:`Moments`.
    """

    rows: jax.Array
    value: jax.Array
    inputs: tuple[int, ...]
    leading: tuple[int, ...]

    @classmethod
    def of_rows(
        cls, rows: jax.Array, inputs: tuple[int, ...], leading: tuple[int, ...], function: Callable
    ) -> "Statistic":
        """Apply the function to rows, ``(*leading, rows, inputs)``.

        Raises:
          ValueError: if it does not return floats of the shape ``(*leading, inputs)``.
        """
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        value, wanted = function(rows), (*rows.shape[:-2], rows.shape[-1])
        if jnp.shape(value) != wanted or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"statistic must make floats (*leading, inputs), here of shape {wanted}, of rows (*leading, rows, "
                f"inputs) of shape {rows.shape}, got {jnp.result_type(value)} of {jnp.shape(value)}"
            )
        return cls(jnp.full(rows.shape[:-2], rows.shape[-2], jnp.float32), jnp.asarray(value), inputs, leading)

    def __add__(self, other: "Statistic") -> "Statistic":
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> jax.Array:
        """The value divided by the number of rows, ``(*leading, inputs)``; 0 where there were none."""
        return self.value / jnp.maximum(self.rows, 1)[..., None]


jax.tree_util.register_dataclass(Moments, data_fields=["rows", "first", "second"], meta_fields=["inputs", "leading"])
jax.tree_util.register_dataclass(Statistic, data_fields=["rows", "value"], meta_fields=["inputs", "leading"])
