"""Tables of attention by head: the weights that each head keeps, and the heads that keep none."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsparse.inspect.states import sparse_masks
from jaxsparse.layout_rules import Leaf, described, is_attention_output
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.tables import Table, Tabular
from jaxsparse.trees import by_pattern

__all__ = ["HeadSummary", "LayerHeads", "heads", "kept_by_head"]


class LayerHeads(NamedTuple):
    """The heads of one leaf; of a stack, of one of its layers.

    Attributes:
      path: the path of the leaf.
      layer: its place in the stack, such as "3"; "" for a leaf that is no stack.
      kept: the number of weights that each head keeps, int, (heads,).
      weights: the number of weights of a head.
    """

    path: str
    layer: str
    kept: np.ndarray
    weights: int

    @property
    def density(self) -> np.ndarray:
        """The share of its weights that each head keeps, (heads,)."""
        return self.kept / max(self.weights, 1)

    @property
    def dead(self) -> list[int]:
        """The heads that keep no weight."""
        return np.flatnonzero(self.kept == 0).tolist()

    @property
    def name(self) -> str:
        """The path, and the place in a stack."""
        return f"{self.path} [{self.layer}]" if self.layer else self.path


@dataclasses.dataclass(frozen=True, repr=False)
class HeadSummary(Tabular):
    """The result of :func:`heads`; prints as a table, in colour with ``rich.print``, as HTML in a notebook.

    Attributes:
      layers: one :class:`LayerHeads` for each leaf of attention that has a mask, or for each layer of a stack.
    """

    layers: tuple[LayerHeads, ...]

    def table(self) -> Table:
        """The cells of the table."""
        header = ("layer", "heads", "kept", "density", "sparsest head", "densest head", "dead heads")
        rows = []
        for layer in self.layers:
            density = layer.density
            ends = (int(density.argmin()), int(density.argmax()))
            rows.append((
                layer.name, f"{density.size:,}", f"{layer.kept.sum():,}", f"{density.mean():.2%}",
                *(f"{head}: {density[head]:.2%}" for head in ends), ", ".join(map(str, layer.dead)) or "none",
            ))  # fmt: skip
        return Table(header, tuple(rows))


def heads(opt_state_or_masks: Any, *, heads: Mapping[str, int] | None = None, layout: LayoutLike = None) -> HeadSummary:
    """Count the weights that every head of attention keeps, as a table that names dead heads.

    A head whose query, key, value or output keeps no weight is of no use, or no longer attends to what it reads:
    :func:`jaxsparse.post_training.prune_channels` finds heads to remove, and :func:`jaxsparse.trace.slim` removes them.

    Args:
      opt_state_or_masks: an optimizer state, or masks like the params.
      heads: the number of heads of leaves whose heads have no axis of their own, such as (width, heads * dim):
        pattern -> number (:func:`jaxsparse.trees.matching`). Outputs are divided among heads, and of the projection
        behind attention ("out", "o_proj") the inputs. Leaves with axes (inputs, heads, dim), as Flax has them, need
        no number.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes leave it open
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`. Where inputs or outputs are
        several axes, the last but one of them is that of the heads.

    Returns:
      A :class:`HeadSummary`.

    Raises:
      ValueError: if no leaf with a mask has heads, a pattern matches nothing, or a number does not divide the axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> masks = {"attn": {"query": jnp.ones((4, 2, 2), bool).at[:, 1].set(False), "out": jnp.ones((2, 2, 4), bool)}}
      >>> print(heads(masks))
      layer       heads  kept  density  sparsest head  densest head  dead heads
      ----------  -----  ----  -------  -------------  ------------  ----------
      attn/out        2    16  100.00%     0: 100.00%    0: 100.00%        none
      attn/query      2     8   50.00%       1: 0.00%    0: 100.00%           1
    """
    masks = sparse_masks(opt_state_or_masks, "heads")
    numbers = by_pattern(heads, list(masks), "heads") if heads else {}
    layouts, leaves, found = leaf_layouts(masks, layout), described(masks), []
    for path, mask in masks.items():
        at = layouts[path]
        named = path in numbers
        kept = _divided(path, leaves[path], mask, at, numbers[path]) if named else kept_by_head(mask, at)
        if kept is not None:
            for place in np.ndindex(kept.shape[:-1]):
                layer = LayerHeads(path, ", ".join(map(str, place)), kept[place], mask.size // max(kept.size, 1))
                found.append(layer)
    if not found:
        raise ValueError(
            f"heads: no leaf with a mask has an axis of heads, among {', '.join(masks)}. Say how many heads "
            'leaves have by heads={"*/query/kernel": 8, "*/out/kernel": 8}'
        )
    return HeadSummary(tuple(found))


def kept_by_head(mask: np.ndarray, layout: Layout) -> np.ndarray | None:
    """The number of weights that each head of a leaf keeps, int, (stack..., heads); None for a leaf without heads."""
    if layout.head is None:
        return None
    front = (*layout.stack, layout.head)  # type: ignore[misc]
    rest = tuple(axis for axis in range(mask.ndim) if axis not in front)
    return mask.transpose(front + rest).sum(tuple(range(len(front), mask.ndim)))


def _divided(path: str, leaf: Leaf, mask: np.ndarray, layout: Layout, number: int) -> np.ndarray:
    """The same of a leaf that has a number of heads, but no axis of them."""
    side = "inputs" if is_attention_output(leaf) else "outputs"
    seen = np.moveaxis(layout.to_matrices(mask), -2 if side == "inputs" else -1, -1)
    if not isinstance(number, int) or number < 1 or seen.shape[-1] % number:
        raise ValueError(f"heads of {path}: {seen.shape[-1]} {side} cannot be divided among {number!r} heads")
    split = seen.reshape(*seen.shape[:-1], number, -1)
    return split.sum((*range(len(layout.stack), split.ndim - 2), -1))  # type: ignore[arg-type]
