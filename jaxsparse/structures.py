"""Which parts of a network a method may drop: which leaves, and what unit within a leaf.

A leaf is *prunable* or *dense*. What is kept or dropped as one inside a prunable leaf is
its *structure*: :class:`weight`, :class:`block`, :class:`kernel`, :class:`channel`, or
:class:`n_of_m`, which keeps single weights but so many of each group.

A structure divides a leaf into *units* of one size, its :meth:`Structure.tile`. What is said of units is an
array of the leaf's rank with one entry for each, so the mask of ``block(64, 64)`` on a matrix of (1024, 512)
is (16, 8): what a block-sparse matrix product takes.

Inputs are the last axis of a leaf but one and outputs the last, as Flax and Haiku have them. Equinox has the outputs
first: there a "channel" is an input, and n of m are counted along the outputs.
"""

import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import exact_sum
from jaxsparse.selection import count_true, top_k_mask

__all__ = [
    "Prunable", "Structure", "StructureLike", "align", "all_but", "as_array", "block", "by_path", "by_plain_path",
    "channel", "check_structure", "check_units", "is_function", "is_masked_node", "kernel", "leaf_paths",
    "leaf_structures", "mask_structures", "n_of_m", "natural_order", "path_name", "plain_path",
    "prunable_by_default", "prunable_leaves", "unit_scores", "weight",
]  # fmt: skip

logger = logging.getLogger("jaxsparse")

# What wrappers of leaves are called (flax.nnx); the name of the leaf is the one before.
_WRAPPER_NAMES = {"value", "raw_value"}


@dataclasses.dataclass(frozen=True)
class Prunable:
    """Chooses the leaves that a method may prune by a predicate on path and leaf.

    Not a bare function, because :func:`optax.inject_hyperparams` takes every
    callable argument for a schedule.

    Attributes:
      predicate: called with the path of a leaf, such as ``"fc1/kernel"``, and the
        leaf; returns whether it may be pruned.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": {"kernel": jnp.ones((4, 3))}, "fc2": {"kernel": jnp.ones((3, 2))}}
      >>> prunable_leaves(params, Prunable(lambda path, leaf: not path.startswith("fc2")))
      {'fc1': {'kernel': True}, 'fc2': {'kernel': False}}
    """

    predicate: Callable[[str, Any], bool]


@dataclasses.dataclass(frozen=True)
class _AllBut(Prunable):
    paths: tuple[str, ...] = ()


def all_but(*paths: str) -> Prunable:
    """Chooses what is chosen by default, see :func:`prunable_leaves`, without some leaves, for ``prunable=``.

    Args:
      *paths: of leaves, or of what leaves lie in: "conv1" stands for "conv1/kernel" too. One that is not there is an
        error.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "fc2": {"kernel": jnp.ones((3, 2))}}
      >>> prunable_leaves(params, all_but("fc2"))
      {'fc1': {'bias': False, 'kernel': True}, 'fc2': {'kernel': False}}
    """
    wanted = tuple(plain_path(path).strip("/") for path in paths)

    def chosen(path: str, leaf: Any) -> bool:
        return prunable_by_default(path, leaf) and not any(_within(path, outer) for outer in wanted)

    return _AllBut(chosen, wanted)


def _within(path: str, outer: str) -> bool:
    return f"{plain_path(path)}/".startswith(f"{outer}/")


def is_masked_node(node: Any) -> bool:
    """Whether a node is the :class:`optax.MaskedNode` that stands for what a transformation does not see."""
    return isinstance(node, optax.MaskedNode)


def path_name(path: tuple) -> str:
    """The name of a leaf's path: ``"fc1/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: Any) -> list[str]:
    """The names of all leaves, in the order of ``jax.tree.leaves``."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def natural_order(path: str) -> list[Any]:
    """A sort key that puts conv2 before conv10: the numbers in a path count as numbers.

    Examples:
      >>> sorted(["conv10/kernel", "conv2/kernel"], key=natural_order)
      ['conv2/kernel', 'conv10/kernel']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def plain_path(path: str) -> str:
    """A path without the names that wrappers of leaves add: "kernel" where flax.nnx has "kernel/value".

    Examples:
      >>> plain_path("layers/0/kernel/value")
      'layers/0/kernel'
    """
    parts = path.split("/")
    while len(parts) > 1 and parts[-1] in _WRAPPER_NAMES:
        parts.pop()
    return "/".join(parts)


def by_plain_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their paths, as :func:`plain_path` has them."""
    return {plain_path(path): leaf for path, leaf in by_path(tree).items()}


def is_function(value: Any) -> bool:
    """Whether a value is a function rather than a tree: the modules of Equinox are callable trees."""
    return callable(value) and jax.tree_util.all_leaves([value])


def align(tree: Any, params: Any, what: str) -> list[Any]:
    """The values of ``tree`` that belong to the leaves of ``params``, matched by path.

    Inside ``optax.masked`` and ``optax.partition`` a transformation sees params of
    which parts are replaced by ``MaskedNode``, while what the user gave (masks, extra
    args) still has every leaf: what belongs to no leaf of ``params`` is left out there.

    Args:
      tree: a pytree with a leaf for every leaf of ``params``.
      params: the params as the transformation sees them.
      what: what ``tree`` is, for the error.

    Returns:
      One value a leaf of ``params``, in their order.

    Raises:
      ValueError: naming the leaves that ``tree`` lacks, or has beyond those of ``params``.
    """
    values = by_path(tree)
    wanted = leaf_paths(params)
    missing = [name for name in wanted if name not in values]
    if missing:
        raise ValueError(f"{what} must have the tree of the params, but has nothing for {_listed(missing)}")
    partial = not wanted or any(map(is_masked_node, jax.tree.leaves(params, is_leaf=is_masked_node)))
    extra = sorted(set(values) - set(wanted))
    if extra and not partial:
        raise ValueError(f"{what} must have the tree of the params, but has {_listed(extra)} beyond them")
    return [values[name] for name in wanted]


def prunable_leaves(params: Any, prunable: Any = None) -> Any:
    """Decides for every leaf whether a method may prune it, and logs what was chosen.

    Args:
      params: a pytree of arrays.
      prunable: ``None`` for every floating-point leaf with two or more dimensions
        whose name does not end in "bias", "scale" or "offset" (so the two-dimensional
        biases of attention layers, and of Haiku's normalisations, stay dense too); a pytree of bools like the params;
        or a :class:`Prunable`, such as :func:`all_but`.

    Returns:
      A pytree of Python bools like ``params``.

    Raises:
      ValueError: if ``prunable`` chooses nothing, is neither of the above, or
        does not cover the params.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [(path, as_array(path, leaf)) for path, leaf in leaves]
    if prunable is None:
        chosen = [prunable_by_default(path_name(path), leaf) for path, leaf in leaves]
    elif isinstance(prunable, Prunable):
        names = [path_name(path) for path, _ in leaves]
        wanted = prunable.paths if isinstance(prunable, _AllBut) else ()
        lost = [out for out in wanted if not any(_within(name, out) for name in names)]
        if leaves and lost:
            raise ValueError(f"all_but: there is no {', '.join(lost)} in the params, which are {_listed(names)}")
        chosen = [bool(prunable.predicate(path_name(path), leaf)) for path, leaf in leaves]
    elif is_function(prunable):
        raise ValueError("wrap the predicate of prunable=: jaxsparse.Prunable(lambda path, leaf: ...)")
    else:
        chosen = align(prunable, params, "prunable")
        for (path, _), value in zip(leaves, chosen, strict=True):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"prunable must hold a bool for every leaf, got {value!r} for {path_name(path)}")
        chosen = [bool(value) for value in chosen]
    for (path, leaf), choice in zip(leaves, chosen, strict=True):
        if choice and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"prunable chooses {path_name(path)} of dtype {leaf.dtype}: only floats have masks")
    if leaves and not any(chosen):
        raise ValueError(f"prunable matches none of the params, which are {_listed([path_name(p) for p, _ in leaves])}")
    if leaves:
        sparse = [path_name(path) for (path, _), choice in zip(leaves, chosen, strict=True) if choice]
        dense = [path_name(path) for (path, _), choice in zip(leaves, chosen, strict=True) if not choice]
        logger.info("prunable: %s; dense: %s", ", ".join(sparse), ", ".join(dense) or "nothing")
    return treedef.unflatten(chosen)


def as_array(path: tuple, leaf: Any) -> Any:
    """A leaf that has a shape and a dtype: Python numbers are made arrays of no dimensions, as by JAX."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf
    if not isinstance(leaf, bool | int | float | complex):
        raise ValueError(
            f"the params must be arrays, but {path_name(path)} is {leaf!r}. Of an Equinox module, whose functions are "
            "leaves too, give its arrays: eqx.filter(model, eqx.is_inexact_array)"
        )
    return np.asarray(leaf)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Structure:
    """How a leaf divides into units, each of which is kept or dropped as one.

    Attributes:
      score: what a unit ranks by, the "mean" or the "sum" of its weights' absolute values. The units of one leaf are of
        one size and rank alike by both. Where the units of several leaves rank together, the mean asks how large the
        weights of a unit are; the sum how much there is of it, so large units stay longer.
      ragged: what becomes of leaves that do not divide into such units: "warn" takes them by single weights and names
        them all in one warning, "error" names them in a ValueError.
    """

    score: str = "mean"
    ragged: str = "warn"

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
        return all(length % size == 0 for length, size in zip(shape, self.tile(shape), strict=True))

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a unit, of the leaf's rank."""
        return (1,) * len(shape)

    def unit_size(self, shape: Sequence[int]) -> int:
        """How many weights a unit has."""
        return math.prod(self.tile(shape))

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many units there are along each axis of a leaf of this shape, or a ValueError if it does not fit."""
        if not self.fits(shape):
            raise ValueError(f"{self} does not fit an array of shape {tuple(shape)}")
        return tuple(length // size for length, size in zip(shape, self.tile(shape), strict=True))

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
        counts, tile = self.unit_shape(like.shape), self.tile(like.shape)
        if units.shape != counts:
            raise ValueError(f"{self} has units of shape {counts} in an array of {like.shape}, got {units.shape}")
        if max(tile, default=1) == 1:
            return units
        apart = jnp.expand_dims(units, range(1, 2 * len(counts), 2))
        apart = jnp.broadcast_to(apart, [n for pair in zip(counts, tile, strict=True) for n in pair])
        return _merged(apart, like)

    def holds(self, mask: jax.Array) -> jax.Array:
        """Whether a mask keeps whole units and no parts of any: a bool scalar."""
        return jnp.all(self.expand(self.units(mask), mask) == mask)

    def _reduced(self, x: jax.Array, reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> jax.Array:
        """``reduce(x, axes)``, which keeps the axes, over each unit, by reshapes alone."""
        counts, tile = self.unit_shape(x.shape), self.tile(x.shape)
        if max(tile, default=1) == 1:
            return x
        reduced: list[int] = []
        split: list[int] = []
        for axis in reversed(range(x.ndim)):
            if tile[axis] > 1 and counts[axis] == 1:
                reduced.append(axis)
            elif tile[axis] > 1:
                x = _split(x, axis, tile[axis])
                reduced, split = ([axis + 1, *(i + 1 for i in axes)] for axes in (reduced, split))
        return jnp.squeeze(reduce(x, tuple(sorted(reduced))), tuple(split))


@dataclasses.dataclass(frozen=True, repr=False)
class weight(Structure):  # noqa: N801  (lower case, for it is called like the functions that methods are)
    """Every weight by itself."""


@dataclasses.dataclass(frozen=True, repr=False)
class block(Structure):  # noqa: N801
    """Tiles of ``bm`` times ``bn`` weights over the last two axes of a leaf, inputs and outputs as Flax has them.

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

    def fits(self, shape: Sequence[int]) -> bool:
        """Two axes or more, of which the last two divide by the sizes."""
        return len(shape) >= 2 and super().fits(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class kernel(Structure):  # noqa: N801
    """The slice of one input and one output of a convolution: all axes but the last two.

    Given for all leaves at once, it is for leaves of four dimensions, and matrices go by single weights. Named for a
    leaf, it takes any of three dimensions or more. Others are an error by default, ``ragged="error"``: what their axes
    mean cannot be told.
    """

    ragged: str = dataclasses.field(default="error", kw_only=True)

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All of the axes but the last two."""
        return (*shape[:-2], 1, 1)

    def fits(self, shape: Sequence[int]) -> bool:
        """Three axes or more."""
        return len(shape) >= 3


@dataclasses.dataclass(frozen=True, repr=False)
class channel(Structure):  # noqa: N801
    """All that leads to one output: all axes but the last.

    Given for all leaves at once, it is for leaves of four dimensions, and matrices go by single weights: the last one
    holds a network's own outputs. Named for a leaf, it takes any of two dimensions or more, the columns of a matrix.
    Others are an error by default, ``ragged="error"``: what their axes mean cannot be told.
    """

    ragged: str = dataclasses.field(default="error", kw_only=True)

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All of the axes but the last."""
        return (*shape[:-1], 1)

    def fits(self, shape: Sequence[int]) -> bool:
        """Two axes or more."""
        return len(shape) >= 2


@dataclasses.dataclass(frozen=True, repr=False)
class n_of_m(Structure):  # noqa: N801
    """Of every ``m`` consecutive weights along the inputs, the last axis but one, ``n`` stay, as in 2:4 sparsity.

    Its units are single weights; what it adds is the number that stays of each group.

    Attributes:
      n: how many stay, from 1 to m.
      m: how many there are in a group.

    Raises:
      ValueError: for numbers that are none of these.

    Examples:
      >>> import jax.numpy as jnp
      >>> n_of_m(2, 4).top(jnp.array([[0.1], [3.0], [2.0], [0.5]])).tolist()
      [[False], [True], [True], [False]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n <= self.m:
            raise ValueError(f"n_of_m needs 1 <= n <= m, got {self}")

    def fits(self, shape: Sequence[int]) -> bool:
        """Two axes or more, of which the last but one divides by m."""
        return len(shape) >= 2 and shape[-2] % self.m == 0

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
        self.unit_shape(scores.shape)  # raises if it does not fit
        groups = _split(scores, scores.ndim - 2, self.m)
        where = None if where is None else _split(where, scores.ndim - 2, self.m)
        axes = tuple(axis for axis in range(groups.ndim) if axis != groups.ndim - 2)
        marked = top_k_mask(groups, self.n if n is None else n, where=where, absolute=absolute, axis=axes)
        return _merged(marked, scores)

    def counts(self, mask: jax.Array) -> jax.Array:
        """How many weights each group keeps, int32: of shape (..., inputs / m, outputs)."""
        self.unit_shape(mask.shape)  # raises if it does not fit
        return jnp.squeeze(count_true(_split(mask, mask.ndim - 2, self.m), (mask.ndim - 1,)), mask.ndim - 1)

    def holds(self, mask: jax.Array) -> jax.Array:
        """Whether a mask keeps exactly n of every group: a bool scalar."""
        return jnp.all(self.counts(mask) == self.n)


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


def leaf_structures(structure: StructureLike, params: Any, prunable: Any, *, quiet: bool = False) -> Any:
    """The structure of every prunable leaf.

    Args:
      structure: one for all leaves, or a mapping from path to structure; leaves that it does not name go by single
        weights. The strings stand for ``weight()``, ``kernel()`` and ``channel()``.
      params: a pytree of arrays.
      prunable: a bool for every leaf, like ``params``; see :func:`prunable_leaves`.
      quiet: do not warn of the leaves that go by single weights because they do not fit.

    Returns:
      A :class:`Structure` for every prunable leaf, which fits it; ``optax.MaskedNode()`` for the others.

    Raises:
      ValueError: for an unknown structure or path, and for leaves that do not fit one with ``ragged="error"``.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 2, 8)), "fc": jnp.ones((8, 10))}
      >>> leaf_structures("kernel", params, prunable_leaves(params))
      {'conv': kernel(), 'fc': weight()}
    """
    check_structure(structure)
    given_by_leaf = dict(structure) if isinstance(structure, Mapping) else None
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_paths(params)
    partial = any(map(is_masked_node, jax.tree.leaves(params, is_leaf=is_masked_node)))
    unknown = sorted(set(given_by_leaf or ()) - set(names)) if names and not partial else []
    if unknown:
        raise ValueError(f"structure names {_listed(unknown)}, but the params are {_listed(names)}")
    found: list[Any] = []
    matrices: list[str] = []  # left to single weights by a structure of convolutions
    misfits: dict[Any, list[str]] = {}  # what was given -> the leaves that it does not fit
    for name, leaf, chosen in zip(names, leaves, treedef.flatten_up_to(prunable), strict=True):
        given: Any = structure if given_by_leaf is None else given_by_leaf.get(name, "weight")
        unit = _BY_NAME[given]() if isinstance(given, str) else given
        of_convolutions = isinstance(unit, kernel | channel) and given_by_leaf is None
        if not chosen:
            found.append(optax.MaskedNode())
        elif unit.fits(leaf.shape) and (leaf.ndim == 4 or not of_convolutions):
            found.append(unit)
        else:
            found.append(weight())
            which = matrices if of_convolutions and leaf.ndim == 2 else misfits.setdefault(given, [])
            which.append(f"{name} of shape {tuple(leaf.shape)}")
    told = [f"structure {given!r} does not fit {', '.join(which)}" for given, which in misfits.items()]
    if any((_BY_NAME[given]() if isinstance(given, str) else given).ragged == "error" for given in misfits):
        raise ValueError(
            "; ".join(told) + '. Say it leaf by leaf, structure={"path": ...}, leave leaves out by prunable=, or let '
            'those that do not fit go by single weights, ragged="warn"'
        )
    if matrices and not misfits and all(isinstance(unit, weight) or is_masked_node(unit) for unit in found):
        told = [f"structure {structure!r} is for convolutions unless it names a leaf, and there are only "
                + ", ".join(matrices)]  # fmt: skip
    if told and not quiet:
        warnings.warn("; ".join(told) + ": they go by single weights", UserWarning, stacklevel=2)
    return treedef.unflatten(found)


def mask_structures(structure: StructureLike, params: Any, masks: Any, *, quiet: bool = False) -> Any:
    """As :func:`leaf_structures`, for the leaves that have a mask in ``masks``, a state's."""
    treedef = jax.tree.structure(params)
    sparse = [not is_masked_node(mask) for mask in treedef.flatten_up_to(masks)]
    return leaf_structures(structure, params, treedef.unflatten(sparse), quiet=quiet)


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


def prunable_by_default(path: str, leaf: Any) -> bool:
    """Whether :func:`prunable_leaves` chooses a leaf if not told otherwise; ``path`` such as "fc1/kernel"."""
    name = plain_path(path).split("/")[-1].lower()
    return (
        leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and not name.endswith(("bias", "scale", "offset"))
    )


def _listed(names: list[str], at_most: int = 8) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
