"""Layers as matrices, for rules about each of their outputs. Those that repeat one another are one, in a stack."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import Layout
from jaxsparse.transforms.layers import Column, Layer, Layers

__all__ = ["Matrices", "kept_then_largest", "layout_of", "matrices_of", "to_column"]


class Matrices(NamedTuple):
    """A layer, or several in a stack, as arrays of shape (stack..., places..., inputs, outputs).

    Attributes:
      members: the numbers of the layers.
      weight: floats.
      signal: floats: the gradient or momentum.
      mask: bool.
      stack: how many axes are those of a stack, of the layers or of a leaf.
      view: from an array of the leaf's rank to one of these axes.
      back: from a mask of these axes to the leaf's.
    """

    members: tuple[int, ...]
    weight: jax.Array
    signal: jax.Array
    mask: jax.Array
    stack: int
    view: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]

    @property
    def of_layer(self) -> tuple[int, ...]:
        """The axes of one layer."""
        return tuple(range(self.stack, self.mask.ndim))

    @property
    def of_output(self) -> tuple[int, ...]:
        """The axes of the inputs of one output."""
        return self.of_layer[:-1]

    @property
    def fan_in(self) -> int:
        """The number of inputs of one output, those of all places together."""
        return math.prod(self.mask.shape[axis] for axis in self.of_output)

    @property
    def outputs(self) -> int:
        """The number of outputs of one layer."""
        return self.mask.shape[-1]


def layout_of(layer: Layer) -> Layout:
    """The layout of a layer, that of Flax where none is told."""
    return Layout(inputs=-2, outputs=-1) if layer.layout is None else layer.layout


def matrices_of(layers: Layers) -> list[Matrices]:
    """Layers that keep their shapes, as matrices, in the order of the parts of their columns."""
    found = []
    for stack in layers.stacks:
        at = layout_of(stack.layer).of_rank(stack.layer.mask.ndim - 1)
        inputs, outputs, stacked = (tuple(axis + 1 for axis in axes) for axes in (at.inputs, at.outputs, at.stack))  # type: ignore[union-attr]
        found.append(_matrices(stack.members, stack.layer, Layout(inputs, outputs, (0, *stacked))))
    return found + [_matrices((i,), layers[i], layout_of(layers[i])) for i in layers.single]


def to_column(matrices: Sequence[Matrices], masks: Sequence[jax.Array]) -> Column:
    """Masks of matrices as those of their layers."""
    parts = [one.back(mask) for one, mask in zip(matrices, masks, strict=True)]
    return Column([one.members for one in matrices], parts, [None] * len(parts))


def kept_then_largest(kept: jax.Array, weight: jax.Array, signal: jax.Array) -> jax.Array:
    """Scores of which the largest are the kept weights, by magnitude, and then the others, by that of their signal.

    Those of the others are negative floats that grow with the signal: their bits say how many floats lie between its
    magnitude and infinity.
    """
    dtype = np.promote_types(weight.dtype, signal.dtype)
    integer = jnp.dtype(f"int{8 * dtype.itemsize}")
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), integer)
    size = jnp.abs(signal).astype(dtype)
    below = (infinity - jax.lax.bitcast_convert_type(size, integer)) | jnp.iinfo(integer).min
    others = jnp.where(jnp.isnan(size), size, jax.lax.bitcast_convert_type(below, dtype))
    return jnp.where(kept, jnp.abs(weight).astype(dtype), others)


def _matrices(members: tuple[int, ...], layer: Layer, at: Layout) -> Matrices:
    weight, signal, mask = (at.to_matrices(x) for x in (layer.weight, layer.signal, layer.mask))
    back = functools.partial(at.from_matrices, like=layer.mask)
    return Matrices(members, weight, signal, mask, len(at.stack), at.to_matrices, back)  # type: ignore[arg-type]
