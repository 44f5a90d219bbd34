"""The largest entries of layers, each by itself or all together, compiled once for layers that repeat one another."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.selection import top_k_masks, top_k_of_all, top_k_of_stacks
from jaxsparse.transforms.layers import Column, Layer, as_layers

__all__ = ["rank_globally", "rank_layers"]


def rank_layers(
    layers: Sequence[Layer],
    scores: Sequence[jax.Array],
    ks: jax.Array,
    *,
    where: Sequence[jax.Array] | None,
    absolute: bool = False,
    enough: bool = False,
) -> Sequence[jax.Array]:
    """Marks the largest scores of each layer, as :func:`jaxsparse.selection.top_k_masks` does.

    Args:
      layers: the layers, of :func:`jaxsparse.transforms.layers_of`.
      scores: floats, an array for each layer.
      ks: how many to mark in each, int32, (layers,).
      where: for each layer bool of its scores' shape: only these may be marked. None: all.
      absolute: rank by absolute value.
      enough: the caller knows that ``where`` marks at least ``ks``, which saves counting them.

    Returns:
      Bool, an array for each layer.
    """
    layers = as_layers(layers)
    if not layers.stacks:
        among = None if where is None else list(where)
        return top_k_masks(list(scores), ks, where=among, absolute=absolute, enough=enough)
    scores = layers.column(scores)
    free = [None] * len(scores.parts) if where is None else layers.column(where).parts
    count, chosen = len(layers.stacks), np.concatenate([stack.members for stack in layers.stacks])
    ks_of_stacks = ks if np.array_equal(chosen, np.arange(len(layers))) else ks[chosen]
    masks = top_k_of_stacks(scores.parts[:count], ks_of_stacks, free[:count], absolute=absolute, enough=enough)
    if layers.single:
        masks += top_k_masks(
            scores.parts[count:], [ks[i] for i in layers.single], where=None if where is None else free[count:],
            absolute=absolute, enough=enough,
        )  # fmt: skip
    return Column(scores.members, masks, scores.shapes)


def rank_globally(
    layers: Sequence[Layer],
    scores: Sequence[jax.Array],
    k: ArrayLike,
    *,
    where: Sequence[jax.Array] | None,
    sizes: Sequence[int] | None = None,
    absolute: bool = False,
    at_least: ArrayLike = 0,
) -> Sequence[jax.Array]:
    """Marks the largest scores of all layers together, as :func:`jaxsparse.global_top_k_masks` does.

    Args:
      layers, scores, where, absolute: as for :func:`rank_layers`.
      k: how many to mark in all, an integer.
      sizes: for each layer how much an entry counts, ints >= 1; None: 1.
      at_least: mark this many of every layer in any case.

    Returns:
      Bool, an array for each layer.
    """
    if not layers:
        return []
    layers = as_layers(layers)
    column = layers.column(scores)
    free = None if where is None else layers.column(where).parts
    counts = {i: part.size // len(members) for members, part in zip(column.members, column.parts, strict=True)
              for i in members}  # fmt: skip
    begins = np.cumsum([0, *(counts[i] for i in range(len(layers)))]).tolist()
    starts = tuple(tuple(begins[i] for i in m) if len(m) > 1 else begins[m[0]] for m in column.members)
    each = (1,) * len(column.parts) if sizes is None else tuple(int(sizes[m[0]]) for m in column.members)
    masks = top_k_of_all(column.parts, k, free, starts, each, absolute=absolute, at_least=at_least)
    return Column(column.members, masks, column.shapes)
