"""The mask update of sparse momentum: prune, redistribute, regrow.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, 2019 (https://arxiv.org/abs/1907.04840). Where the paper and
the authors' code (https://github.com/TimDettmers/sparse_learning at e19ff16, ``truncate_weights``) differ, the code is
followed; the numbered steps below are in its order.

Pruning granularity may be coarser than a weight (``structure=``). Then the same rule runs on units: their scores take
the place of the weights, and those of the momentum the place of the momentum.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.allocation import apportion, exact_mean, exact_sum, with_floor
from jaxsparse.layouts import LayoutLike
from jaxsparse.masks import as_key
from jaxsparse.selection import count_true
from jaxsparse.structures import StructureLike, check_structure, made_of, require_signs
from jaxsparse.transforms import regrow
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.exchange import exchanged_masks
from jaxsparse.transforms.layers import Layer, Rule, each

__all__ = ["Growth", "Prune", "Redistribution", "check_options", "exchange", "momentum_regrowth"]

Growth: TypeAlias = Literal["momentum", "random", "momentum_neuron"]
Redistribution: TypeAlias = Literal["momentum", "magnitude", "nonzeros", "none"]
Prune: TypeAlias = Literal["magnitude", "SET", "global_magnitude"]


def momentum_regrowth(
    params: Any,
    momentum: Any,
    masks: Any,
    prune_rate: ArrayLike,
    *,
    growth: Growth = "momentum",
    redistribution: Redistribution = "momentum",
    prune: Prune = "magnitude",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
    key: ArrayLike | None = None,
) -> Any:
    """One mask update of sparse momentum: prune, redistribute, regrow.

    A pure function, the heart of :func:`sparse_momentum`, where the options are explained. In order:

    1. Each layer's share v of what will be regrown, from the masks as they come in: its mean momentum, divided by
       the sum over layers.
    2. Its prune rate: min(p, sparsity) for a layer that is dense (sparsity below 0.2) and growing (v above the mean).
    3. Prune the ceil(rate * kept) weights of smallest magnitude of each layer.
    4. Regrow as many as were pruned in all: v * pruned in each layer, rounded up (what is then too much is taken from
       the largest shares), at most 99% of its free places; what does not fit is shared equally by the layers that have
       room.
    5. Within a layer, the missing weights of largest momentum return (those just pruned among them).

    The masks that come out keep exactly as many weights as those that came in. The 99% give way if the number could not
    be met with them. Without any momentum (v all 0) every layer regrows what it lost; a layer without any, where others
    have some, keeps its mask.

    Args:
      params: the weights, a pytree.
      momentum: the momentum of all weights, missing ones too: like ``params``. Its scale does not matter, if it is
        one for all layers.
      masks: like ``params``: bool arrays, and the scalar True or ``MaskedNode`` for dense leaves.
      prune_rate: the share of each layer's weights to replace, in [0, 1], possibly traced.
      growth, redistribution, prune, at_least, structure, layout: as for :func:`sparse_momentum`. With a structure, read
        "unit" for "weight" above, and "layers whose units are of one size" for "layers".
      key: an int or PRNG key, for ``growth="random"`` only.

    Returns:
      The new masks, of the form of ``masks``.

    Raises:
      ValueError: for unknown options, a leaf that does not fit, masks that keep parts of units, or random growth
        without a key.

    Examples:
      >>> import jax.numpy as jnp
      >>> weights = {"w": jnp.array([[3.0, 0.1, 0.0, 0.0]])}
      >>> momentum = {"w": jnp.array([[0.0, 0.0, 1.0, 5.0]])}
      >>> momentum_regrowth(weights, momentum, {"w": jnp.array([[True, True, False, False]])}, 0.5)["w"].tolist()
      [[True, False, False, True]]
    """
    check_options(growth, redistribution, prune, structure)
    check_range("prune_rate", prune_rate, 0, 1)
    if key is None and growth == "random":
        raise ValueError('growth="random" needs a key')
    rule = exchange(prune_rate, growth, redistribution, prune, at_least)
    draw = as_key(0 if key is None else key)
    return exchanged_masks(params, momentum, masks, rule, structure, layout, key=draw)


_SHARES = {
    "momentum": lambda layer: exact_mean(layer.signal, layer.mask),
    "magnitude": lambda layer: exact_mean(layer.weight, layer.mask),
    "nonzeros": lambda layer: count_true(layer.mask & (layer.weight != 0)).astype(jnp.float32),
    "none": lambda layer: jnp.float32(layer.size),
}
_PRUNE = {"magnitude": regrow.drop_smallest, "SET": regrow.drop_smallest_and_most_negative}
_GROWTH = {
    "momentum": regrow.grow_largest,
    "random": regrow.grow_random,
    "momentum_neuron": regrow.grow_by_output,
}


def exchange(
    prune_rate: ArrayLike, growth: Growth, redistribution: Redistribution, prune: Prune, at_least: ArrayLike
) -> Rule:
    """The mask update as a rule for :func:`jaxsparse.transforms.on_units`, of layers and which of them are frozen."""

    def shares_of(layers):
        return jnp.stack([_SHARES[redistribution](layer) for layer in layers])

    def rule(layers, frozen):
        rate, sizes = jnp.asarray(prune_rate, jnp.float32), regrow.sizes(layers)
        kept = regrow.counts(layers)
        if not layers[0].structure.exchanges:  # every group of n of m regrows what it lost
            lose = jnp.where(frozen, 0, regrow.losses(kept, rate))
            return _GROWTH[growth](layers, _PRUNE[prune](layers, kept, lose), lose), frozen

        # 1. Shares of the regrowth, on the masks before pruning.
        values = jnp.where(frozen, 0, each(layers, shares_of))
        if redistribution == "momentum" and len({layer.kind for layer in layers}) > 1:
            values /= _scales(layers, jnp.where(values > 0, sizes, 0))
        total = exact_sum(values)
        shares = values / jnp.where(total > 0, total, 1)
        # Without a share nothing would come back of what a layer loses: it rests, as if it were not there.
        resting = frozen | (values == 0) & (total > 0) if redistribution == "momentum" else frozen

        # 2. A dense layer that is still growing prunes at min(p, sparsity).
        sparsity = (sizes - kept).astype(jnp.float32) / np.maximum(sizes, 1).astype(np.float32)
        mean_share = jnp.asarray(1 / np.arange(1, len(layers) + 1), jnp.float32)[jnp.sum(~resting, dtype=jnp.int32) - 1]
        growing = (sparsity < 0.2) & (shares > mean_share)
        rates = jnp.where(growing, jnp.minimum(sparsity, rate), rate)

        # 3. Prune. Exactly ceil(rate * kept) of each layer, or of the whole.
        if prune == "global_magnitude":
            survivors = regrow.drop_globally(layers, kept, rate, resting)
            lost = kept - regrow.counts(layers, survivors)
        else:
            lost = jnp.where(resting, 0, regrow.losses(kept, rates))
            survivors = _PRUNE[prune](layers, kept, lost)
        surviving = kept - lost

        # 4. How many return to each layer: the shares, with what overflows spread over the rest. Rounded up, as in the
        # authors' code: step 3 takes at least one weight of every layer, so a small one would dwindle away.
        regrown = jnp.sum(lost, dtype=jnp.int32)
        free = jnp.where(resting, 0, sizes - surviving)
        capped = free - (free + 99) // 100  # floor(0.99 * free)
        capacity = jnp.where(jnp.sum(capped, dtype=jnp.int32) >= regrown, capped, free)
        quotas = jnp.where(total > 0, shares * regrown.astype(jnp.float32), lost.astype(jnp.float32))
        gains = apportion(quotas, regrown, capacity, round_up=True)
        if isinstance(at_least, jax.core.Tracer) or at_least:
            gains = with_floor(gains, jnp.clip(at_least - surviving, 0, free))

        # 5. Which ones return.
        return _GROWTH[growth](layers, survivors, gains), resting

    return rule


def _scales(layers: list[Layer], sizes: jax.Array) -> jax.Array:
    """For each layer the mean momentum of all layers whose optimizer is of the same kind; 1 where there is none.

    Layers of size 0 do not count.
    """
    sums = each(layers, lambda layers: jnp.stack([exact_sum(layer.signal) for layer in layers]))
    sums = jnp.where(sizes > 0, sums, 0)
    same = np.asarray([[a.kind == b.kind for b in layers] for a in layers])
    terms = [jnp.maximum(jnp.sum(sizes, where=row), 1).astype(jnp.float32) for row in same]
    means = jnp.stack([exact_sum(sums, row) / n for row, n in zip(same, terms, strict=True)])
    return jnp.where(means > 0, means, 1)


def check_options(growth: str, redistribution: str, prune: str, structure: StructureLike) -> None:
    """Raises a ValueError for unknown options and for those that a structure has no meaning for."""
    for name, value, options in (
        ("growth", growth, Growth),
        ("redistribution", redistribution, Redistribution),
        ("prune", prune, Prune),
    ):
        if value not in get_args(options):
            raise ValueError(f"{name} must be one of {list(get_args(options))}, got {value!r}")
    check_structure(structure)
    if prune == "SET":
        require_signs(structure, 'prune="SET" takes the most negative weights')
    for unit in structure.values() if isinstance(structure, Mapping) else [structure]:
        kind = made_of(unit)
        if growth == "momentum_neuron" and not kind.splits_outputs:
            raise ValueError(
                f'growth="momentum_neuron" gives every output its share of what is regrown, got {unit!r}: a channel is '
                "all of its output, and with n of m every group regrows what it lost"
            )
