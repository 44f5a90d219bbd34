"""Mask pytrees: make, check, apply, count.

Masks have the tree of the params: a bool array of the leaf's shape for a sparse
leaf, and the scalar ``True``, which broadcasts, for a dense one. So
``jax.tree.map(jnp.multiply, params, masks)`` and ``jax.tree.map(jnp.mean, masks)``
just work. Inside an optimizer state a dense leaf holds ``optax.MaskedNode()``
instead, which has no array to shard.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse import allocation as allocation_lib
from jaxsparse.allocation import Allocation
from jaxsparse.layouts import Layout, LayoutLike, empty_layers, leaf_layouts, warn_of_guesses
from jaxsparse.placement import copied, mask_like, sharding_of
from jaxsparse.prunable import prunable_leaves
from jaxsparse.reductions import all_false
from jaxsparse.selection import count_true, global_top_k_masks, random_scores, top_k_mask, top_k_masks
from jaxsparse.structures import StructureLike, leaf_structures, unit_scores, weight
from jaxsparse.trees import (
    align,
    as_array,
    by_path,
    is_masked_node,
    is_partial,
    leaf_paths,
    listed,
    path_name,
    score_that_fits,
    scores_by_path,
)
from jaxsparse.user_warnings import warn

__all__ = [
    "apply_masks", "as_key", "count", "density", "magnitude_masks", "nonzero_masks", "random_masks", "score_masks",
    "validate_masks",
]  # fmt: skip

COUNTED = 1 << 31  # more cannot be counted in int32


def random_masks(
    params: Any,
    sparsity: allocation_lib.Sparsity,
    *,
    allocation: Allocation = "uniform",
    at_least: ArrayLike = 0,
    prunable: Any = None,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
    key: ArrayLike = 0,
) -> Any:
    """Masks that keep a random choice of weights, with exact counts.

    Args:
      params: a pytree of arrays.
      sparsity: the fraction of zeros among the prunable weights, in [0, 1), or one
        for each leaf: a mapping from patterns of paths such as ``"*/attn/*"`` to sparsities, the first match wins, or a
        function of path and leaf.
      allocation: "uniform", "erdos_renyi" or "erdos_renyi_kernel".
      at_least: the fewest weights, or units, that any leaf keeps (all, if it has fewer). The others give up as many; a
        budget too small for that is exceeded.
      prunable: which leaves get a mask, see :func:`jaxsparse.prunable.prunable_leaves`.
      structure: what is kept or dropped as one, see :func:`jaxsparse.structures.leaf_structures`. Counts are then of
        units, rounded among the leaves whose units are of one size. Leaves that keep n of every m do so whatever
        ``sparsity`` says, and a mapping of sparsities does not name them.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.
      key: an int or a PRNG key, possibly traced.

    Returns:
      A pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Raises:
      ValueError: for options out of range, naming the leaf or the option.

    Warns:
      UserWarning: for leaves that keep nothing, and for those whose inputs and outputs count and had to be guessed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> masks = random_masks({"kernel": jnp.ones((8, 5)), "bias": jnp.zeros(5)}, 0.75)
      >>> jax.tree.map(lambda m: int(m.sum()), masks)
      {'bias': 1, 'kernel': 10}
    """
    draw = as_key(key)

    numbers = itertools.count()  # of the leaves with masks

    def score(_, leaf, unit):
        sharding = sharding_of(leaf) if unit.unit_size(leaf.shape) == 1 else None  # units are few
        return random_scores(jax.random.fold_in(draw, next(numbers)), unit.unit_shape(leaf.shape), sharding)

    return _best_masks(params, sparsity, allocation, at_least, prunable, structure, layout, score)


def magnitude_masks(
    params: Any,
    sparsity: allocation_lib.Sparsity,
    *,
    allocation: Allocation | Literal["global"] = "uniform",
    at_least: ArrayLike = 0,
    prunable: Any = None,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
) -> Any:
    """Masks that keep the weights of largest magnitude, for instance of a pretrained network.

    Args:
      params: a pytree of arrays.
      sparsity: as for :func:`random_masks`.
      allocation: as for :func:`random_masks`, or "global": the largest weights
        of the whole network, in whatever layer they are. (Of units of several weights
        the largest that fit into the number of weights, see
        :func:`jaxsparse.global_top_k_masks`.)
      at_least, prunable, layout: as for :func:`random_masks`.
      structure: as for :func:`random_masks`. Units rank by their score.

    Returns:
      A pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Raises:
      ValueError: for options out of range, naming the leaf or the option.

    Examples:
      >>> import jax.numpy as jnp
      >>> magnitude_masks({"w": jnp.array([[0.1, -3.0], [2.0, 0.5]])}, 0.5)["w"].tolist()
      [[False, True], [True, False]]
    """

    def score(_, leaf, unit):
        return unit_scores(unit, leaf)

    return _best_masks(params, sparsity, allocation, at_least, prunable, structure, layout, score, may_be_global=True)


def score_masks(
    params: Any,
    scores: Any,
    sparsity: allocation_lib.Sparsity,
    *,
    scope: Literal["layer", "global"] = "layer",
    allocation: Allocation = "uniform",
    at_least: ArrayLike = 0,
    prunable: Any = None,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
    per_output: bool = False,
) -> Any:
    """Masks that keep the weights with the largest scores: one-shot pruning by any criterion.

    Args:
      params: a pytree of arrays.
      scores: like ``params``: floats of which the largest are kept, such as those of :mod:`jaxsparse.saliency`. They
        are ranked as they are, sign included; NaN ranks last. Those of dense leaves are not read, and may be None.
      sparsity: as for :func:`random_masks`.
      scope: what is ranked together: the weights of a "layer", or of the whole network, "global".
      allocation: as for :func:`random_masks`; not with the scope "global", where the scores decide.
      at_least, prunable, layout: as for :func:`random_masks`.
      structure: as for :func:`random_masks`. A unit of several weights ranks by the mean (or the sum) of their scores.
      per_output: rank the weights of every output by themselves, so that all outputs of a layer keep equally many
        (rounded, and at least one if ``at_least`` asks for any), as Wanda does. Leaves without inputs, such as biases,
        are ranked as a whole. For single weights, ranked by layer.

    Returns:
      A pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Raises:
      ValueError: for options out of range, and for scores that lack a prunable leaf, have another shape or are no
        floats, or have leaves beyond the params, by name.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, scores = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[4.0, 3.0], [-5.0, 2.0]])}
      >>> score_masks(params, scores, 0.5)["w"].tolist()
      [[True, True], [False, False]]
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be one of ['layer', 'global'], got {scope!r}")
    if scope == "global" and allocation != "uniform":
        raise ValueError(f"scope='global' ranks all layers together, which allocation={allocation!r} contradicts")
    if per_output and (scope == "global" or structure not in ("weight", weight())):
        raise ValueError(
            f"per_output ranks single weights within a layer, got scope={scope!r} and structure={structure!r}"
        )
    given = scores_by_path(scores, params)

    def score(path, leaf, unit):
        return unit_scores(unit, score_that_fits(given, path, leaf), signed=True)

    return _best_masks(
        params, sparsity, "global" if scope == "global" else allocation, at_least, prunable, structure, layout, score,
        may_be_global=True, absolute=False, per_output=per_output,
    )  # fmt: skip


def nonzero_masks(params: Any, *, prunable: Any = None, layout: LayoutLike = None) -> Any:
    """Masks of the weights that are not zero, to continue from a network that is already sparse.

    Args:
      params: a pytree of arrays.
      prunable, layout: as for :func:`random_masks`.

    Returns:
      A pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Warns:
      UserWarning: for leaves that are all zeros, by path.

    Examples:
      >>> import jax.numpy as jnp
      >>> nonzero_masks({"w": jnp.array([[0.0, -3.0]])})["w"].tolist()
      [[False, True]]
    """
    chosen = prunable_leaves(params, prunable, layout=layout)
    masks = jax.tree.map(lambda x, c: x != 0 if c else jnp.ones((), bool), params, chosen)
    warn_of_empty(by_path(masks), "Leave out by prunable= what only starts at zero", leaf_layouts(params, layout))
    return masks


def apply_masks(tree: Any, masks: Any) -> Any:
    """Sets masked-out weights to exactly 0, NaN included; dtypes are kept.

    Args:
      tree: a pytree of arrays.
      masks: a pytree like ``tree``: bool arrays, and the scalar True or
        ``MaskedNode`` for dense leaves, which pass unchanged.

    Raises:
      ValueError: if a leaf has no mask, or one that is not bool and of its shape; it names the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> apply_masks({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, treedef.flatten_up_to(validate_masks(masks, tree)), strict=True)
    return treedef.unflatten([x if is_masked_node(mask) else jnp.where(mask, x, jnp.zeros_like(x)) for x, mask in rows])


def count(masks: Any) -> jax.Array:
    """The number of weights that the masked leaves keep, an int32 scalar; dense leaves are not counted.

    Of leaves that have 2**31 weights or more together, NumPy's int64.

    Raises:
      ValueError: for so many in a function that is traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> int(count({"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}))
      1
    """
    counts = [count_true(jnp.asarray(m)) for m in _sparse_leaves(masks)]
    if (size := sum(m.size for m in _sparse_leaves(masks))) < COUNTED:
        return sum(counts, jnp.int32(0))
    if any(isinstance(kept, jax.core.Tracer) for kept in counts):
        raise ValueError(f"{size} weights cannot be counted in int32: call jaxsparse.count outside of jit, or density")
    return np.int64(sum(map(int, counts)))  # type: ignore[return-value]


def density(masks: Any) -> jax.Array:
    """The fraction of weights that the masked leaves keep, a float32 scalar; 1 if no leaf is masked.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(density({"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}))
      0.5
    """
    leaves = _sparse_leaves(masks)
    size = sum(m.size for m in leaves)
    kept = count(masks) if size < COUNTED else sum(count_true(jnp.asarray(m)).astype(jnp.float32) for m in leaves)
    return kept.astype(jnp.float32) / jnp.float32(size) if size else jnp.float32(1)


def validate_masks(masks: Any, params: Any, what: str = "masks") -> Any:
    """Checks masks against params and converts them to the form of optimizer states.

    Args:
      masks: a pytree like ``params``: bool arrays of the leaf's shape, the scalar True for dense leaves.
      params: the params.
      what: what to call them in an error.

    Returns:
      A pytree like ``params``: bool arrays, ``optax.MaskedNode()`` for dense leaves.

    Raises:
      ValueError: naming the leaf, what was expected and what came.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not any(map(is_masked_node, jax.tree.leaves(masks, is_leaf=is_masked_node))):
        values = align(masks, params, what)
    else:  # already in the form of a state
        values = treedef.flatten_up_to(masks)
    checked = []
    for (path, leaf), mask in zip(leaves, values, strict=True):
        if is_masked_node(mask):
            checked.append(mask)
            continue
        if not hasattr(mask, "dtype"):
            mask = np.asarray(mask)
        shape = as_array(path_name(path), leaf).shape
        if mask.dtype != jnp.bool_ or (mask.shape != shape and mask.shape != ()):
            raise ValueError(
                f"{what} of {path_name(path)}: expected bool of shape {shape} (or the scalar True for a "
                f"dense leaf), got {mask.dtype} of shape {mask.shape}"
            )
        if mask.shape == () and shape != ():
            if not isinstance(mask, jax.core.Tracer) and not bool(mask):
                raise ValueError(f"{what} of {path_name(path)}: the scalar False would remove the whole leaf")
            checked.append(optax.MaskedNode())
        else:
            checked.append(optax.MaskedNode() if shape == () else mask)
    return treedef.unflatten(checked)


def copied_masks(masks: Any, params: Any) -> Any:
    """Copies of masks in the form of a state, placed as the params are. (A state may be donated, the masks survive.)"""
    return jax.tree.map(lambda p, mask: mask if is_masked_node(mask) else mask_like(copied(mask), p), params, masks)


def as_key(key: ArrayLike) -> jax.Array:
    """A typed PRNG key from an int, a typed key or raw key data; traced values too.

    All 64 bits of an int count, also where JAX computes in 32 and would cut it off.

    Raises:
      ValueError: for what is none of these, and for ints beyond 64 bits.
    """
    if isinstance(key, np.ndarray | np.generic) and key.ndim == 0:
        key = key.item()
    if isinstance(key, int):
        if not -(2**63) <= key < 2**63:
            raise ValueError(f"key must be an int of at most 64 bits, from -2**63 to 2**63 - 1, got {key}")
        if -(2**31) <= key < 2**32:
            return jax.random.key(key)
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):  # else JAX would cut it off at 32 bits
            return jax.random.key(key)
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer) and key.ndim < 2:
        return jax.random.key(key) if key.ndim == 0 else jax.random.wrap_key_data(jnp.asarray(key))
    what = repr(key) if dtype is None else f"an array of dtype {dtype} and shape {key.shape}"
    raise ValueError(f"key must be an int or one PRNG key, such as jax.random.key(0), got {what}")


def _best_masks(
    params, sparsity, allocation, at_least, prunable, structure, layout, score,
    may_be_global=False, absolute=True, per_output=False,
):  # fmt: skip
    """Masks of the units with the largest ``score(path, leaf, unit)``; the scalar True for leaves without masks."""
    together = allocation == "global" and may_be_global
    if not together:
        allocation_lib.check_allocation(allocation, more=("global",) if may_be_global else ())
    chosen = prunable_leaves(params, prunable, layout=layout)
    structures, layouts = leaf_structures(structure, params, chosen, layout=layout), leaf_layouts(params, layout)
    leaves, treedef = jax.tree.flatten(params)
    flat = zip(leaf_paths(params), leaves, treedef.flatten_up_to(structures), strict=True)
    sparse = {path: (leaf, unit) for path, leaf, unit in flat if not is_masked_node(unit)}
    scores, kept = {}, {}
    for path, (leaf, unit) in sparse.items():
        value = score(path, leaf, unit)
        if not unit.exchanges:
            kept[path] = unit.reserved(value, jnp.ones_like(value, bool), absolute=absolute)
        else:
            scores[path] = value
    free = {path: sparse[path][0] for path in scores}
    sizes = [sparse[path][1].unit_size(leaf.shape) for path, leaf in free.items()]
    if together:
        total = jnp.sum(allocation_lib.layer_counts(free, sparsity, partial=is_partial(params)))
        best = global_top_k_masks(list(scores.values()), total, absolute=absolute, sizes=sizes, at_least=at_least)
    else:
        if allocation != "uniform" and not callable(sparsity) and np.ndim(sparsity) == 0:
            warn_of_guesses({path: layouts[path] for path in free}, f"allocation {allocation!r}")
        counts = allocation_lib.layer_counts(
            free, sparsity, allocation, sizes, layouts=layouts, at_least=at_least, partial=is_partial(params)
        )
        if per_output:
            best = [best_of_outputs(scores[path], counts[i], at_least, layouts[path]) for i, path in enumerate(scores)]
        else:
            best = top_k_masks(list(scores.values()), counts, absolute=absolute)
    for (path, leaf), units in zip(free.items(), best, strict=True):
        kept[path] = sparse[path][1].expand(units, leaf)
    kept = {path: mask_like(mask, sparse[path][0]) for path, mask in kept.items()}
    warn_of_empty(kept, layouts=layouts)
    return treedef.unflatten([kept.get(path, jnp.ones((), bool)) for path in leaf_paths(params)])


def best_of_outputs(
    scores: jax.Array,
    kept: ArrayLike,
    at_least: ArrayLike,
    layout: Layout,
    where: jax.Array | None = None,
    absolute: bool = False,
) -> jax.Array:
    """Marks the largest scores of every output, which share the weights that the layer keeps, rounded.

    What has no inputs, such as a bias, is ranked as a whole, each layer of a stack by itself.

    Args:
      scores: floats, of a leaf's shape.
      kept: how many weights the layer keeps.
      at_least: the fewest of them.
      layout: where the leaf has its outputs.
      where, absolute: as for :func:`jaxsparse.top_k_mask`.
    """
    matrices = layout.to_matrices(scores)
    apart = tuple(range(len(layout.stack)))  # type: ignore[arg-type]
    if layout.is_matrix:
        apart = (*apart, matrices.ndim - 1)
    outputs = math.prod(matrices.shape[axis] for axis in apart)
    fewest = jnp.minimum(jnp.asarray(at_least, jnp.int32), scores.size)
    of_output = jnp.maximum((kept + outputs // 2) // outputs, -(-fewest // outputs))
    where = None if where is None else layout.to_matrices(where)
    marked = top_k_mask(matrices, of_output, where=where, absolute=absolute, axis=apart)
    return layout.from_matrices(marked, scores)


def warn_of_empty(
    masks: Mapping[str, Any],
    advice: str = "Keep some by at_least=1, a lower sparsity or another allocation",
    layouts: Mapping[str, Layout] | None = None,
) -> None:
    """Warns of leaves, and with layouts of layers of stacks, that keep nothing. Nothing is known under jit."""
    if layouts is not None and (of_stacks := empty_layers(masks, layouts)):
        warn(of_stacks)
    empty = [f"{path} (of {masks[path].size} weights)" for path in all_false(masks)]
    if empty:
        warn(
            f"no weight is left in {listed(empty)}: nothing passes there, and methods that share out growth by what "
            f"is left will not bring it back. {advice}",
        )


def _sparse_leaves(masks: Any) -> list[jax.Array]:
    return [m for m in jax.tree.leaves(masks) if jnp.ndim(m) > 0]
