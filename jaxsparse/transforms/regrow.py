"""Drop and grow, the steps of dynamic sparse training, with exact counts.

Each is a function of layers of one unit size, as :func:`jaxsparse.transforms.on_units` hands them to a rule, and
returns a mask for each layer. Counts are int32 arrays of shape (layers,). In a deep network, call them by
:func:`jaxsparse.transforms.each`, all but :func:`drop_globally`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.allocation import exact_mean, exact_sum
from jaxsparse.selection import count_true, global_top_k_masks, random_scores, top_k_mask, top_k_masks
from jaxsparse.transforms.layers import Layer, each, stacks

__all__ = [
    "counts", "drop_globally", "drop_smallest", "drop_smallest_and_most_negative", "grow_by_output", "grow_largest",
    "grow_random", "losses", "sizes",
]  # fmt: skip

# The authors of sparse momentum leave outputs alone that would grow fewer weights than this.
_SMALLEST_OUTPUT_QUOTA = 10


def sizes(layers: Sequence[Layer]) -> np.ndarray:
    """The number of places in each layer."""
    return np.asarray([layer.size for layer in layers], np.int32)


def counts(layers: Sequence[Layer], masks: Sequence[jax.Array] | None = None) -> jax.Array:
    """The number of weights that the mask of each layer, or another mask for each, keeps."""
    masks = [layer.mask for layer in layers] if masks is None else masks
    return jnp.stack(list(map(count_true, masks))) if masks else jnp.zeros(0, jnp.int32)


def losses(kept: jax.Array, rates: ArrayLike) -> jax.Array:
    """The number of kept weights to drop at a drop fraction: ceil(rate * kept), at most all."""
    return jnp.minimum(jnp.ceil(jnp.asarray(rates, jnp.float32) * kept.astype(jnp.float32)).astype(jnp.int32), kept)


def drop_smallest(layers: Sequence[Layer], lose: jax.Array) -> list[jax.Array]:
    """Drops the ``lose`` weights of smallest magnitude of each layer."""
    weights, masks = [layer.weight for layer in layers], [layer.mask for layer in layers]
    return top_k_masks(weights, counts(layers) - lose, where=masks, absolute=True)


def drop_smallest_and_most_negative(layers: Sequence[Layer], lose: jax.Array) -> list[jax.Array]:
    """Drops half of ``lose`` by smallest magnitude, the other half from the most negative of what is left."""
    # The authors of sparse momentum keep only the most negative in the second half, a slip; this is what was meant.
    weights, kept = [layer.weight for layer in layers], counts(layers)
    survivors = drop_smallest(layers, (lose + 1) // 2)
    return top_k_masks(weights, kept - lose, where=survivors)


def drop_globally(layers: Sequence[Layer], rate: ArrayLike, resting: jax.Array) -> list[jax.Array]:
    """Drops the ceil(rate * kept) smallest weights of all layers that do not rest, ranked together."""
    everything = jnp.sum(each(layers, counts), where=~resting)

    def taking_part(layers, rests):
        return [layer.mask & ~rest for layer, rest in zip(layers, rests, strict=True)]

    def with_resting(layers, rests, survivors):
        return [left | (layer.mask & rest) for layer, rest, left in zip(layers, rests, survivors, strict=True)]

    ranked = each(layers, taking_part, resting)
    weights = [layer.weight for layer in layers]
    survivors = global_top_k_masks(
        weights, everything - losses(everything, rate), where=ranked, absolute=True, stacks=stacks(layers)
    )
    return each(layers, with_resting, resting, survivors)


def grow_largest(layers: Sequence[Layer], survivors: Sequence[jax.Array], gains: jax.Array) -> list[jax.Array]:
    """Grows the ``gains`` missing weights of each layer whose signals are the largest."""
    return _grow(layers, survivors, gains, [layer.signal for layer in layers])


def grow_random(layers: Sequence[Layer], survivors: Sequence[jax.Array], gains: jax.Array) -> list[jax.Array]:
    """Grows ``gains`` missing weights of each layer at random."""
    draws = [random_scores(jax.random.fold_in(layer.key, layer.index), layer.mask.shape) for layer in layers]
    return _grow(layers, survivors, gains, draws)


def grow_by_output(layers: Sequence[Layer], survivors: Sequence[jax.Array], gains: jax.Array) -> list[jax.Array]:
    """Grows each output by its share of the layer's mean signal; the rest goes to the largest remaining signals."""
    grown = []
    for layer, left, gain in zip(layers, survivors, gains, strict=True):
        if layer.layout is None:
            grown.append(left | _by_output(layer.signal, ~left, gain))
        else:
            seen = _by_output(layer.layout.to_matrices(layer.signal), layer.layout.to_matrices(~left), gain)
            grown.append(left | layer.layout.from_matrices(seen, left))
    return grown


def _grow(layers, survivors, gains, scores):
    if not layers[0].structure.exchanges:
        rows = zip(layers, scores, survivors, gains, strict=True)
        return [layer.structure.grow(score, layer.mask, left, gain) for layer, score, left, gain in rows]
    grown = top_k_masks(scores, gains, where=[~left for left in survivors], absolute=True)
    return [left | new for left, new in zip(survivors, grown, strict=True)]


def _by_output(signal: jax.Array, missing: jax.Array, gain: jax.Array) -> jax.Array:
    if signal.ndim < 2:
        return top_k_mask(signal, gain, where=missing, absolute=True)
    means = exact_mean(signal, axis=tuple(range(signal.ndim - 1))).reshape(-1)
    total = exact_sum(means)
    # A little less than the share, lest rounding hands out more than there is.
    shares = means / jnp.where(total > 0, total, 1) * (1 - 2.0**-20)
    quotas = jnp.floor(shares * gain.astype(jnp.float32)).astype(jnp.int32)
    quotas = jnp.where(quotas < _SMALLEST_OUTPUT_QUOTA, 0, quotas)
    grown = top_k_mask(signal, quotas, where=missing, absolute=True, axis=-1)
    return grown | top_k_mask(signal, gain - count_true(grown), where=missing & ~grown, absolute=True)
