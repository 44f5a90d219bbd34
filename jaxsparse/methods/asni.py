r"""ASNI-I: global magnitude pruning on a schedule, in one round of training.

Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (https://arxiv.org/abs/2202.09284). The
author's code is followed (https://github.com/sdamadi/image-classification at 91f7b48, ``utils/pruning.py``). What the
paper does with the network that comes out, ASNI-II, is :mod:`jaxsparse.methods.amenable`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import check_total
from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike, check_structure
from jaxsparse.transforms.checks import check_schedule, check_steps, whole_steps
from jaxsparse.transforms.mask_link import MaskState, dense_start, every, mask_link
from jaxsparse.transforms.prune import prune_globally
from jaxsparse.transforms.scoring import scoring

__all__ = ["ASNIState", "asni", "asni_counts"]

_SMALLEST_SHARE = 0.001  # of the weights that are left: the author's code skips prunings of no more


class ASNIState(MaskState):
    """State of :func:`asni`. (With units of several weights, fewer may be kept than the schedule leaves.)"""

    method = "asni"


def asni(
    sparsity: ArrayLike | optax.Schedule,
    update_every: ArrayLike,
    *,
    score: Any = "magnitude",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prune the whole network by magnitude while it trains: ASNI-I (Damadi et al., 2022).

    A link: last in the chain.

    On the steps t = n, 2n, 3n, ..., n = ``update_every``, of the N weights that are left in all prunable leaves
    together, those of smallest magnitude go, in whatever layer they are:

    .. math:: \lfloor N \, q_t \rfloor, \qquad q_t = \frac{s_t - s_{t-n}}{1 - s_{t-n}}, \quad s_0 = 0

    which brings the fraction of zeros to about s, the schedule. Where q is at most 0.001 nothing goes, and these
    weights are not made up for later: the author's code does so, and ends a little below s. (A schedule is met exactly
    by :func:`jaxsparse.magnitude_pruning` with ``scope="global"``.) What is pruned stays pruned. Counts are exact, ties
    included (the lowest indices stay), and s is computed in double precision.

    Pruning happens before the update of its step, from the params as they come in. The author has n of one epoch and
    prunes at its end, so nothing is pruned after the last one: an evaluation at the end of an epoch sees the network as
    it was trained, and E epochs end at :math:`s_{(E-1)n}`, as in the author's tables.

    Args:
      sparsity: step (an int32) -> fraction of zeros, such as :func:`jaxsparse.sigmoid_sparsity`; later values are
        clipped to [0, 1]. A number is the fraction to reach at the next pruning: a constant one prunes once, at step n;
        one that ``optax.inject_hyperparams`` hands in anew on every step is a schedule.
      update_every: n, steps between prunings, int >= 1; the author has one epoch.
      score: what weights rank by, as for :func:`jaxsparse.magnitude_pruning`.
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer. 0, as published: nothing stops
        a layer from being emptied, which :func:`jaxsparse.check` then says.
      structure: what goes as one, see :mod:`jaxsparse.structures`: "weight", "kernel", "channel",
        :func:`jaxsparse.block`, :func:`jaxsparse.n_of_m`, or a mapping from path to these. Units of all leaves rank
        together by their scores, and stay from the largest down as long as they fit into the number of weights that the
        schedule leaves: it is never exceeded, and what is short of it by less than a unit is made up for by the next
        pruning. With ``n_of_m`` the n largest of every group always stay, the rest rank as single weights: a network
        that has 2:4 everywhere ends at exactly that if the schedule ends at 0.5 (or above).
      prunable: which leaves get masks, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`ASNIState`: one byte a weight of sparse leaves. Its ``update``
      needs the params.

    Raises:
      ValueError: for numbers out of range, scores that do not fit a leaf, a structure that does not fit a leaf and says
        "error" to that, params with a replica axis, 2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
      >>> tx = optax.chain(optax.sgd(0.0), asni(0.75, update_every=1))
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):  # nothing goes on step 0
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["kernel"].tolist()
      [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 7.0, 8.0]]

    References:
      Damadi, Nouri and Pirsiavash, `Amenable Sparse Network Investigator <https://arxiv.org/abs/2202.09284>`_, 2022.
    """
    check_schedule("sparsity", sparsity)
    check_steps("at_least", at_least, 0)
    update_every = whole_steps("update_every", update_every, 1)
    check_structure(structure)
    scores = scoring(score)

    def change(layers, state):
        values, nans = scores.of(layers)
        total = sum(layer.size for layer in layers)
        if callable(sparsity):
            # Counted from the first pruning on, for with units of several weights the masks may keep fewer.
            left = jax.lax.fori_loop(
                1,
                state.count // update_every + 1,
                lambda pruning, left: _left(sparsity, pruning * update_every, update_every, left, total),
                jnp.int32(total),
            )
        else:
            left = _left(sparsity, state.count, update_every, state.kept, total)
        return *prune_globally(layers, left, scores=values, at_least=at_least), None, nans

    return mask_link(
        ASNIState,
        dense_start(structure, prunable, layout),
        change,
        when=every(update_every),
        signal=scores.signal,
        own=scores.own,
        structure=structure,
        layout=layout,
    )


def asni_counts(sparsity: ArrayLike | optax.Schedule, weights: int, update_every: int, prunings: int) -> list[int]:
    """The number of weights that are left after each pruning of :func:`asni`.

    Args:
      sparsity: step -> fraction of zeros, or a number.
      weights: the number of prunable weights, below 2**31.
      update_every: as for :func:`asni`.
      prunings: how many, at least 0; the k-th is on step k times ``update_every``, from k = 1. (With a ``structure``,
        the numbers are what is left at most.)

    Examples:
      >>> import jaxsparse
      >>> schedule = jaxsparse.sigmoid_sparsity(0.98, steps=50 * 235, scale=5 * 235, begin=235)
      >>> asni_counts(schedule, 266_200, 235, 50)[-2:]  # LeNet-300-100 after 49 prunings, and after 50
      [7925, 7458]
    """
    check_total([weights])
    left = jax.jit(lambda step, kept: _left(sparsity, step, update_every, kept, weights))
    counts, kept = [], jnp.int32(weights)
    for pruning in range(1, prunings + 1):
        kept = left(jnp.int32(pruning * update_every), kept)
        counts.append(int(kept))
    return counts


def _left(
    sparsity: ArrayLike | optax.Schedule, step: ArrayLike, update_every: ArrayLike, kept: jax.Array, total: int
) -> jax.Array:
    """The number of the ``kept`` weights that are left after the pruning on a step, int32."""
    # In double precision, whatever else the program has: 14.7 million weights (VGG-16) leave nothing for the rounding
    # of float32, and every device has to find the same number.
    with jax.enable_x64(True):
        step, of = jnp.asarray(step, jnp.int32), kept.astype(jnp.float64)

        def zeros_at(step):
            value = sparsity(step) if callable(sparsity) else sparsity
            return jnp.clip(jnp.asarray(value).astype(jnp.float64), 0, 1)

        now, last = zeros_at(step), step - jnp.asarray(update_every, jnp.int32)
        if callable(sparsity):
            before = jnp.where(last > 0, zeros_at(jnp.maximum(last, 0)), 0.0)  # s_{t-n}
        else:
            before = 1 - of / max(total, 1)
        share = (now - before) / jnp.where(before < 1, 1 - before, 1.0)  # q_t
        left = of - jnp.where(share > _SMALLEST_SHARE, jnp.floor(of * share), 0.0)
        return jnp.minimum(left.astype(jnp.int32), kept)
