"""Keep the units of largest score: layers ranked together or each by itself."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.layouts import Layout
from jaxsparse.masks import best_of_outputs
from jaxsparse.selection import count_true, top_k_mask
from jaxsparse.structures import unit_scores
from jaxsparse.transforms.layers import Layer, as_layers, counts, each, joined
from jaxsparse.transforms.ranking import rank_globally, rank_layers

__all__ = ["counts_at", "prune_globally", "prune_layers", "prune_outputs", "prune_to"]


def counts_at(layers: Sequence[Layer], sparsity: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """How many units each layer, and how many weights the whole network, keeps at a sparsity.

    Computed in double precision, for float32 cannot tell all the weights of a large network.

    Args:
      layers: of :func:`jaxsparse.transforms.layers_of`.
      sparsity: the fraction of zeros, in [0, 1], possibly traced; in float64 where it was computed in
        ``jax.enable_x64``.

    Returns:
      int32, (layers,) and ().
    """
    with jax.enable_x64(True):
        zeros = jnp.asarray(sparsity, jnp.float64)
        units = np.asarray([np.prod(layer.structure.unit_shape(layer.mask.shape)) for layer in layers], np.float64)
        total = float(sum(layer.size for layer in layers))
        return (
            jnp.asarray(units - jnp.round(units * zeros), jnp.int32),
            jnp.asarray(total - jnp.round(total * zeros), jnp.int32),
        )


def prune_globally(
    layers: Sequence[Layer],
    left: ArrayLike,
    *,
    scores: Sequence[jax.Array] | None = None,
    at_least: ArrayLike = 0,
    revive: bool = False,
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Keeps the units of largest score of all layers together, at most ``left`` weights.

    Args:
      layers: of :func:`jaxsparse.transforms.layers_of`: of single weights.
      left: how many weights may be kept, int32. With units of several weights, a little fewer may be.
      scores: floats of the leaves' shapes, of which the largest stay; of units of several weights, those with the
        largest mean (or sum). None: the weights' magnitudes.
      at_least: the fewest units that any layer keeps; all, if it has fewer. A ``left`` too small for that is exceeded.
      revive: let pruned units compete too, for methods whose weights live on behind their masks.

    Returns:
      The new masks, and how many weights they keep, int32. What a structure reserves stays in any case.
    """
    if not layers:
        return [], jnp.int32(0)
    tiles = [layer.structure.unit_size(layer.mask.shape) for layer in layers]
    by_magnitude = scores is None
    all_rank = revive and all(layer.structure.exchanges for layer in layers)  # which spares a look at the masks

    def looked_at(layers, *scores):
        leaves = _leaves(layers, *scores)
        live = [_candidates(leaf, revive) for leaf in layers]
        safe = [leaf.structure.reserved(value, mask, absolute=by_magnitude)
                for (leaf, value), mask in zip(leaves, live, strict=True)]  # fmt: skip
        reserved = [jnp.int32(0) if fixed is None else count_true(fixed) for fixed in safe]
        where = [leaf.structure.units(mask) if fixed is None else mask & ~fixed
                 for leaf, mask, fixed in zip(layers, live, safe, strict=True)]  # fmt: skip
        return (
            jnp.stack(reserved),
            [unit_scores(leaf.structure, value, signed=not by_magnitude) for leaf, value in leaves],
            where,
        )

    def renewed(layers, masks, where):
        # What a structure reserves is what was not to be chosen from.
        new = [leaf.structure.expand(mask, leaf.mask) if leaf.structure.exchanges
               else mask | (_candidates(leaf, revive) & ~free)
               for leaf, mask, free in zip(layers, masks, where, strict=True)]  # fmt: skip
        return jnp.stack(list(map(count_true, masks))), new

    reserved, ranked, where = each(layers, looked_at, *([] if scores is None else [scores]))
    room = jnp.maximum(jnp.asarray(left, jnp.int32) - jnp.sum(reserved, dtype=jnp.int32), 0)
    chosen = rank_globally(
        layers, ranked, room, where=None if all_rank else where, sizes=tiles, absolute=by_magnitude, at_least=at_least
    )
    kept, new = each(layers, renewed, chosen, where)
    return new, jnp.sum(reserved + kept * np.asarray(tiles, np.int32), dtype=jnp.int32)


def prune_layers(
    layers: Sequence[Layer],
    left: ArrayLike,
    *,
    scores: Sequence[jax.Array] | None = None,
    revive: bool = False,
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Keeps the units of largest score of each layer, with a given number for each.

    Args:
      layers: as for :func:`prune_globally`.
      left: how many units each layer keeps, int32, (layers,). Layers that keep n of every m do so whatever it says.
      scores, revive: as for :func:`prune_globally`.

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
        return [leaf.structure.reserved(value, _candidates(leaf, revive), absolute=by_magnitude)
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
        chosen = rank_layers(some, ranked, few, where=None if revive else where, absolute=by_magnitude)
        found.append((free, some.column(each(some, expanded, chosen))))
    if fixed:
        some = layers.some(fixed)
        found.append((fixed, some.column(each(some, reserved, *(values.some(fixed) for values in given)))))
    new = joined(found)
    return new, jnp.sum(counts(layers, new), dtype=jnp.int32)


def prune_to(
    layers: Sequence[Layer],
    sparsity: ArrayLike | Callable[[jax.Array], ArrayLike],
    step: jax.Array,
    scope: Literal["layer", "global"],
    *,
    at_least: ArrayLike = 0,
    revive: bool = False,
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Keeps the units of largest magnitude, up to a sparsity.

    Args:
      layers: as for :func:`prune_globally`.
      sparsity: the fraction of zeros, or a schedule of it; clipped to [0, 1], NaN prunes nothing.
      step: int32, for a schedule, which is read in double precision.
      scope: "global" or "layer": whether :func:`prune_globally` prunes or :func:`prune_layers`.
      at_least: the fewest units that any layer keeps; all, if it has fewer.
      revive: as for :func:`prune_globally`.

    Returns:
      The new masks, and how many weights they keep, int32.
    """
    with jax.enable_x64(True):
        zeros = jnp.nan_to_num(jnp.asarray(sparsity(step) if callable(sparsity) else sparsity, jnp.float64), nan=0.0)
        of_layers, of_all = counts_at(layers, jnp.clip(zeros, 0, 1))
    if scope == "global":
        return prune_globally(layers, of_all, at_least=at_least, revive=revive)
    sizes = [np.prod(layer.structure.unit_shape(layer.mask.shape)) for layer in layers]
    fewest = jnp.minimum(jnp.asarray(at_least, jnp.int32), jnp.asarray(sizes, jnp.int32))
    return prune_layers(layers, jnp.maximum(of_layers, fewest), revive=revive)


def _candidates(layer: Layer, revive: bool) -> jax.Array:
    """The weights that may be kept."""
    return jnp.ones_like(layer.mask) if revive else layer.mask


def prune_outputs(
    layers: Sequence[Layer],
    left: jax.Array,
    *,
    scores: Sequence[jax.Array] | None = None,
    at_least: ArrayLike = 0,
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Keeps the weights of largest score of each output, equally many of all outputs of a layer.

    Args:
      layers: as for :func:`prune_globally`, by single weights. A vector is ranked as a whole.
      left: how many weights each layer keeps, int32, (layers,), which its outputs share, rounded.
      scores: as for :func:`prune_globally`.
      at_least: the fewest weights that any layer keeps.

    Returns:
      The new masks, and how many weights they keep, int32.
    """
    if not layers:
        return [], jnp.int32(0)
    layers, by_magnitude = as_layers(layers).shaped, scores is None

    def of_layer(leaf, value, left):
        options = {"where": leaf.mask, "absolute": by_magnitude}
        if leaf.mask.ndim < 2:
            return top_k_mask(value, jnp.maximum(left, jnp.minimum(at_least, leaf.size)), **options)
        at = leaf.layout or Layout(leaf.mask.ndim - 2, leaf.mask.ndim - 1)
        return best_of_outputs(value, left, at_least, at, **options)

    def pruned(layers, left, *scores):
        return [of_layer(leaf, value, left[i]) for i, (leaf, value) in enumerate(_leaves(layers, *scores))]

    new = each(layers, pruned, jnp.asarray(left, jnp.int32), *([] if scores is None else [scores]))
    return new, jnp.sum(counts(layers, new), dtype=jnp.int32)


def _leaves(layers: Sequence[Layer], scores: Sequence[jax.Array] | None = None) -> list[tuple[Layer, jax.Array]]:
    """The layers, each with its scores, or its weights."""
    return list(zip(layers, [layer.weight for layer in layers] if scores is None else scores, strict=True))
