"""What a method keeps or drops as one: the units that a leaf is made of.

A leaf is *prunable* or *dense*. What is kept or dropped as one inside a prunable leaf is
its *structure*: :class:`weight`, :class:`block`, :class:`kernel`, :class:`channel`, or
:class:`n_of_m`, which keeps single weights but so many of each group.

A structure divides a leaf into *units* of one size, its :meth:`Structure.tile`. What is said of units is an
array with one entry for each, of the leaf's rank, so the mask of ``block(64, 64)`` on a matrix of (1024, 512)
is (16, 8): what a block-sparse matrix product takes.

Units are made of inputs and outputs, whichever axes of a leaf they are: see :mod:`jaxsparse.layouts`. A structure by
itself takes the last axis but one for the inputs and the last for the outputs; :func:`leaf_structures` gives every
leaf's structure the layout of that leaf.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import exact_sum
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts, warn_of_guesses
from jaxsparse.selection import count_true, top_k_mask
from jaxsparse.trees import (
    by_pattern,
    is_masked_node,
    is_partial,
    leaf_paths,
)

__all__ = [
    "Structure", "StructureLike", "block", "channel", "check_structure", "check_units", "kernel", "leaf_structures",
    "mask_structures", "n_of_m", "unit_scores", "weight",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Structure:
    """How a leaf divides into units, each of which is kept or dropped as one.

    Attributes:
      score: what a unit ranks by, the "mean" or the "sum" of its weights' absolute values. The units of one leaf are of
        one size and rank alike by both. Where the units of several leaves rank together, the mean asks how large the
        weights of a unit are; the sum how much there is of it, so large units stay longer.
      ragged: what becomes of leaves that do not divide into such units: "warn" takes them by single weights and names
        them all in one warning, "error" names them in a ValueError.
      layout: which axes of the leaf are inputs and outputs; None for the last two. Units of several weights are then
        those of the leaf seen as matrices, see :meth:`jaxsparse.Layout.matrix_shape`.
    """

    score: Literal["mean", "sum"] = "mean"
    ragged: Literal["warn", "error"] = "warn"
    layout: Layout | None = None

    def __post_init__(self) -> None:
        for name, options in (("score", ["mean", "sum"]), ("ragged", ["warn", "error"])):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")

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
        """How many weights a unit has."""
        return math.prod(self.tile(self._seen_shape(shape)))

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many units there are along each axis of a leaf of this shape, or a ValueError if it does not fit.

        The axes are those of the leaf where a unit is a single weight, else those of the leaf seen as matrices.
        """
        if not self.fits(shape):
            raise ValueError(f"{self} does not fit an array of shape {tuple(shape)}")
        if self.unit_size(shape) == 1:
            return tuple(shape)
        seen = self._seen_shape(shape)
        return tuple(length // size for length, size in zip(seen, self.tile(seen), strict=True))

    def units(self, mask: jax.Array) -> jax.Array:
        """Which units are live: those of which any weight is.

        Args:
          mask: bool, of a leaf's shape, which fits.

        Returns:
          bool, of ``unit_shape(mask.shape)``.
        """
        return self._reduced(mask, lambda x, axes: jnp.any(x, axes, keepdims=True))

    def scores(self, leaf: jax.Array) -> jax.Array:
        """What the units rank by: see ``score``.

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
            return jnp.abs(leaf)

        def add(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            odd = jnp.where(jnp.isfinite(x), 0, jnp.abs(x)).astype(jnp.float32)
            return exact_sum(x, axis=axes) + jnp.max(odd, axis=axes, keepdims=True)

        total = self._reduced(leaf, add)
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
            return _merged(apart, like)
        seen = (
            self.layout.to_matrices(like)
            if isinstance(like, jax.Array)
            else jax.ShapeDtypeStruct(self._seen_shape(like.shape), bool)
        )
        return self.layout.from_matrices(_merged(apart, seen), like)

    def holds(self, mask: jax.Array) -> jax.Array:
        """Whether a mask keeps whole units and no parts of any: a bool scalar."""
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
                x = _split(x, axis, tile[axis])
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


@dataclasses.dataclass(frozen=True, repr=False)
class weight(Structure):  # noqa: N801  (lower case, for it is called like the functions that methods are)
    """Every weight by itself."""


@dataclasses.dataclass(frozen=True, repr=False)
class block(Structure):  # noqa: N801
    """Tiles of ``bm`` inputs times ``bn`` outputs.

    Of a convolution (kh, kw, inputs, outputs) each spatial place is tiled by itself; a 1x1 convolution is a matrix.

    Attributes:
      bm: inputs of a tile, int >= 1.
      bn: outputs of a tile, int >= 1.

    Raises:
      ValueError: for sizes below 1, an unknown ``score`` or ``ragged`` (see :class:`Structure`).

    Examples:
      >>> import jax.numpy as jnp
      >>> mask = jnp.zeros((4, 6), bool).at[0, 5].set(True)
      >>> block(2, 3).units(mask).tolist()
      [[False, True], [False, False]]
      >>> block(2, 3).expand(block(2, 3).units(mask), mask)[0].tolist()
      [False, False, False, True, True, True]
    """

    bm: int
    bn: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bm < 1 or self.bn < 1:
            raise ValueError(f"block needs sizes of at least 1, got {self}")

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """1 x ... x bm x bn."""
        return (*(1 for _ in shape[:-2]), self.bm, self.bn)

    def _fits(self, seen: Sequence[int]) -> bool:
        return len(seen) >= 2 and super()._fits(seen)


@dataclasses.dataclass(frozen=True, repr=False)
class kernel(Structure):  # noqa: N801
    """The slice of one input and one output of a convolution: all of its places.

    Given for all leaves at once, it is for convolutions, and matrices go by single weights. Named for a leaf, it takes
    any that has places. Leaves whose layout had to be guessed, and others, raise an error by default,
    ``ragged="error"``.
    """

    ragged: Literal["warn", "error"] = dataclasses.field(default="error", kw_only=True)

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All of the places, one input, one output."""
        return (*(1 for _ in shape[: self._stacked]), *shape[self._stacked : -2], 1, 1)

    def _fits(self, seen: Sequence[int]) -> bool:
        return len(seen) >= 3 + self._stacked


@dataclasses.dataclass(frozen=True, repr=False)
class channel(Structure):  # noqa: N801
    """The filter of one output: all of its places and inputs.

    Given for all leaves at once, it is for convolutions, and matrices go by single weights: the last one holds a
    network's own outputs. Named for a leaf, it takes matrices too. Leaves whose layout had to be guessed, and others,
    raise an error by default, ``ragged="error"``.
    """

    ragged: Literal["warn", "error"] = dataclasses.field(default="error", kw_only=True)

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All of the places and inputs, one output."""
        return (*(1 for _ in shape[: self._stacked]), *shape[self._stacked : -1], 1)

    def _fits(self, seen: Sequence[int]) -> bool:
        return len(seen) >= 2 + self._stacked


@dataclasses.dataclass(frozen=True, repr=False)
class n_of_m(Structure):  # noqa: N801
    """Of every ``m`` consecutive weights along the inputs ``n`` stay, as in 2:4 sparsity.

    Its units are single weights; what it adds is the number that stays of each group.

    Attributes:
      n: how many stay, from 1 to m.
      m: how many there are in a group.
      axis: what groups lie along: the "inputs", which sparse matrix hardware sums over, the "outputs", or an axis of
        the leaf by its number.

    Raises:
      ValueError: for numbers that are none of these.

    Examples:
      >>> import jax.numpy as jnp
      >>> n_of_m(2, 4).top(jnp.array([[0.1], [3.0], [2.0], [0.5]])).tolist()
      [[False], [True], [True], [False]]
    """

    n: int
    m: int
    axis: Literal["inputs", "outputs"] | int = dataclasses.field(default="inputs", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in ("inputs", "outputs") and type(self.axis) is not int:
            raise ValueError(f'axis must be "inputs", "outputs" or the number of an axis, got {self.axis!r}')
        if not 1 <= self.n <= self.m:
            raise ValueError(f"n_of_m needs 1 <= n <= m, got {self}")

    def _fits(self, seen: Sequence[int]) -> bool:
        axis = self._axis(len(seen))
        return len(seen) >= 2 and 0 <= axis < len(seen) and seen[axis] % self.m == 0

    def top(
        self, scores: jax.Array, n: ArrayLike | None = None, *, where: jax.Array | None = None, absolute: bool = False
    ) -> jax.Array:
        """Marks the largest of every group.

        Args:
          scores: floats of a leaf's shape.
          n: how many, an integer or one for each group, as :meth:`counts` has them; default ``self.n``.
          where: bool, the shape of ``scores``: only these may be marked.
          absolute: rank by absolute value.

        Returns:
          A bool array of the leaf's shape.
        """
        groups, axis = self._grouped(scores)
        where = None if where is None else self._grouped(where)[0]
        axes = tuple(other for other in range(groups.ndim) if other != axis + 1)
        marked = top_k_mask(groups, self.n if n is None else n, where=where, absolute=absolute, axis=axes)
        if not self._by_layout:
            return _merged(marked, scores)
        return self.layout.from_matrices(_merged(marked, self.layout.to_matrices(scores)), scores)  # type: ignore[union-attr]

    def counts(self, mask: jax.Array) -> jax.Array:
        """How many weights each group keeps, int32: of shape (..., inputs / m, outputs)."""
        groups, axis = self._grouped(mask)
        return jnp.squeeze(count_true(groups, (axis + 1,)), axis + 1)

    def holds(self, mask: jax.Array) -> jax.Array:
        """Whether a mask keeps exactly n of every group: a bool scalar."""
        return jnp.all(self.counts(mask) == self.n)

    @property
    def _by_layout(self) -> bool:
        """Whether groups lie along an axis of the leaf seen as matrices."""
        return self.layout is not None and isinstance(self.axis, str)

    def _seen_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return super()._seen_shape(shape) if self._by_layout else tuple(shape)

    def _axis(self, rank: int) -> int:
        """The axis along which groups lie; negative, or the rank and more, where there is none."""
        if isinstance(self.axis, str):
            return rank - (2 if self.axis == "inputs" else 1)
        return self.axis + rank if self.axis < 0 else self.axis

    def _grouped(self, x: jax.Array) -> tuple[jax.Array, int]:
        """An array with the axis along which groups lie split in two, (groups, m), and the first of these two."""
        self.unit_shape(x.shape)  # raises if it does not fit
        seen = self.layout.to_matrices(x) if self._by_layout else x  # type: ignore[union-attr]
        axis = self._axis(seen.ndim)
        return _split(seen, axis, self.m), axis


StructureLike: TypeAlias = str | Structure | Mapping[str, str | Structure]
_BY_NAME: dict[str, type[Structure]] = {"weight": weight, "kernel": kernel, "channel": channel}
_NAMES = ("weight", "kernel", "channel", "block", "n_of_m")


def check_structure(structure: StructureLike, known: Sequence[str] = _NAMES) -> None:
    """Raises a ValueError for a structure, or one of a mapping's, that is none or that a method does not take.

    Args:
      structure: "weight", "kernel", "channel", a :class:`Structure`, or a mapping from path to these.
      known: the names of those that the method takes.
    """
    for value in structure.values() if isinstance(structure, Mapping) else [structure]:
        name = type(value).__name__ if isinstance(value, Structure) else value if value in _BY_NAME else None
        if name not in known:
            calls = " or made by jaxsparse.block, jaxsparse.n_of_m" if "block" in known else ""
            raise ValueError(f"structure must be one of {[k for k in known if k in _BY_NAME]}{calls}, got {value!r}")


def leaf_structures(
    structure: StructureLike, params: Any, prunable: Any, *, layout: LayoutLike = None, quiet: bool = False
) -> Any:
    """The structure of every prunable leaf.

    Args:
      structure: one for all leaves, or a mapping from patterns of paths (:func:`jaxsparse.trees.matching`) to
        structures, of which the first match wins; leaves that it does not name go by single weights. The strings stand
        for ``weight()``, ``kernel()`` and ``channel()``.
      params: a pytree of arrays.
      prunable: a bool for every leaf, like ``params``; see :func:`jaxsparse.prunable.prunable_leaves`.
      layout: which axes of leaves are inputs and outputs, where the rules of :func:`jaxsparse.layouts.leaf_layouts` do
        not find it.
      quiet: do not warn of the leaves that go by single weights because they do not fit, or whose layout is a guess.

    Returns:
      A :class:`Structure` for every prunable leaf, which fits it; ``optax.MaskedNode()`` for the others.

    Raises:
      ValueError: for an unknown structure, a pattern that matches no prunable leaf, and for leaves that do not fit one
        with ``ragged="error"``.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 2, 8)), "fc": jnp.ones((8, 10))}
      >>> leaf_structures("kernel", params, {"conv": True, "fc": True})
      {'conv': kernel(), 'fc': weight()}
    """
    check_structure(structure)
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_paths(params)
    flags = dict(zip(names, treedef.flatten_up_to(prunable), strict=True))
    by_leaf = isinstance(structure, Mapping)
    chosen = [name for name in names if flags[name]]
    if isinstance(structure, Mapping):
        given_to = by_pattern(structure, chosen, "structure", partial=is_partial(params))
    else:
        given_to = dict.fromkeys(chosen, structure)
    if all(given == "weight" or isinstance(given, weight) for given in given_to.values()):
        return treedef.unflatten([weight() if flags[name] else optax.MaskedNode() for name in names])
    layouts = leaf_layouts(params, layout)
    found: list[Any] = []
    matrices: list[str] = []  # left to single weights by a structure of convolutions
    misfits: dict[Any, list[str]] = {}  # what was given -> the leaves that it does not fit
    guesses: dict[str, Layout] = {}
    for name, leaf in zip(names, leaves, strict=True):
        given: Any = given_to.get(name, "weight")
        if not flags[name] or given == "weight" or isinstance(given, weight):
            found.append(weight() if flags[name] else optax.MaskedNode())
            continue
        at = layouts[name]
        unit = dataclasses.replace(_made(given), layout=None if at.is_plain(len(leaf.shape)) else at)
        of_convolutions = isinstance(unit, kernel | channel) and not by_leaf
        known, places = at.is_matrix and not at.guess, at.places(len(leaf.shape))
        if unit.fits(leaf.shape) and (not of_convolutions or (known and places)):
            found.append(unit)
            if not (isinstance(unit, n_of_m) and isinstance(unit.axis, int)):
                guesses[name] = at
        else:
            found.append(weight())
            which = matrices if of_convolutions and known and not places else misfits.setdefault(given, [])
            which.append(f"{name} of shape {tuple(leaf.shape)}" + _seen(unit, leaf))
    told = [f"structure {given!r} does not fit {', '.join(which)}" for given, which in misfits.items()]
    if any(_made(given).ragged == "error" for given in misfits):
        raise ValueError(
            "; ".join(told) + '. Say it leaf by leaf, structure={"path": ...}, say which axes are inputs and outputs, '
            'layout={"path": jaxsparse.Layout(...)}, leave leaves out by prunable=, or let those that do not fit go by '
            'single weights, ragged="warn"'
        )
    if matrices and not misfits and all(isinstance(unit, weight) or is_masked_node(unit) for unit in found):
        told = [f"structure {structure!r} is for convolutions unless it names a leaf, and there are only "
                + ", ".join(matrices)]  # fmt: skip
    if told and not quiet:
        warnings.warn("; ".join(told) + ": they go by single weights", UserWarning, stacklevel=2)
    if not quiet:
        warn_of_guesses(guesses, f"structure {structure!r}")
    return treedef.unflatten(found)


def _made(given: str | Structure) -> Structure:
    return _BY_NAME[given]() if isinstance(given, str) else given


def _seen(unit: Structure, leaf: Any) -> str:
    return "" if unit.layout is None else f", seen as matrices {unit.layout.matrix_shape(leaf.shape)}"


def mask_structures(
    structure: StructureLike, params: Any, masks: Any, *, layout: LayoutLike = None, quiet: bool = False
) -> Any:
    """As :func:`leaf_structures`, for the leaves that have a mask in ``masks``, a state's."""
    treedef = jax.tree.structure(params)
    sparse = [not is_masked_node(mask) for mask in treedef.flatten_up_to(masks)]
    return leaf_structures(structure, params, treedef.unflatten(sparse), layout=layout, quiet=quiet)


def check_units(masks: Any, structures: Any, what: str = "masks") -> None:
    """Raises a ValueError that names the leaves of which masks keep parts of units, or not n of every m.

    Args:
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves. Traced ones pass unseen.
      structures: like ``masks``, of :func:`leaf_structures`.
      what: what to call them in the error.
    """
    flat = zip(leaf_paths(masks), jax.tree.leaves(masks), jax.tree.leaves(structures), strict=True)
    bad = []
    with jax.ensure_compile_time_eval():  # also where ``init`` is jitted
        for name, mask, unit in flat:
            if isinstance(mask, jax.core.Tracer) or isinstance(unit, weight):
                continue
            if not bool(unit.holds(jnp.asarray(mask))):
                bad.append(f"{name} of shape {mask.shape} (structure {unit})")
    if bad:
        raise ValueError(f"{what} must keep whole units, and n of every m, but do not in {', '.join(bad)}")


def unit_scores(structure: Structure, leaf: jax.Array) -> jax.Array:
    """What the units of a leaf rank by, in absolute value: their scores; a leaf of single weights itself, no copy."""
    return leaf if structure.unit_size(leaf.shape) == 1 else structure.scores(leaf)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
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


def _merged(x: jax.Array, like: Any) -> jax.Array:
    """``x`` in the shape of ``like``, and placed like it where a mesh asks for explicit shardings."""
    sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else None
    if sharding is None or not (any(sharding.spec) or any(jax.typeof(x).sharding.spec)):
        return x.reshape(like.shape)
    return jax.lax.reshape(x, like.shape, out_sharding=sharding)
