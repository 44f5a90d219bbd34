"""A leaf as the matrices that are pruned one by one, and the rule applied to them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.placement import sharding_of
from jaxsparse.post_training.rules import Rule
from jaxsparse.structures import Structure
from jaxsparse.trace.moments import Moments

__all__ = ["Matrices", "Pruned", "part_of", "prune_leaf", "written"]

TOGETHER = 1 << 24  # entries of the Gram matrices of a stack that are worked on at once


class Matrices(NamedTuple):
    """How a leaf is seen as matrices: (leading..., inputs, outputs).

    Attributes:
      shape: of the leaf.
      inputs: its axes that the inputs are, the last varies fastest.
      leading: its axes of stacked layers and experts, and for a grouped convolution its outputs.
      sizes: the number of matrices along each leading axis, which divides its size.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    leading: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, moments: Moments, shape: Sequence[int]) -> "Matrices":
        """The matrices that moments are of."""
        return cls(tuple(shape), moments.inputs, moments.leading, moments.rows.shape)

    def _split(self) -> tuple[list[int], list[int]]:
        """The shape with leading axes divided into matrices and the rest, and the order that puts matrices last."""
        number = dict(zip(self.leading, self.sizes, strict=True))
        shape: list[int] = []
        place = []
        for axis, n in enumerate(self.shape):
            place.append(len(shape))
            shape += [number[axis], n // number[axis]] if axis in number else [n]
        first = [*(place[axis] for axis in self.leading), *(place[axis] for axis in self.inputs)]
        return shape, [*first, *(i for i in range(len(shape)) if i not in first)]

    def apart(self, x: jax.Array) -> jax.Array:
        """A leaf as matrices, (leading..., inputs, outputs)."""
        shape, order = self._split()
        inputs = math.prod(self.shape[axis] for axis in self.inputs)
        outputs = math.prod(self.shape) // max(inputs * math.prod(self.sizes), 1)
        return jnp.transpose(x.reshape(shape), order).reshape(*self.sizes, inputs, outputs)

    def together(self, x: jax.Array) -> jax.Array:
        """Undoes :meth:`apart`."""
        shape, order = self._split()
        x = x.reshape([shape[i] for i in order])
        return jnp.transpose(x, sorted(range(len(order)), key=lambda i: order[i])).reshape(self.shape)


class Pruned(NamedTuple):
    """A leaf, or an entry of it, after a rule.

    Attributes:
      leaf: in its own shape and dtype.
      mask: bool.
      damping: (leading...), float32, that was used; 0 by rules that use none.
      silent: (leading...), int32, the number of inputs at which nothing but zeros arrives.
      arrives: a bool scalar, whether the moments are finite.
      finite: a bool scalar, whether all weights are.
    """

    leaf: jax.Array
    mask: jax.Array
    damping: jax.Array
    silent: jax.Array
    arrives: jax.Array
    finite: jax.Array


def part_of(leaf: jax.Array, at: Sequence[tuple[int, int]]) -> jax.Array:
    """An entry of a leaf along some axes, which keep size 1."""
    for axis, i in at:
        leaf = lax.dynamic_slice_in_dim(leaf, i, 1, axis)
    return leaf


def written(leaf: jax.Array, part: jax.Array, at: Sequence[tuple[int, int]]) -> jax.Array:
    """A leaf with another entry, in its memory."""
    starts = dict(at)
    new = _written(leaf, part, [starts.get(axis, 0) for axis in range(leaf.ndim)])
    return _placed(new, leaf)


@functools.partial(jax.jit, donate_argnums=0)
def _written(leaf, part, starts):
    return lax.dynamic_update_slice(leaf, part, starts)


def _placed(x, like):
    sharding = sharding_of(like)
    return x if sharding is None else jax.device_put(x, sharding)


def prune_leaf(
    leaf: jax.Array,
    at: Sequence[tuple[int, int]],
    rule: Rule,
    structure: Structure,
    sparsity: Any,
    moments: Moments | None,
    matrices: Matrices,
) -> Pruned:
    """Prune the matrices of a leaf, or of an entry of it, each by itself.

    Args:
      leaf: floats.
      at: (axis, entry): which entry of the leaf; () for all.
      rule: what prunes a matrix.
      structure: of each matrix.
      sparsity: float32, (leading...), of each matrix.
      moments: of the inputs; None for rules that need nothing.
      matrices: of the entry, whose axes in ``at`` have size 1.

    Returns:
      A :class:`Pruned`, of the entry.

    Raises:
      ValueError: if what the rule returns has other shapes or dtypes than it must.
    """
    axes = tuple(axis for axis, _ in at)
    share = jnp.asarray(sparsity, jnp.float32)
    found = _pruned(leaf, [i for _, i in at], moments, share, axes, rule, structure, matrices)
    if at:
        return found
    return found._replace(leaf=_placed(found.leaf, leaf), mask=_placed(found.mask, leaf))


@functools.partial(jax.jit, static_argnames=("axes", "rule", "structure", "matrices"))
def _pruned(leaf, entries, moments, sparsity, axes, rule, structure, matrices):
    part = part_of(leaf, list(zip(axes, entries, strict=True)))
    kernels = matrices.apart(part).astype(jnp.promote_types(leaf.dtype, jnp.float32))
    of_matrix = functools.partial(_one, rule, structure)
    silent, arrives = jnp.zeros(matrices.sizes, jnp.int32), jnp.ones((), bool)
    if moments is not None:  # those of one matrix have no leading axes
        silent = jnp.sum(moments.squares == 0, -1, dtype=jnp.int32)
        arrives = jnp.all(jnp.isfinite(moments.second))
        moments = Moments(moments.rows, moments.first, moments.second, (0,), ())
    kernels, masks, damping = _each(of_matrix, len(matrices.sizes), (kernels, moments, sparsity))
    kernels = jnp.where(masks, kernels, jnp.zeros_like(kernels)).astype(leaf.dtype)
    finite = jnp.all(jnp.isfinite(kernels))
    return Pruned(matrices.together(kernels), matrices.together(masks), damping, silent, arrives, finite)


def _each(function: Callable, leading: int, args: Any) -> Any:
    """A function of every matrix of a stack with some leading axes: several at once if they are small."""
    if not leading:
        return function(args)
    shape = args[2].shape
    flat = jax.tree.map(lambda x: x.reshape(math.prod(shape), *x.shape[leading:]), args)
    size = max(leaf[0].size for leaf in jax.tree.leaves(flat)) if math.prod(shape) else 1
    outs = lax.map(function, flat, batch_size=max(1, min(math.prod(shape), TOGETHER // max(size, 1))))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), outs)


def _one(rule, structure, args):
    kernel, moments, sparsity = args
    found = (rule.with_damping or rule.prune)(kernel, moments, sparsity, structure)
    if not isinstance(found, tuple) or len(found) != (3 if rule.with_damping else 2):
        raise ValueError(f"rule {rule.name!r} must return (kernel, mask), got {type(found).__name__}")
    new, mask = map(jnp.asarray, found[:2])
    if new.shape != kernel.shape or not _is_float(new) or mask.shape != kernel.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"rule {rule.name!r} must return floats and a bool mask of the shape of its kernel, {kernel.shape}, got "
            f"{new.dtype} of {new.shape} and {mask.dtype} of {mask.shape}"
        )
    damping = jnp.asarray(found[2], jnp.float32) if rule.with_damping else jnp.zeros((), jnp.float32)
    return new.astype(kernel.dtype), mask, damping


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)
