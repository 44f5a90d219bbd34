"""Drop and grow, the steps of dynamic sparse training, with exact counts.

Each is a function of layers of one unit size, as :func:`jaxsparse.transforms.on_units` hands them to a rule, and
returns a mask for each layer. Counts are int32 arrays of shape (layers,).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.allocation import exact_mean, exact_sum
from jaxsparse.positions import random_bits
from jaxsparse.selection import count_true, top_k_mask
from jaxsparse.transforms.layers import Layer, as_layers, counts, each
from jaxsparse.transforms.ranking import rank_globally, rank_layers

__all__ = [
    "counts", "drop_by_sign", "drop_globally", "drop_smallest", "drop_smallest_and_most_negative", "grow_by_output",
    "grow_largest", "grow_random", "losses", "sizes",
]  # fmt: skip

# The authors of sparse momentum leave outputs alone that would grow fewer weights than this.
_SMALLEST_OUTPUT_QUOTA = 10


def sizes(layers: Sequence[Layer]) -> np.ndarray:
    """The number of places in each layer."""
    return np.asarray([layer.size for layer in layers], np.int32)


def losses(kept: jax.Array, rates: ArrayLike) -> jax.Array:
    """The number of kept weights to drop at a drop fraction: ceil(rate * kept), at most all."""
    # 0.3 in float32 is a little more, and of 50 weights 15 go.
    exact = jnp.asarray(rates, jnp.float32) * kept.astype(jnp.float32) * (1 - 2.0**-22)
    return jnp.minimum(jnp.ceil(exact).astype(jnp.int32), kept)


def drop_smallest(layers: Sequence[Layer], kept: jax.Array, lose: jax.Array) -> Sequence[jax.Array]:
    """Drops the ``lose`` weights of smallest magnitude of each layer, of the ``kept`` that its mask has."""
    return rank_layers(layers, _weights(layers), kept - lose, where=_masks(layers), absolute=True, enough=True)


def drop_smallest_and_most_negative(layers: Sequence[Layer], kept: jax.Array, lose: jax.Array) -> Sequence[jax.Array]:
    """Drops half of ``lose`` by smallest magnitude, the other half from the most negative of what is left."""
    # The authors of sparse momentum keep only the most negative in the second half, a slip; this is what was meant.
    survivors = drop_smallest(layers, kept, (lose + 1) // 2)
    return rank_layers(layers, _weights(layers), kept - lose, where=survivors, enough=True)


def drop_by_sign(layers: Sequence[Layer], fraction: ArrayLike, resting: jax.Array) -> Sequence[jax.Array]:
    """Drops the smallest positive weights of each layer and, by themselves, the negative ones closest to 0.

    A fraction of each goes, the nearest number to it, and so does what is exactly 0. Layers that rest lose nothing.
    """

    def signs(layers):
        return [layer.mask & (layer.weight > 0) for layer in layers], [
            layer.mask & (layer.weight < 0) for layer in layers
        ]

    def all_that_stays(layers, rests, *kept):
        rows = zip(layers, rests, *kept, strict=True)
        return [jnp.where(rest, layer.mask, above | below) for layer, rest, above, below in rows]

    survivors = []
    for of_sign in each(layers, signs):
        there = counts(layers, of_sign)
        left = jnp.round(there.astype(jnp.float32) * (1 - jnp.asarray(fraction, jnp.float32))).astype(jnp.int32)
        left = jnp.clip(left, 0, there)  # float32 may round a large number up
        survivors.append(rank_layers(layers, _weights(layers), left, where=of_sign, absolute=True, enough=True))
    return each(layers, all_that_stays, resting, *survivors)


def drop_globally(layers: Sequence[Layer], kept: jax.Array, rate: ArrayLike, resting: jax.Array) -> Sequence[jax.Array]:
    """Drops the ceil(rate * kept) smallest weights of all layers that do not rest, ranked together."""
    everything = jnp.sum(kept, where=~resting, dtype=jnp.int32)

    def taking_part(layers, rests):
        return [layer.mask & ~rest for layer, rest in zip(layers, rests, strict=True)]

    def with_resting(layers, rests, survivors):
        return [left | (layer.mask & rest) for layer, rest, left in zip(layers, rests, survivors, strict=True)]

    ranked = each(layers, taking_part, resting)
    leave = everything - losses(everything, rate)
    survivors = rank_globally(layers, _weights(layers), leave, where=ranked, absolute=True)
    return each(layers, with_resting, resting, survivors)


def grow_largest(layers: Sequence[Layer], survivors: Sequence[jax.Array], gains: jax.Array) -> Sequence[jax.Array]:
    """Grows the ``gains`` missing weights of each layer whose signals are the largest; there must be as many."""
    return _grow(layers, survivors, gains, each(layers, lambda layers: [layer.signal for layer in layers]))


def grow_random(layers: Sequence[Layer], survivors: Sequence[jax.Array], gains: jax.Array) -> Sequence[jax.Array]:
    """Grows ``gains`` missing weights of each layer at random."""

    def draws(layers):
        # 30 bits, read as floats that are not negative: only their order means anything.
        return [
            jax.lax.bitcast_convert_type(random_bits(layer.key, layer.index, layer.mask) >> 2, jnp.float32)
            for layer in layers
        ]

    return _grow(layers, survivors, gains, each(layers, draws))


def grow_by_output(layers: Sequence[Layer], survivors: Sequence[jax.Array], gains: jax.Array) -> Sequence[jax.Array]:
    """Grows each output by its share of the layer's mean signal; the rest goes to the largest remaining signals."""

    def grown(layers, survivors, gains):
        new = []
        for layer, left, gain in zip(layers, survivors, gains, strict=True):
            if layer.layout is None:
                new.append(left | _by_output(layer.signal, ~left, gain))
            else:
                seen = _by_output(layer.layout.to_matrices(layer.signal), layer.layout.to_matrices(~left), gain)
                new.append(left | layer.layout.from_matrices(seen, left))
        return new

    return each(as_layers(layers).shaped, grown, survivors, gains)


def _grow(layers, survivors, gains, scores):
    if not layers[0].structure.exchanges:

        def grown(layers, scores, survivors, gains):
            rows = zip(layers, scores, survivors, gains, strict=True)
            return [layer.structure.grow(score, layer.mask, left, gain) for layer, score, left, gain in rows]

        return each(layers, grown, scores, survivors, gains)
    missing = each(layers, lambda _, survivors: [~left for left in survivors], survivors)
    new = rank_layers(layers, scores, gains, where=missing, absolute=True, enough=True)
    return each(layers, lambda _, *both: [left | more for left, more in zip(*both, strict=True)], survivors, new)


def _weights(layers: Sequence[Layer]) -> Sequence[jax.Array]:
    return each(layers, lambda layers: [layer.weight for layer in layers])


def _masks(layers: Sequence[Layer]) -> Sequence[jax.Array]:
    return each(layers, lambda layers: [layer.mask for layer in layers])


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
