"""Sparse momentum: prune by magnitude, redistribute and regrow by momentum.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*, 2019
(https://arxiv.org/abs/1907.04840). One mask update is :func:`jaxsparse.momentum_regrowth`; this is the link that calls
it at regular intervals.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import (
    Allocation,
    Sparsity,
    check_allocation,
    check_sparsities,
)
from jaxsparse.layouts import LayoutLike
from jaxsparse.methods.momentum_regrowth import Growth, Prune, Redistribution, check_options, exchange
from jaxsparse.structures import StructureLike
from jaxsparse.transforms.chain import align_signal
from jaxsparse.transforms.checks import check_range, check_schedule, check_steps
from jaxsparse.transforms.exchange import zeros_to_add_to
from jaxsparse.transforms.layers import on_units
from jaxsparse.transforms.mask_link import MaskState, every, given_masks, mask_link, random_start
from jaxsparse.trees import is_masked_node
from jaxsparse.user_warnings import warn

__all__ = ["SparseMomentumState", "sparse_momentum"]


class SparseMomentumState(MaskState):
    """State of :func:`sparse_momentum`; ``own`` is, with ``decay``, the exponential average of the gradients."""

    method = "sparse_momentum"
    needs_momentum = True


def sparse_momentum(
    sparsity: Sparsity,
    update_every: ArrayLike,
    *,
    prune_rate: ArrayLike | optax.Schedule = 0.5,
    growth: Growth = "momentum",
    redistribution: Redistribution = "momentum",
    prune: Prune = "magnitude",
    allocation: Allocation = "uniform",
    at_least: ArrayLike = 0,
    masks: Any = None,
    decay: ArrayLike | None = None,
    start_at: ArrayLike = 0,
    stop_at: ArrayLike | None = None,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Train a fixed number of weights, moved to where momentum is large (Dettmers and Zettlemoyer, 2019).

    A link: last in the chain.

    Every step, the proposed update u lands on the masks,

    .. math:: \Delta_i = u_i \text{ if } m_i \text{ else } -w_i

    so pruned weights are exactly 0 and the optimizer's momentum of missing weights goes on
    accumulating their gradients. On the first step after every ``update_every`` steps the masks
    first change by :func:`momentum_regrowth`: each layer loses its ``prune_rate`` weights of
    smallest magnitude, all layers together regrow as many, each layer by its share of
    the mean momentum, where the momentum of missing weights is largest. A weight that returns starts
    from 0 and takes that very step; one that is pruned and regrown at once keeps its value.

    The number of weights kept is the same at every step, exactly. (The authors draw
    Bernoulli masks and steer the count back by feedback; an exact count needs neither.)

    The momentum is the one that the optimizer stores, if the chain is
    :func:`jaxsparse.chain`. In a plain ``optax.chain`` pass it as ``tx.update(..., momentum=tree)``,
    or the proposed update is taken in its place, which works but makes every step more expensive.

    If optimizers of several kinds move parts of the params (``optax.partition``, ``optax.masked``,
    ``optax.contrib.muon``), layers compare by their mean momentum over that of all layers with an optimizer of the same
    kind. Optimizers of one kind are compared as they are, whatever their decay and learning rate.

    A layer that has not moved since its mask was chosen (``optax.freeze``, ``optax.set_to_zero``, ``stop_gradient``),
    or whose weights have no momentum at all while others have, keeps its mask and exchanges nothing with them, and
    :func:`jaxsparse.check` warns of it. But its first mask is as random as the others': leave frozen layers out by
    ``prunable``, for instance :func:`jaxsparse.all_but`.

    Args:
      sparsity: the fraction of zeros among the prunable weights, in [0, 1), possibly traced; or one for
        each prunable leaf: a mapping from path or glob ("fc1/kernel", "*/attn/*") to sparsity, of which the first match
        wins, or a function of path and leaf. These are
        of the start: then layers exchange weights as ``redistribution`` says; "nonzeros" about keeps their shares.
      update_every: steps between mask updates, int >= 1. With the step counted from 0, masks change on the
        steps that are positive multiples of it: the first step of every epoch but the first, if it is
        the length of an epoch. (``MultiSteps`` inside the chain: counted in mini-steps.)
      prune_rate: the share of a layer's weights that one update replaces, in [0, 1], or a schedule of the step
        such as :func:`jaxsparse.cosine_prune_rate`, which the authors use (from 0.5; 0.2 on ImageNet).
      growth: where weights return: "momentum" (the largest momentum of the layer), "random", or
        "momentum_neuron" (each output unit, of all layers of a stack too, by its share of the mean momentum).
      redistribution: what a layer's share of the regrown weights follows: "momentum" or "magnitude" (their mean
        over the layer's weights), "nonzeros" (how many weights are not 0) or "none" (the layer's size).
      prune: what goes: "magnitude" (the smallest of each layer), "SET" (half of them the smallest, half the most
        negative), or "global_magnitude" (the smallest of the whole network).
      allocation: how the initial masks share ``sparsity`` among the layers: "uniform", "erdos_renyi" or
        "erdos_renyi_kernel".
      at_least: the fewest weights (or units) that any layer keeps, at the start and at every mask update; all, if it
        has fewer. 0, as published: a layer that has lost its last weight has no momentum to share by and never regrows.
      masks: start from these instead of random ones, for instance from
        :func:`jaxsparse.magnitude_masks` of a pretrained network: like the params, bool, the
        scalar True for dense leaves. They set the budget and the sparse leaves; ``sparsity``, ``allocation`` and
        ``prunable`` are then not used. With a ``structure`` they keep whole units (and n of every m).
      decay: keep an own exponential average of the gradients with this decay, in [0, 1), and use it as the momentum.
        Costs a float32 copy of the sparse leaves. For optimizers without momentum, in a :func:`jaxsparse.chain`, which
        hands on the gradient.
      start_at, stop_at: mask updates happen only on steps in [start_at, stop_at).
      structure: what is kept or dropped as one, see :mod:`jaxsparse.structures`: "weight", "kernel", "channel",
        :func:`jaxsparse.block`, :func:`jaxsparse.n_of_m`, or a mapping from path to these. Everything is then counted
        in units, which have the mean of their weights' and of their momenta's absolute values, whatever their
        ``score``. (Signed momenta would cancel.) Units are redistributed, and ranked by "global_magnitude", among the
        layers whose units are of one size: others could not exchange any and keep the number of weights.
        ``n_of_m`` keeps n of every m weights at every step, whatever ``sparsity``: a layer loses its share of smallest
        magnitude, and every group regrows as many as it lost, by ``growth``; nothing goes to other layers.
      prunable: which leaves get masks, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.
      key: an int or PRNG key, possibly traced, for the initial masks and random growth.

    Returns:
      A gradient transformation with the state :class:`SparseMomentumState`: one byte a weight of sparse leaves, and
      a copy of them only with ``decay``. Its ``update`` needs the params.

    Raises:
      ValueError: for unknown options, options that a structure has no meaning for (``prune="SET"``, which needs
        signs; "momentum_neuron" with channels or n of m), numbers out of range, params with a replica axis, masks
        that do not fit their leaf or structure, an optimizer that stores no momentum (by ``init`` of
        :func:`jaxsparse.chain`), missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
      >>> tx = jaxsparse.chain(
      ...     optax.add_decayed_weights(5e-4),
      ...     optax.sgd(0.1, momentum=0.9, nesterov=True),
      ...     jaxsparse.sparse_momentum(
      ...         sparsity=0.9, update_every=540, prune_rate=jaxsparse.cosine_prune_rate(0.5, 54_000)
      ...     ),
      ... )
      >>> opt_state = tx.init(params)
      >>> print(int(jaxsparse.get_masks(opt_state)["kernel"].sum()))
      20

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing
      Performance <https://arxiv.org/abs/1907.04840>`_, 2019.

    .. warning::
      The link must stand last. In a plain ``optax.chain`` behind an optimizer without momentum, growth follows
      the last gradient alone.
    """
    check_options(growth, redistribution, prune, structure)
    check_allocation(allocation)
    check_steps("at_least", at_least, 0)
    if masks is None:
        check_sparsities(sparsity)
    check_range("decay", decay, 0, 1, open_end=True)
    check_schedule("prune_rate", prune_rate, steps=[0] if stop_at is None else [0, stop_at])

    def signal(updates, own, extra_args):
        if decay is not None:
            return own
        momentum = extra_args.get("momentum")
        if momentum is not None:
            return momentum
        if redistribution == "momentum" or growth.startswith("momentum"):
            warn(
                "sparse_momentum is handed no momentum and takes the proposed update for it, which makes every step "
                "more expensive: use jaxsparse.chain in place of optax.chain, or pass momentum= to update",
            )
        return updates

    def averaged(state, updates, params, extra_args):
        grad = extra_args.get("grad")
        if grad is None:
            warn(
                "sparse_momentum(decay=...) is handed no gradient and averages what it gets, which behind an optimizer "
                "is its update: use jaxsparse.chain in place of optax.chain, or pass grad= to update",
            )
        return _averaged(state.own, align_signal(updates if grad is None else grad, params, "grad"), decay, params)

    def change(layers, state):
        rate = prune_rate(state.count) if callable(prune_rate) else prune_rate
        rule = exchange(rate, growth, redistribution, prune, at_least)
        masks, resting = on_units(layers, rule, state.watched.resting)
        return masks, state.kept, resting

    return mask_link(
        SparseMomentumState,
        random_start(sparsity, allocation, at_least, structure, prunable, layout)
        if masks is None
        else given_masks(masks, structure, layout),
        change,
        when=every(update_every, start_at=start_at, stop_at=stop_at),
        signal=signal,
        own=None if decay is None else _sparse_zeros,
        own_update=None if decay is None else averaged,
        watch=True,
        structure=structure,
        layout=layout,
        key=key,
        draws=growth == "random",
    )


def _averaged(average: Any, gradients: list[Any], decay: ArrayLike, params: Any) -> Any:
    def step(old, g):
        if is_masked_node(old):
            return old
        g = jnp.zeros_like(old) if g is None else g.astype(old.dtype)
        # A step whose gradient overflowed, which an optimizer may skip, does not count: nothing would take its NaN out.
        return jnp.where(jnp.isfinite(g), (decay * old + (1 - decay) * g).astype(old.dtype), old)

    treedef = jax.tree.structure(params)
    olds = treedef.flatten_up_to(average)
    return treedef.unflatten([step(old, g) for old, g in zip(olds, gradients, strict=True)])


def _sparse_zeros(params: Any, masks: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    flat = zip(leaves, treedef.flatten_up_to(masks), strict=True)
    return treedef.unflatten([m if is_masked_node(m) else zeros_to_add_to(p) for p, m in flat])
