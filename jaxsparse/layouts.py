"""Layouts: the axes of a leaf that are inputs, outputs, spatial axes of a convolution, and stacked layers.

A leaf is a matrix (inputs x outputs), one for each place of a convolution, and all of that once for each layer of a
stack (``nn.scan``, ``vmap``, ``layer_stack``). A bias or the gain of a normalisation has no inputs: it is no matrix,
and stays dense by default. Structures, allocations and inspection count in these axes.

What a leaf is cannot be read off its rank: (12, 64, 64) may be twelve layers, a convolution over twelve places, or
attention with twelve heads. :func:`leaf_layouts` decides by the names and shapes of a leaf and of those beside it, as
Flax, Haiku and Equinox have them. Where that leaves a doubt, whoever uses the layout warns and names the leaf, and
``layout=`` settles it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layout_rules import Rules, described
from jaxsparse.trees import by_pattern, is_partial, listed
from jaxsparse.user_warnings import warn

__all__ = ["Layout", "LayoutLike", "empty_layers", "leaf_layouts", "warn_of_guesses"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a leaf that are inputs, outputs and stacked layers; the others are spatial axes of a convolution.

    Attributes:
      inputs: an axis, or several that count as one, such as (heads, dim) of attention's output projection. None at all,
        ``()``, says that the leaf is no matrix: a bias or a gain, dense by default.
      outputs: an axis, or several that count as one.
      stack: the axes along which layers are stacked.
      guess: what is in doubt, empty if nothing is.

    Raises:
      ValueError: for an axis that is named twice, or inputs without outputs.

    Examples:
      >>> query = Layout(inputs=0, outputs=(1, 2))
      >>> query.matrix_shape((64, 4, 16))
      (64, 64)
      >>> Layout(inputs=-2, outputs=-1, stack=0).matrix_shape((12, 3, 3, 16, 32))
      (12, 3, 3, 16, 32)
    """

    inputs: int | tuple[int, ...]
    outputs: int | tuple[int, ...]
    stack: int | tuple[int, ...] = ()
    guess: str = dataclasses.field(default="", compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "stack"):
            axes = getattr(self, name)
            axes = tuple(axes) if isinstance(axes, tuple | list) else (axes,)
            if not all(isinstance(axis, int | np.integer) and not isinstance(axis, bool) for axis in axes):
                raise ValueError(f"a layout names axes by ints or tuples of ints, got {name}={getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(map(int, axes)))
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"a layout names each axis once, got {self}")
        if self.inputs and not self.outputs:
            raise ValueError(f"a layout with inputs has outputs too, got {self}")

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes that are named."""
        return (*self.stack, *self.inputs, *self.outputs)  # type: ignore[misc]

    @property
    def is_matrix(self) -> bool:
        """Whether the leaf has inputs, unlike a bias or a gain."""
        return bool(self.inputs)

    @property
    def head(self) -> int | None:
        """The last but one of several axes that are inputs or outputs, that of attention's heads; None without them."""
        axes = next((axes for axes in (self.outputs, self.inputs) if len(axes) > 1), None)  # type: ignore[arg-type]
        return None if axes is None else axes[-2]  # type: ignore[index]

    def is_plain(self, rank: int) -> bool:
        """Whether a leaf of this rank has the axes of a Flax layer: spatial axes, inputs, outputs."""
        return not self.stack and (not self.inputs or (self.inputs, self.outputs) == ((rank - 2,), (rank - 1,)))

    def of_rank(self, rank: int) -> "Layout":
        """The layout with axes counted from the front, for a leaf of this rank.

        Raises:
          ValueError: for axes that a leaf of this rank does not have.
        """
        if not all(-rank <= axis < rank for axis in self.axes):
            raise ValueError(f"{self} names axes that a leaf of rank {rank} does not have")
        front = [tuple(axis % rank for axis in axes) for axes in (self.inputs, self.outputs, self.stack)]  # type: ignore[union-attr]
        return Layout(*front, guess=self.guess)

    def places(self, rank: int) -> tuple[int, ...]:
        """The spatial axes of a convolution, in order."""
        named = self.of_rank(rank).axes
        return tuple(axis for axis in range(rank) if axis not in named)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a leaf as matrices: (stack..., places..., inputs, outputs)."""
        order, sizes = self._view(len(shape))
        ends = iter(shape[axis] for axis in order)
        return tuple(math.prod(next(ends) for _ in range(size)) for size in sizes)

    def to_matrices(self, x: Any) -> Any:
        """Reshapes a leaf to matrices, (stack..., places..., inputs, outputs), without a copy if it has this order."""
        order, sizes = self._view(x.ndim)
        moved = x if order == tuple(range(x.ndim)) else x.transpose(order)
        shape = self.matrix_shape(x.shape)
        if moved.shape == shape or isinstance(x, np.ndarray):
            return moved.reshape(shape)
        spec = jax.typeof(moved).sharding.spec
        if not any(spec):
            return moved.reshape(shape)
        spec, merged, start = [*spec, *[None] * (x.ndim - len(spec))], [], 0
        for size in sizes:  # merged axes stay sharded if only the first of them is
            merged.append(None if any(spec[start + 1 : start + size]) else spec[start])
            start += size
        sharding = jax.typeof(moved).sharding.update(spec=jax.sharding.PartitionSpec(*merged))
        return jax.lax.reshape(moved, shape, out_sharding=sharding)

    def from_matrices(self, x: jax.Array, like: Any) -> jax.Array:
        """Undoes :meth:`to_matrices`, for an array of the shape that it returns.

        Args:
          x: an array of ``matrix_shape(like.shape)``.
          like: the leaf, or anything else of its shape; an array's sharding is taken too.
        """
        rank = len(like.shape)
        order, _ = self._view(rank)
        shape = tuple(like.shape[axis] for axis in order)
        if x.shape != shape:
            sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else None
            if sharding is None or not (any(sharding.spec) or any(jax.typeof(x).sharding.spec)):
                x = x.reshape(shape)
            else:
                spec = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
                moved = jax.sharding.PartitionSpec(*(spec[axis] for axis in order))
                x = jax.lax.reshape(x, shape, out_sharding=sharding.update(spec=moved))
        if order == tuple(range(rank)):
            return x
        return jnp.transpose(x, [order.index(axis) for axis in range(rank)])

    def any_by_output(self, mask: np.ndarray) -> np.ndarray:
        """The outputs, per layer of a stack, with any entry set: (stack..., outputs)."""
        return self._any(mask, -1)

    def any_by_input(self, mask: np.ndarray) -> np.ndarray:
        """The inputs, per layer of a stack, with any entry set: (stack..., inputs)."""
        return self._any(mask, -2)

    def _any(self, mask: np.ndarray, axis: int) -> np.ndarray:
        seen = self.to_matrices(mask)
        kept = (*range(len(self.stack)), axis % seen.ndim)  # type: ignore[arg-type]
        return seen.any(axis=tuple(other for other in range(seen.ndim) if other not in kept))

    def _view(self, rank: int) -> tuple[tuple[int, ...], list[int]]:
        """The order of axes that puts matrices last, and how many of them make up each axis of the view."""
        at = self.of_rank(rank)
        places = at.places(rank)
        parts: list[Any] = [(axis,) for axis in (*at.stack, *places)]  # type: ignore[misc]
        parts += [axes for axes in (at.inputs, at.outputs) if axes]
        return tuple(axis for part in parts for axis in part), [len(part) for part in parts]


LayoutLike: TypeAlias = Mapping[str, Layout] | Sequence[tuple[str, Layout]] | None


def leaf_layouts(params: Any, layout: LayoutLike = None) -> dict[str, Layout]:
    """The layout of every leaf, by path.

    By name and shape, of a leaf and of those beside it:

    * no matrices are biases, scales, offsets, gammas and betas, the ``b`` of a ``w``, what is called a norm or is the
      gain of a module called so, what has the shape of the bias beside it, and single tokens (``cls``);
    * a leading axis is a stack where biases and gains in the same module, or around it, have it too, or where a name
      says so (scan, vmap, stack, ensemble, experts);
    * ``weight`` has outputs first, as in Equinox and PyTorch, other names inputs first, as in Flax and Haiku, unless
      the size of the bias says otherwise (transposed convolutions); embeddings are (entries, features);
    * what is called query, key or value (q, wk, v_proj, ...) and has three axes is (inputs, heads, dim), the output of
      attention (o, out, wo, ...) (heads, dim, outputs), if sizes agree; other kernels of three axes are as their bias
      says.

    In part of a tree, as a link sees it under ``optax.masked`` or ``optax.partition``, there is less to tell by.

    Args:
      params: a pytree of arrays, or of their shapes.
      layout: pattern -> :class:`Layout` (see :func:`jaxsparse.trees.matching`), the first match wins; for leaves that
        it does not name the rules above hold.

    Returns:
      path -> :class:`Layout`, axes counted from the front.

    Raises:
      ValueError: for a pattern that matches nothing, or a layout that does not fit its leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"attn": {"query": jnp.ones((64, 4, 16)), "bias": jnp.ones((4, 16))}, "w": jnp.ones((6, 8, 8))}
      >>> leaf_layouts(params, {"w": Layout(1, 2, stack=0)})["attn/query"]
      Layout(inputs=(0,), outputs=(1, 2), stack=())
    """
    leaves, partial = described(params), is_partial(params)
    rules = Rules(leaves, partial)
    if isinstance(layout, Layout):
        raise ValueError(f'layout names leaves: {{"path or pattern": jaxsparse.Layout(...)}}, got {layout!r}')
    given = by_pattern(layout, list(leaves), "layout", partial=partial) if layout else {}
    found = {}
    for path, leaf in leaves.items():
        if path in given:
            if not isinstance(given[path], Layout):
                raise ValueError(f"layout of {path} must be a jaxsparse.Layout, got {given[path]!r}")
            try:
                found[path] = given[path].of_rank(len(leaf.shape))
            except ValueError as error:
                raise ValueError(
                    f"layout of {path} of shape {leaf.shape}: {error}. A pattern may have to be narrower, such as "
                    "'*/kernel'"
                ) from None
        else:
            inputs, outputs, stack, guess = rules.axes(leaf)
            found[path] = Layout(inputs, outputs, stack, guess=guess)
    return found


def warn_of_guesses(layouts: Mapping[str, Layout], why: str) -> None:
    """Warns of leaves whose layout is a guess, by name.

    Args:
      layouts: path -> layout, of the leaves for which it matters.
      why: what the layout is needed for.
    """
    doubts = [f"{path} ({layout.guess})" for path, layout in layouts.items() if layout.guess]
    if doubts:
        warn(
            f"{why} needs the inputs and outputs of leaves, and these had to be guessed: {', '.join(doubts)}. Say it "
            'by layout={"path or pattern": jaxsparse.Layout(inputs=..., outputs=..., stack=...)}',
        )


def empty_layers(masks: Mapping[str, Any], layouts: Mapping[str, Layout]) -> str:
    """A sentence that names the layers that keep nothing, of stacks that keep something; empty if there is none.

    Nothing is known of masks that are traced, or that other hosts have parts of.
    """
    found = []
    for path, mask in masks.items():
        stack: tuple = layouts[path].stack if path in layouts else ()  # type: ignore[assignment]
        if not stack or isinstance(mask, jax.core.Tracer) or not getattr(mask, "is_fully_addressable", True):
            continue
        left = np.asarray(mask.any(axis=tuple(i for i in range(mask.ndim) if i not in stack)))
        if left.any():
            found += [f"layer {', '.join(map(str, at))} of {path}" for at in np.argwhere(~left).tolist()]
    if not found:
        return ""
    return (
        f"no weight is left in {listed(found)}, so nothing passes there. The layers of a stack count as one: they "
        'share a budget and are ranked together. Prune less, or each output by itself: scope="output" of '
        "magnitude_pruning, per_output=True of score_masks"
    )
