"""Any function of params on kernels that skip pruned blocks, and a report of what does and why the rest does not."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import LayoutLike, leaf_layouts
from jaxsparse.tables import Table, Tabular
from jaxsparse.trace.block_products import BlockProducts, Masked, Use
from jaxsparse.trace.block_sides import given_blocks, leaf_sides
from jaxsparse.trace.program import is_array, trace
from jaxsparse.trees import by_path, listed

__all__ = ["SparseApply", "SparseReport", "sparse_apply"]


def sparse_apply(
    apply: Callable,
    *,
    block: Any = None,
    tile: tuple[int, int] | None = (128, 128),
    layout: LayoutLike = None,
    implementation: str | None = None,
    dense_weight_grad: bool | jax.Array = False,
) -> "SparseApply":
    """Run any function of params on kernels that skip pruned blocks, forward and back.

    ``fast = sparse_apply(apply)`` makes ``fast(params, masks, *args)``, which computes ``apply(params * masks, *args)``
    without any change to ``apply``. It walks through the jaxpr of ``apply`` and multiplies by blocks wherever one side
    of a product is a masked leaf, also one that was cast, scaled, reshaped, transposed, split, joined with others,
    scanned over, or given to a ``jit``, ``vmap``, ``cond``, ``while_loop``, ``remat`` or ``shard_map``. Products are
    those of ``dot_general`` (so of ``einsum`` and ``matmul``) and convolutions of 1 x 1. Where a mask cannot be
    followed, the leaf is multiplied by its mask and the program goes on as it is: the result is right for all masks,
    and :meth:`SparseApply.report` says which products are fast.

    It is jitted, so ``apply`` is traced once for each combination of shapes, dtypes and values that are no arrays; put
    it under ``jax.jit``, ``grad``, ``vmap``, ``scan`` and ``shard_map`` like any function.

    Args:
      apply: ``apply(params, *args)``, a pure function of params, such as ``model.apply`` of Flax.
      block: the blocks that the masks are made of: (inputs, outputs), or a structure such as
        ``jaxsparse.block(64, 64)``, for all leaves; or for some, by a mapping from patterns of paths
        (:func:`jaxsparse.trees.matching`) or a function of the path, both with None where it is not known. It only
        decides the speed. Inputs and outputs are those of :func:`jaxsparse.layouts.leaf_layouts`.
      tile: (inputs, outputs) of the tiles in which masks without a known block are searched for something alive; None
        leaves their products dense.
      layout: pattern -> :class:`jaxsparse.Layout`, where names and shapes of leaves do not tell inputs from outputs.
      implementation: as for :func:`jaxsparse.kernels.block_sparse_matmul`; None: what it chooses here, and where that
        is "xla", products stay dense.
      dense_weight_grad: whether pruned weights get the gradients of dense ones, for methods that grow weights by them.
        A bool, or a bool scalar array that depends on the step: only steps with True compute them.

    Returns:
      A :class:`SparseApply`: ``fast(params, masks, *args)`` and ``fast.report(params, masks, *args)``.

    Raises:
      ValueError: for a block or tile that is not a pair of sides. When called: for masks that are not bool, do not have
        the shape of their leaf, or belong to no leaf; for an implementation that cannot run, naming leaf and line.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxsparse
      >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> masks = jaxsparse.random_masks(params, 0.75, structure=jaxsparse.block(4, 4))
      >>> fast, x = sparse_apply(mlp, block=(4, 4)), jnp.ones((2, 8))
      >>> bool(jnp.allclose(fast(params, masks, x), mlp(jaxsparse.apply_masks(params, masks), x)))
      True

    .. warning::
      On a mesh, products are divided among devices inside ``jax.shard_map`` only. Forward-mode and second derivatives
      of the products are not defined.
    """
    sides = tuple(tile) if isinstance(tile, tuple | list) else ()
    if tile is not None and (len(sides) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in sides)):
        raise ValueError(f"tile must be (inputs, outputs) of at least 1, or None, got {tile!r}")
    return SparseApply(apply, block, tile, layout, implementation, dense_weight_grad)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseApply:
    """A function of ``(params, masks, *args)`` on block kernels, made by :func:`sparse_apply`."""

    apply: Callable
    block: Any
    tile: tuple[int, int] | None
    layout: LayoutLike
    implementation: str | None
    dense_weight_grad: bool | jax.Array

    def __call__(self, params: Any, masks: Any, *args: Any) -> Any:
        """Compute ``apply(params * masks, *args)``.

        Args:
          params: as ``apply`` takes them.
          masks: bool arrays by the same paths, as from :func:`jaxsparse.get_masks`; leaves without a mask, or with one
            of no dimensions, are dense.
          *args: as ``apply`` takes them. What is no array (numbers, flags, functions) is fixed when traced.
        """
        return _opened(self._jitted(_closed((params, args)), masks))

    def report(self, params: Any, masks: Any, *args: Any) -> "SparseReport":
        """Find which products run on kernels and which stay dense, and why.

        Args:
          params: as for a call, or their shapes (``jax.ShapeDtypeStruct``); nothing is computed.
          masks: as for a call, or their shapes.
          *args: as for a call, or their shapes.

        Returns:
          A :class:`SparseReport`, which prints as a table.
        """
        uses: list[Use] = []
        jax.eval_shape(functools.partial(self._run, uses=uses), _closed((params, args)), masks)
        return SparseReport(tuple(uses))

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self._run)

    def _run(self, closed, masks, uses=None):
        params, args = _opened(closed)
        traced = trace(self.apply, params, *args)
        evaluator = BlockProducts(self.tile, self.implementation, self.dense_weight_grad)
        leaves = self._masked(params, masks)
        values = [
            leaf if path is None else leaves.get(path, leaf)
            for path, leaf in zip(traced.paths, traced.leaves, strict=True)
        ]
        outs = [evaluator.plain(out) for out in evaluator.run(traced.closed, values)]
        if uses is not None:
            uses += evaluator.uses
        return _closed(traced.rebuild(outs))

    def _masked(self, params, masks) -> dict[str, Masked]:
        leaves = {path: leaf for path, leaf in by_path(params).items() if is_array(leaf)}
        given = {path: jnp.asarray(mask) for path, mask in by_path(masks).items()}
        if unknown := sorted(set(given) - set(by_path(params))):
            raise ValueError(f"masks must have the paths of the params, but have {listed(unknown)} beyond them")
        given = {path: mask for path, mask in given.items() if mask.ndim}
        for path, mask in given.items():
            leaf = leaves[path]
            if mask.shape != leaf.shape or mask.dtype != jnp.bool_ or not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError(
                    f"the mask of {path} must be bool of the shape of its floats, {leaf.dtype} of {leaf.shape}, or the "
                    f"scalar True for a dense leaf; got {mask.dtype} of {mask.shape}"
                )
        layouts = leaf_layouts(jax.tree.map(lambda x: x if is_array(x) else None, params), self.layout)
        blocks = given_blocks(self.block, layouts, {path: leaves[path] for path in given})
        return {
            path: Masked(leaves[path], mask, (path,), leaf_sides(blocks[path], layouts[path], mask.shape))
            for path, mask in given.items()
        }


@dataclasses.dataclass(frozen=True, repr=False)
class SparseReport(Tabular):
    """Which products run on block kernels, which stay dense, and why.

    Attributes:
      uses: one for each place where a masked leaf is used, in the order of the program.
    """

    uses: tuple[Use, ...]

    @property
    def share(self) -> float:
        """The share of the multiply-adds with masked leaves that run on kernels; 0 without any."""
        total = sum(use.macs for use in self.uses)
        return sum(use.macs for use in self.uses if use.block) / total if total else 0.0

    def table(self) -> Table:
        """The cells: leaf, place, multiply-adds of the dense product, block, implementation, reason."""
        header = ("leaf", "used by", "multiply-adds", "block", "runs on", "why")
        rows = tuple(
            (
                " + ".join(use.paths),
                str(use.where),
                f"{use.macs:,}" if use.macs else "",
                f"{use.block[0]} x {use.block[1]}" if use.block else "",
                use.runs_on,
                use.why,
            )
            for use in self.uses
        )
        total = f"{sum(use.macs for use in self.uses):,}"
        totals = (("all", "", total, "", f"{self.share:.0%} on kernels", ""),)
        return Table(header, rows, totals, left=(0, 1, 4, 5)).without_empty_columns(keep=5)


@dataclasses.dataclass(frozen=True, eq=False)
class _Fixed:
    """A leaf that is no array, as a part of a tree's structure, so that it goes through ``jax.jit``."""

    value: Any

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return id(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Fixed) or type(self.value) is not type(other.value) or hash(self) != hash(other):
            return False  # 1, 1.0 and True are not the same
        return self.value is other.value or bool(self.value == other.value)


jax.tree_util.register_pytree_node(_Fixed, lambda leaf: ((), leaf), lambda leaf, _: leaf)


def _closed(tree):
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else _Fixed(leaf), tree)


def _opened(tree):
    is_fixed = lambda node: isinstance(node, _Fixed)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.value if is_fixed(leaf) else leaf, tree, is_leaf=is_fixed)
