"""The base class of structures: how a leaf divides into units."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.allocation import exact_sum
from jaxsparse.layouts import Layout
from jaxsparse.selection import top_k_mask

__all__ = ["Structure", "unit_scores"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Structure:
    """A division of leaves into units, each of which is kept or dropped as one.

    Attributes:
      score: what a unit ranks by, the "mean" or the "sum" of its weights' absolute values. The units of one leaf are of
        one size and rank alike by both. Where the units of several leaves rank together, the mean asks how large the
        weights of a unit are; the sum how much there is of it, so large units stay longer.
      ragged: what becomes of leaves that do not divide into such units: "warn" takes them by single weights and names
        them all in one warning, "error" names them in a ValueError.
      layout: which axes of the leaf are inputs and outputs; None for the last two. Units of several weights are then
        those of the leaf seen as matrices, see :meth:`jaxsparse.Layout.matrix_shape`.
    """

    # What methods may ask of a structure.
    has_sign: ClassVar[bool] = False  # units are single weights, of which there are negative ones
    splits_outputs: ClassVar[bool] = True  # an output has several units, so it can be given a share of what grows
    positional: ClassVar[bool] = True  # units depend on where in its leaf a weight is
    exchanges: ClassVar[bool] = True  # how many units a leaf keeps is free: one may give some of its own to another

    score: Literal["mean", "sum"] = "mean"
    ragged: Literal["warn", "error"] = "warn"
    layout: Layout | None = None

    def __post_init__(self) -> None:
        for name, options in (("score", ["mean", "sum"]), ("ragged", ["warn", "error"])):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")

    def _whole(self, *names: str) -> None:
        """Make sizes Python's ints; a ValueError for numbers that are not whole."""
        for name in names:
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise ValueError(f"{type(self).__name__} needs sizes that are ints, got {self}") from None

    def __repr__(self) -> str:
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        words = [repr(value) for field, value in fields if not field.kw_only]
        words += [f"{field.name}={value!r}" for field, value in fields if field.kw_only and value != field.default]
        return f"{type(self).__name__}({', '.join(words)})"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a leaf of this shape divides into such units."""
        return self._fits(self._seen_shape(shape))

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a unit of a leaf that, seen as matrices, has this shape; of the same rank."""
        return (1,) * len(shape)

    def unit_size(self, shape: Sequence[int]) -> int:
        """The number of weights of a unit, at least 1, also in a leaf without weights, which has no units."""
        return math.prod(max(size, 1) for size in self.tile(self._seen_shape(shape)))

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The number of units along each axis of a leaf of this shape; a ValueError if it does not fit.

        The axes are those of the leaf where a unit is a single weight, else those of the leaf seen as matrices.
        """
        if not self.fits(shape):
            raise ValueError(f"{self} does not fit an array of shape {tuple(shape)}")
        if self.unit_size(shape) == 1:
            return tuple(shape)
        seen = self._seen_shape(shape)
        return tuple(length // max(size, 1) for length, size in zip(seen, self.tile(seen), strict=True))

    def units(self, mask: jax.Array) -> jax.Array:
        """The live units: those with any live weight.

        Args:
          mask: bool, of a leaf's shape, which fits.

        Returns:
          bool, of ``unit_shape(mask.shape)``.
        """
        return self._reduced(mask, lambda x, axes: jnp.any(x, axes, keepdims=True))

    def scores(self, leaf: jax.Array, *, signed: bool = False) -> jax.Array:
        """The scores that the units rank by, see ``score``; with ``signed``, the mean or sum of the values as they are.

        The sums have the same bits in every layout, as :func:`jaxsparse.allocation.exact_sum` has them: terms are
        rounded to 2**-22 of the leaf's largest. A unit with NaN in it has the score NaN, one with infinity infinity.

        Args:
          leaf: floats, of a shape that fits.

        Returns:
          Floats of ``unit_shape(leaf.shape)``: float32, or the dtype of the leaf where a unit is a single weight.
        """
        self.unit_shape(leaf.shape)  # raises if it does not fit
        size = self.unit_size(leaf.shape)
        if size == 1:
            return leaf if signed else jnp.abs(leaf)

        def add(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            odd = jnp.where(jnp.isfinite(x), 0, jnp.abs(x)).astype(jnp.float32)
            return exact_sum(x, axis=axes) + jnp.max(odd, axis=axes, keepdims=True)

        def add_signed(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return add(jnp.maximum(x, 0), axes) - add(jnp.minimum(x, 0), axes)

        total = self._reduced(leaf, add_signed if signed else add)
        return total if self.score == "sum" else total / size

    def expand(self, units: jax.Array, like: Any) -> jax.Array:
        """Gives every weight the value of its unit: the inverse of :meth:`units`.

        Args:
          units: an array of ``unit_shape(like.shape)``, of any dtype.
          like: the leaf, or anything else of its shape; an array's sharding is taken too.

        Returns:
          An array of the leaf's shape.
        """
        counts, tile = self.unit_shape(like.shape), self.tile(self._seen_shape(like.shape))
        if units.shape != counts:
            raise ValueError(f"{self} has units of shape {counts} in an array of {like.shape}, got {units.shape}")
        if max(tile, default=1) == 1:
            return units
        apart = jnp.expand_dims(units, range(1, 2 * len(counts), 2))
        apart = jnp.broadcast_to(apart, [n for pair in zip(counts, tile, strict=True) for n in pair])
        if self.layout is None:
            return merged(apart, like)
        seen = (
            self.layout.to_matrices(like)
            if isinstance(like, jax.Array)
            else jax.ShapeDtypeStruct(self._seen_shape(like.shape), bool)
        )
        return self.layout.from_matrices(merged(apart, seen), like)

    def axes(self, rank: int) -> tuple[int, ...]:
        """The axes of a leaf of this rank along which a unit extends over the whole leaf; () for single weights."""
        raise ValueError(f"a unit of {self} does not extend over whole axes")

    def reserved(self, scores: jax.Array, mask: jax.Array, *, absolute: bool = True) -> jax.Array | None:
        """The weights that always stay: bool of the leaf's shape, part of ``mask``; None if all may go."""
        del scores, mask, absolute
        return None

    def grow(self, scores: jax.Array, before: jax.Array, survivors: jax.Array, gain: ArrayLike) -> jax.Array:
        """Adds a number of units to the survivors: those of the others with the largest scores.

        Args:
          scores: floats of the units' shape, ranked by absolute value.
          before: bool of the units' shape: the mask that lost some.
          survivors: bool of the units' shape: what it kept.
          gain: how many units to add, an integer. (:class:`n_of_m` adds to every group what it lost.)
        """
        del before
        return survivors | top_k_mask(scores, gain, where=~survivors, absolute=True)

    def holds(self, mask: jax.Array) -> jax.Array:
        """Whether a mask keeps whole units only, a bool scalar."""
        return jnp.all(self.expand(self.units(mask), mask) == mask)

    def _reduced(self, x: jax.Array, reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> jax.Array:
        """``reduce(x, axes)``, which keeps the axes, over each unit, by reshapes alone."""
        counts, tile = self.unit_shape(x.shape), self.tile(self._seen_shape(x.shape))
        if max(tile, default=1) == 1:
            return x
        x = x if self.layout is None else self.layout.to_matrices(x)
        reduced: list[int] = []
        split: list[int] = []
        for axis in reversed(range(x.ndim)):
            if tile[axis] > 1 and counts[axis] == 1:
                reduced.append(axis)
            elif tile[axis] > 1:
                x = split_axis(x, axis, tile[axis])
                reduced, split = ([axis + 1, *(i + 1 for i in axes)] for axes in (reduced, split))
        return jnp.squeeze(reduce(x, tuple(sorted(reduced))), tuple(split))

    def _fits(self, seen: Sequence[int]) -> bool:
        """Whether a leaf that, seen as matrices, has this shape divides into such units."""
        return all(length % size == 0 for length, size in zip(seen, self.tile(seen), strict=True))

    def _seen_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape) if self.layout is None else self.layout.matrix_shape(shape)

    @property
    def _stacked(self) -> int:
        """How many of the axes of the leaf seen as matrices are stacked layers, the first ones."""
        return 0 if self.layout is None else len(self.layout.stack)  # type: ignore[arg-type]


def unit_scores(structure: Structure, leaf: jax.Array, *, signed: bool = False) -> jax.Array:
    """The scores of the units of a leaf, absolute unless signed; for single weights the leaf itself, no copy."""
    return leaf if structure.unit_size(leaf.shape) == 1 else structure.scores(leaf, signed=signed)


def split_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Divides an axis in two, (length / size, size).

    Where a mesh asks for explicit shardings, a sharded axis stays so if no unit lies on two devices, and is gathered
    if one does.
    """
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x.reshape(shape)
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    if sharding.shard_shape(x.shape)[axis] % size:
        spec[axis] = None
    spec.insert(axis + 1, None)
    return jax.lax.reshape(x, shape, out_sharding=sharding.update(spec=jax.sharding.PartitionSpec(*spec)))


def merged(x: jax.Array, like: Any) -> jax.Array:
    """``x`` in the shape of ``like``, and placed like it where a mesh asks for explicit shardings."""
    sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else None
    if sharding is None or not (any(sharding.spec) or any(jax.typeof(x).sharding.spec)):
        return x.reshape(like.shape)
    return jax.lax.reshape(x, like.shape, out_sharding=sharding)
