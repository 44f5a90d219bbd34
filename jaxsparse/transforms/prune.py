"""Pruning without growth: layers ranked together or each by itself."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.selection import count_true
from jaxsparse.structures import unit_scores
from jaxsparse.transforms.layers import Layer, as_layers, counts, each, joined
from jaxsparse.transforms.ranking import rank_globally, rank_layers

__all__ = ["prune_globally", "prune_layers"]


def prune_globally(
    layers: Sequence[Layer],
    left: ArrayLike,
    *,
    scores: Sequence[jax.Array] | None = None,
    at_least: ArrayLike = 0,
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Keeps the units of largest score of all layers together, at most ``left`` weights.

    Args:
      layers: of :func:`jaxsparse.transforms.layers_of`: of single weights.
      left: how many weights may be kept, int32. With units of several weights, a little fewer may be.
      scores: floats of the leaves' shapes, of which the largest stay; of units of several weights, those with the
        largest mean (or sum). None: the weights' magnitudes.
      at_least: the fewest units that any layer keeps; all, if it has fewer. A ``left`` too small for that is exceeded.

    Returns:
      The new masks, and how many weights they keep, int32. What a structure reserves stays in any case.
    """
    if not layers:
        return [], jnp.int32(0)
    tiles = [layer.structure.unit_size(layer.mask.shape) for layer in layers]
    by_magnitude = scores is None

    def looked_at(layers, *scores):
        leaves = _leaves(layers, *scores)
        safe = [leaf.structure.reserved(value, leaf.mask, absolute=by_magnitude) for leaf, value in leaves]
        reserved = [jnp.int32(0) if fixed is None else count_true(fixed) for fixed in safe]
        where = [leaf.structure.units(leaf.mask) if fixed is None else leaf.mask & ~fixed
                 for leaf, fixed in zip(layers, safe, strict=True)]  # fmt: skip
        return (
            jnp.stack(reserved),
            [unit_scores(leaf.structure, value, signed=not by_magnitude) for leaf, value in leaves],
            where,
        )

    def renewed(layers, masks, where):
        # What a structure reserves is what was not to be chosen from.
        new = [leaf.structure.expand(mask, leaf.mask) if leaf.structure.exchanges else mask | (leaf.mask & ~free)
               for leaf, mask, free in zip(layers, masks, where, strict=True)]  # fmt: skip
        return jnp.stack(list(map(count_true, masks))), new

    reserved, ranked, where = each(layers, looked_at, *([] if scores is None else [scores]))
    room = jnp.maximum(jnp.asarray(left, jnp.int32) - jnp.sum(reserved), 0)
    chosen = rank_globally(layers, ranked, room, where=where, sizes=tiles, absolute=by_magnitude, at_least=at_least)
    kept, new = each(layers, renewed, chosen, where)
    return new, jnp.sum(reserved) + jnp.sum(kept * np.asarray(tiles, np.int32))


def prune_layers(
    layers: Sequence[Layer], left: ArrayLike, *, scores: Sequence[jax.Array] | None = None
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Keeps the units of largest score of each layer, with a given number for each.

    Args:
      layers: as for :func:`prune_globally`.
      left: how many units each layer keeps, int32, (layers,). Layers that keep n of every m do so whatever it says.
      scores: as for :func:`prune_globally`.

    Returns:
      The new masks, and how many weights they keep, int32.
    """
    if not layers:
        return [], jnp.int32(0)
    layers, by_magnitude = as_layers(layers), scores is None

    def looked_at(layers, *scores):
        leaves = _leaves(layers, *scores)
        ranked = [unit_scores(leaf.structure, value, signed=not by_magnitude) for leaf, value in leaves]
        return ranked, [layer.structure.units(layer.mask) for layer in layers]

    def reserved(layers, *scores):
        return [leaf.structure.reserved(value, leaf.mask, absolute=by_magnitude)
                for leaf, value in _leaves(layers, *scores)]  # fmt: skip

    def expanded(layers, masks):
        return [layer.structure.expand(mask, layer.mask) for layer, mask in zip(layers, masks, strict=True)]

    given = [] if scores is None else [layers.column(scores)]
    free = [i for i, layer in enumerate(layers) if layer.structure.exchanges]
    fixed = [i for i, layer in enumerate(layers) if not layer.structure.exchanges]
    found = []
    if free:
        some, few = layers.some(free), jnp.asarray(left, jnp.int32)[np.asarray(free)]
        ranked, where = each(some, looked_at, *(values.some(free) for values in given))
        chosen = rank_layers(some, ranked, few, where=where, absolute=by_magnitude)
        found.append((free, some.column(each(some, expanded, chosen))))
    if fixed:
        some = layers.some(fixed)
        found.append((fixed, some.column(each(some, reserved, *(values.some(fixed) for values in given)))))
    new = joined(found)
    return new, jnp.sum(counts(layers, new))


def _leaves(layers: Sequence[Layer], scores: Sequence[jax.Array] | None = None) -> list[tuple[Layer, jax.Array]]:
    """The layers, each with its scores, or its weights."""
    return list(zip(layers, [layer.weight for layer in layers] if scores is None else scores, strict=True))
