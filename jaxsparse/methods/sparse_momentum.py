"""Sparse momentum: prune by magnitude, redistribute and regrow by momentum.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without
Losing Performance*, 2019 (https://arxiv.org/abs/1907.04840). Where the paper and the authors'
code (https://github.com/TimDettmers/sparse_learning at e19ff16, ``truncate_weights``) differ, the
code is followed; the numbered steps below are in its order.

What is kept or dropped as one may also be larger than a weight (``structure=``). Then the same rule runs on units:
their scores take the place of the weights, and those of the momentum the place of the momentum.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import (
    Allocation,
    Sparsity,
    apportion,
    check_allocation,
    check_sparsities,
    check_total,
    exact_mean,
    exact_sum,
    with_floor,
)
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.links import (
    align_signal,
    check_budget,
    check_range,
    check_steps,
    check_zeros,
    land_on_masks,
    momentum_kinds,
    on_update_steps,
    refuse_replicated,
    require_bool,
    require_params,
)
from jaxsparse.masks import as_key, copied_masks, random_masks, validate_masks
from jaxsparse.placement import is_abstract, varying_like
from jaxsparse.selection import count_true, global_top_k_masks, random_scores, top_k_mask, top_k_masks
from jaxsparse.structures import (
    Structure,
    StructureLike,
    channel,
    check_structure,
    check_units,
    mask_structures,
    n_of_m,
    unit_scores,
    weight,
)
from jaxsparse.trees import is_masked_node, leaf_paths

__all__ = ["SparseMomentumState", "momentum_regrowth", "sparse_momentum"]

Growth: TypeAlias = Literal["momentum", "random", "momentum_neuron"]
Redistribution: TypeAlias = Literal["momentum", "magnitude", "nonzeros", "none"]
Prune: TypeAlias = Literal["magnitude", "SET", "global_magnitude"]
# The authors' code leaves units alone that would grow fewer weights than this.
_SMALLEST_NEURON_QUOTA = 10


class SparseMomentumState(NamedTuple):
    """State of :func:`sparse_momentum`.

    Attributes:
      count: (), int32: the updates so far.
      masks: like the params: bool arrays, ``optax.MaskedNode()`` for dense leaves.
      momentum: with ``decay``, the exponential average of the gradients: like ``masks``, in
        the dtypes of the params; ``optax.EmptyState()`` without.
      budget: (), int32: how many weights the masks keep, at every step.
      nan_scores: (), int32: NaNs met among the weights and momenta that masks were chosen by.
      rng_key: (), typed PRNG key: for the random choices of the next mask update.
      fingerprints: (sparse leaves,), uint32: of each one's weights when its mask was last chosen. One that still has
        the same weights at the next mask update is frozen.
      resting: (sparse leaves,), bool: which kept their masks in the last mask update, since they are frozen or
        without any momentum.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    masks: Any
    momentum: Any
    budget: jax.Array
    nan_scores: jax.Array
    rng_key: jax.Array
    fingerprints: jax.Array
    resting: jax.Array

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """Whether the momentum has to come from an optimizer before this link."""
        return isinstance(self.momentum, optax.EmptyState)

    def problems(self, params: Any | None) -> list[str]:
        """NaN scores seen, masks off their budget, pruned weights that are not zero."""
        who = "sparse_momentum"
        found = check_budget(self.masks, self.budget, who)
        nans = int(jnp.max(jax.tree.leaves(self.nan_scores)[0]))
        if nans:
            found.append(
                f"{who}: {nans} NaN among the weights and momenta when masks were updated. They rank last, so "
                "the masks are valid, but the training has diverged"
            )
        return found + ([] if params is None else check_zeros(self.masks, params, who))

    def notes(self) -> list[str]:
        """Layers that took no part in the last mask update."""
        resting = jax.device_get(jax.tree.leaves(self.resting)[0])  # flax.nnx wraps the leaves of an optimizer state
        resting = resting.any(axis=tuple(range(resting.ndim - 1)))
        return [
            f"sparse_momentum: {path} kept its mask in the last mask update, because it does not move or has no "
            "momentum: it is frozen, or no gradient reaches it. If it is meant to be frozen, leave it out, or it stays "
            f"as sparse as it was at the start: prunable=jaxsparse.all_but({path!r})"
            for path, rests in zip(leaf_paths(self.masks), resting, strict=True)
            if rests
        ]


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
    r"""Sparse momentum (Dettmers and Zettlemoyer, 2019). A link: last in the chain.

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
    or the proposed update is taken in its place, which works but makes every step dearer.

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
        Costs a copy of the sparse leaves. For optimizers without momentum.
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
    _check_modes(growth, redistribution, prune, structure)
    check_allocation(allocation)
    check_steps("at_least", at_least, 0)
    if masks is None:
        check_sparsities(sparsity)
    check_steps("update_every", update_every, 1)
    check_steps("start_at", start_at, 0)
    check_steps("stop_at", stop_at, 0)
    check_range("decay", decay, 0, 1, open_end=True)
    if not callable(prune_rate):
        check_range("prune_rate", prune_rate, 0, 1)

    def init_fn(params):
        refuse_replicated(params, "sparse_momentum")
        mask_key, rng_key = jax.random.split(as_key(key))
        if masks is None:
            drawn = random_masks(
                params, sparsity, allocation=allocation, at_least=at_least, prunable=prunable, structure=structure,
                layout=layout, key=mask_key,
            )  # fmt: skip
            start = validate_masks(drawn, params)
        else:
            start = validate_masks(masks, params)
            check_units(start, mask_structures(structure, params, start, layout=layout))
            start = copied_masks(start, params)
            check_total(mask.size for mask in jax.tree.leaves(start))
        flat, weights = jax.tree.leaves(start), _masked_leaves(params, start)
        unknown = any(map(is_abstract, weights))
        return SparseMomentumState(
            count=jnp.zeros([], jnp.int32),
            masks=start,
            momentum=optax.EmptyState() if decay is None else _sparse_zeros(params, start),
            budget=sum(map(count_true, flat), jnp.zeros([], jnp.int32)),
            nan_scores=varying_like(jnp.zeros([], jnp.int32), params),
            rng_key=rng_key,
            fingerprints=jnp.zeros(len(flat), jnp.uint32) if unknown else _fingerprints(weights, flat),
            resting=varying_like(jnp.zeros(len(flat), bool), params),
        )

    def update_fn(updates, state, params=None, *, grad=None, momentum=None, **extra_args):
        del extra_args
        require_params(params, "sparse_momentum")
        require_bool(state.masks, "sparse_momentum")
        own = state.momentum
        if decay is not None:
            gradients = align_signal(updates if grad is None else grad, params, "grad")
            own = _averaged(own, gradients, decay, jax.tree.structure(params))
        signal = own if decay is not None else updates if momentum is None else momentum
        if signal is updates and (redistribution == "momentum" or growth.startswith("momentum")):
            warnings.warn(
                "sparse_momentum is handed no momentum and takes the proposed update for it, which makes every step "
                "dearer: use jaxsparse.chain in place of optax.chain, or pass momentum= to update",
                stacklevel=2,
            )

        def changed(old):
            masks, nan_scores, rng_key, fingerprints, _ = old
            rng_key, draw = jax.random.split(rng_key)
            rate = prune_rate(state.count) if callable(prune_rate) else prune_rate
            flat = _Leaves.of(params, signal, masks, structure, layout)
            resting = _fingerprints(flat.weights, flat.masks) == fingerprints
            new, nans, resting = _updated(flat, rate, growth, redistribution, prune, at_least, draw, resting)
            return flat.rebuild(new), nan_scores + nans, rng_key, _fingerprints(flat.weights, new), resting

        due = (state.count > 0) & (state.count % update_every == 0) & (state.count >= start_at)
        if stop_at is not None:
            due &= state.count < stop_at
        old = state.masks, state.nan_scores, state.rng_key, state.fingerprints, state.resting
        new_masks, nan_scores, rng_key, fingerprints, resting = on_update_steps(due, changed, old)
        return land_on_masks(updates, params, new_masks), SparseMomentumState(
            count=optax.safe_increment(state.count),
            masks=new_masks,
            momentum=own,
            budget=state.budget,
            nan_scores=nan_scores,
            rng_key=rng_key,
            fingerprints=fingerprints,
            resting=resting,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    _check_modes(growth, redistribution, prune, structure)
    check_range("prune_rate", prune_rate, 0, 1)
    if key is None and growth == "random":
        raise ValueError('growth="random" needs a key')
    checked = validate_masks(masks, params)
    check_units(checked, mask_structures(structure, params, checked, layout=layout))
    flat = _Leaves.of(params, momentum, checked, structure, layout)
    moving = jnp.zeros(len(flat.masks), bool)
    draw = as_key(0 if key is None else key)
    new, *_ = _updated(flat, prune_rate, growth, redistribution, prune, at_least, draw, moving)
    renewed = flat.rebuild(new)
    return jax.tree.map(
        lambda n, old: old if is_masked_node(n) else n, renewed, masks, is_leaf=is_masked_node
    )  # fmt: skip


def _updated(leaves: "_Leaves", prune_rate, growth, redistribution, prune, at_least, key, frozen):
    """The new masks of the sparse leaves, the number of NaN scores seen, and which leaves rest: keep their masks.

    Layers regrow together if their units are of one size; those that keep n of every m, each by itself.
    """
    new, nans = list(leaves.masks), 0
    resting = frozen
    classes: dict[int, list[int]] = {}
    for i, unit in enumerate(leaves.structures):
        if isinstance(unit, n_of_m):
            rate = jnp.where(frozen[i], 0, prune_rate)
            new[i], seen = _regrow_in_groups(
                unit, leaves.weights[i], leaves.momenta[i], leaves.masks[i], rate, growth, _draw(key, i)
            )
            nans += seen
        else:
            classes.setdefault(unit.unit_size(leaves.masks[i].shape), []).append(i)
    for members in classes.values():
        # Layers compare their means, whatever score they have elsewhere: units of one size rank alike by both.
        units = [dataclasses.replace(leaves.structures[i], score="mean") for i in members]
        weights, momenta = (
            [unit_scores(unit, values[i]) for unit, i in zip(units, members, strict=True)]
            for values in (leaves.weights, leaves.momenta)
        )
        masks = [unit.units(leaves.masks[i]) for unit, i in zip(units, members, strict=True)]
        draws = [_draw(key, i) for i in members]
        kinds, layouts = ([every[i] for i in members] for every in (leaves.kinds, leaves.layouts))
        which = np.asarray(members)
        grown, seen, rest = _regrow(
            weights,
            momenta,
            masks,
            prune_rate,
            growth,
            redistribution,
            prune,
            at_least,
            draws,
            kinds,
            layouts,
            frozen[which],
        )
        for unit, i, mask in zip(units, members, grown, strict=True):
            new[i] = unit.expand(mask, leaves.masks[i])
        nans += seen
        resting = resting.at[which].set(rest)
    return new, nans, resting


def _regrow_in_groups(unit, weights, momentum, mask, prune_rate, growth, draw):
    """The new mask of a leaf of which n of every m weights stay, and the number of NaN scores seen."""
    kept = count_true(mask)
    lose = jnp.ceil(jnp.asarray(prune_rate, jnp.float32) * kept.astype(jnp.float32)).astype(jnp.int32)
    lose = jnp.minimum(lose, kept)
    survivors = top_k_mask(weights, kept - lose, where=mask, absolute=True)
    lost = unit.counts(mask) - unit.counts(survivors)
    scores = draw(mask.shape) if growth == "random" else momentum
    grown = unit.top(scores, lost, where=~survivors, absolute=True)
    return survivors | grown, count_true(jnp.isnan(weights) & mask) + count_true(jnp.isnan(momentum))


def _draw(key, i):
    """Random scores for leaf i, made only where they are asked for."""
    return lambda shape: random_scores(jax.random.fold_in(key, i), shape)


def _regrow(
    weights, momenta, masks, prune_rate, growth, redistribution, prune, at_least, draws, kinds, layouts, frozen
):
    """The new masks of layers that regrow together, given as lists, the number of NaN scores seen, and which rest."""
    prune_rate = jnp.asarray(prune_rate, jnp.float32)
    sizes = np.asarray([mask.size for mask in masks], np.int32)
    kept = jnp.stack([count_true(mask) for mask in masks])

    # 1. Shares of the regrowth, on the masks before pruning.
    statistic = {
        "momentum": lambda m, _, mask: exact_mean(m, mask),
        "magnitude": lambda _, w, mask: exact_mean(w, mask),
        "nonzeros": lambda _, w, mask: count_true(mask & (w != 0)).astype(jnp.float32),
        "none": lambda _, __, mask: jnp.float32(mask.size),
    }[redistribution]
    values = jnp.stack([statistic(*leaf) for leaf in zip(momenta, weights, masks, strict=True)])
    values = jnp.where(frozen, 0, values)
    if redistribution == "momentum" and len(set(kinds)) > 1:
        values /= _scales(momenta, kinds, jnp.where(values > 0, sizes, 0))
    total = exact_sum(values)
    shares = values / jnp.where(total > 0, total, 1)
    # Without a share nothing would come back of what a layer loses: it rests, as if it were not there.
    resting = frozen | (values == 0) & (total > 0) if redistribution == "momentum" else frozen

    # 2. A dense layer that is still growing prunes at min(p, sparsity).
    sparsity = (sizes - kept).astype(jnp.float32) / np.maximum(sizes, 1).astype(np.float32)
    mean_share = jnp.asarray(1 / np.arange(1, len(masks) + 1), jnp.float32)[jnp.sum(~resting) - 1]
    growing = (sparsity < 0.2) & (shares > mean_share)
    rates = jnp.where(growing, jnp.minimum(sparsity, prune_rate), prune_rate)

    # 3. Prune. Exactly ceil(rate * kept) of each layer, or of the whole.
    lose = jnp.minimum(jnp.ceil(rates * kept.astype(jnp.float32)).astype(jnp.int32), kept)
    lose = jnp.where(resting, 0, lose)
    if prune == "magnitude":
        survivors = top_k_masks(weights, kept - lose, where=masks, absolute=True)
    elif prune == "SET":
        # The authors' code keeps only the most negative in its second half, a slip; this is what was meant.
        survivors = top_k_masks(weights, kept - (lose + 1) // 2, where=masks, absolute=True)
        survivors = top_k_masks(weights, kept - lose, where=survivors)
    else:
        still = [mask & rests for mask, rests in zip(masks, resting, strict=True)]
        everything = jnp.sum(kept, where=~resting)
        lose_all = jnp.ceil(prune_rate * everything.astype(jnp.float32)).astype(jnp.int32)
        lose_all = jnp.minimum(lose_all, everything)
        ranked = [mask & ~rests for mask, rests in zip(masks, resting, strict=True)]
        survivors = global_top_k_masks(weights, everything - lose_all, where=ranked, absolute=True)
        survivors = [mask | rest for mask, rest in zip(survivors, still, strict=True)]
        lose = kept - jnp.stack([count_true(mask) for mask in survivors])
    surviving, lost = kept - lose, lose

    # 4. How many return to each layer: the shares, with what overflows spread over the rest. Rounded up, as in the
    # authors' code: step 3 takes at least one weight of every layer, so a small one would dwindle away.
    regrow = jnp.sum(lost)
    free = jnp.where(resting, 0, sizes - surviving)
    capped = free - (free + 99) // 100  # floor(0.99 * free)
    capacity = jnp.where(jnp.sum(capped) >= regrow, capped, free)
    quotas = jnp.where(total > 0, shares * regrow.astype(jnp.float32), lost.astype(jnp.float32))
    gains = apportion(quotas, regrow, capacity, round_up=True)
    if isinstance(at_least, jax.core.Tracer) or at_least:
        gains = with_floor(gains, jnp.clip(at_least - surviving, 0, free))

    # 5. Which ones return.
    missing = [~mask for mask in survivors]
    if growth == "momentum":
        grown = top_k_masks(momenta, gains, where=missing, absolute=True)
    elif growth == "random":
        scores = [draw(mask.shape) for draw, mask in zip(draws, masks, strict=True)]
        grown = top_k_masks(scores, gains, where=missing)
    else:
        grown = [_grow_by_neuron(*leaf) for leaf in zip(momenta, missing, gains, layouts, strict=True)]
    # Pruned weights are 0. In one pass: a weight and its momentum count as one.
    nans = sum(count_true(jnp.isnan(w) | jnp.isnan(m)) for w, m in zip(weights, momenta, strict=True))
    return [s | g for s, g in zip(survivors, grown, strict=True)], nans, resting


def _scales(momenta: list[jax.Array], kinds: list[Any], sizes: jax.Array) -> jax.Array:
    """For each layer the mean momentum of all layers whose optimizer is of the same kind; 1 where there is none.

    Layers of size 0 do not count.
    """
    sums = jnp.where(sizes > 0, jnp.stack([exact_sum(m) for m in momenta]), 0)
    same = np.asarray([[a == b for b in kinds] for a in kinds])
    terms = [jnp.maximum(jnp.sum(sizes, where=row), 1).astype(jnp.float32) for row in same]
    means = jnp.stack([exact_sum(sums, row) / n for row, n in zip(same, terms, strict=True)])
    return jnp.where(means > 0, means, 1)


def _grow_by_neuron(momentum: jax.Array, missing: jax.Array, gain: jax.Array, layout: Layout | None) -> jax.Array:
    """Each output unit grows by its share of the mean momentum; what is left over goes to the largest that remain.

    ``layout`` is None where the outputs are the last axis, or momentum is one of units, seen as matrices already.
    """
    if layout is not None:
        seen = _grow_by_neuron(layout.to_matrices(momentum), layout.to_matrices(missing), gain, None)
        return layout.from_matrices(seen, missing)
    if momentum.ndim < 2:
        return top_k_mask(momentum, gain, where=missing, absolute=True)
    inputs = tuple(range(momentum.ndim - 1))
    means = exact_mean(momentum, axis=inputs).reshape(-1)
    total = exact_sum(means)
    # A little less than the share, lest rounding hands out more than there is.
    shares = means / jnp.where(total > 0, total, 1) * (1 - 2.0**-20)
    quotas = jnp.floor(shares * gain.astype(jnp.float32)).astype(jnp.int32)
    quotas = jnp.where(quotas < _SMALLEST_NEURON_QUOTA, 0, quotas)
    grown = top_k_mask(momentum, quotas, where=missing, absolute=True, axis=-1)
    return grown | top_k_mask(momentum, gain - count_true(grown), where=missing & ~grown, absolute=True)


class _Leaves(NamedTuple):
    """The sparse leaves of params, momentum, masks and structures as lists, and the way back to a tree."""

    weights: list[jax.Array]
    momenta: list[jax.Array]
    masks: list[jax.Array]
    structures: list[Structure]
    kinds: list[Any]  # of the optimizers that the momenta are of
    layouts: list[Layout | None]  # of leaves that go by single weights and have their outputs elsewhere than last
    template: Any

    @classmethod
    def of(cls, params: Any, signal: Any, masks: Any, structure: StructureLike, layout: LayoutLike) -> "_Leaves":
        leaves, treedef = jax.tree.flatten(params)
        flat_masks = treedef.flatten_up_to(masks)
        momenta, kinds = align_signal(signal, params, "momentum"), momentum_kinds(signal, params)
        named = zip(leaf_paths(params), leaves, momenta, flat_masks, kinds, strict=True)
        sparse = [leaf for leaf in named if not is_masked_node(leaf[3])]
        for name, p, m, *_ in sparse:
            if m is None:
                raise ValueError(f"there is no momentum of {name}: use an optimizer that stores one, or decay=")
            if m.shape != p.shape:
                raise ValueError(f"momentum of {name}: expected shape {p.shape}, got {m.shape}")
        units = jax.tree.leaves(mask_structures(structure, params, masks, layout=layout, quiet=True))
        weights, momenta, flat_masks, kinds = ([leaf[i] for leaf in sparse] for i in range(1, 5))
        found = leaf_layouts(params, layout)
        layouts = [
            found[name] if unit.unit_size(p.shape) == 1 and not found[name].is_plain(p.ndim) else None
            for (name, p, *_), unit in zip(sparse, units, strict=True)
        ]
        return cls(weights, momenta, flat_masks, units, kinds, layouts, masks)

    def rebuild(self, masks: list[jax.Array]) -> Any:
        return jax.tree.structure(self.template).unflatten(masks)


def _averaged(average: Any, gradients: list[Any], decay: ArrayLike, treedef: Any) -> Any:
    def step(old, g):
        g = 0 if g is None else g  # no gradient
        return old if is_masked_node(old) else (decay * old + (1 - decay) * g).astype(old.dtype)

    olds = treedef.flatten_up_to(average)
    return treedef.unflatten([step(old, g) for old, g in zip(olds, gradients, strict=True)])


@jax.jit
def _fingerprints(weights: list[jax.Array], masks: list[jax.Array]) -> jax.Array:
    """One number for the weights that each leaf keeps, (leaves,), uint32: equal as long as no bit of them changes."""

    def fingerprint(w, mask):
        rows = w.size // max(w.shape[-1], 1)
        if w.dtype == jnp.float32 and 1 << 8 <= rows <= 1 << 16:
            # Sums of floats, which are twice as fast on a CPU, and exact: of eight bits of each weight.
            kept = (mask.astype(jnp.uint8) != 0) & (w != 0)  # which leaves out the sign of a zero
            bits = jax.lax.bitcast_convert_type(jnp.where(kept, w, 0), jnp.int32)
            few = ((bits ^ (bits >> 9) ^ (bits >> 20)) & 255).astype(jnp.float32)
            return jnp.sum(jnp.sum(few, axis=range(w.ndim - 1)).astype(jnp.uint32), dtype=jnp.uint32)
        bits = jax.lax.bitcast_convert_type(w, {1: jnp.uint8, 2: jnp.uint16}.get(w.dtype.itemsize, jnp.uint32))
        kept = mask & (w != 0)
        kept = kept.reshape(kept.shape + (1,) * (bits.ndim - kept.ndim))  # a float64 has two of 32 bits
        bits = bits.astype(jnp.uint32)
        # Nearly the squares: of the bits themselves, one weight a step up and another a step down would cancel.
        return jnp.sum(bits * (bits | 1), where=kept, dtype=jnp.uint32)

    prints = [fingerprint(*leaf) for leaf in zip(weights, masks, strict=True)]
    return jnp.stack(prints) if prints else jnp.zeros(0, jnp.uint32)


def _masked_leaves(params: Any, masks: Any) -> list[jax.Array]:
    leaves, treedef = jax.tree.flatten(params)
    return [leaf for leaf, mask in zip(leaves, treedef.flatten_up_to(masks), strict=True) if not is_masked_node(mask)]


def _sparse_zeros(params: Any, masks: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    flat = zip(leaves, treedef.flatten_up_to(masks), strict=True)
    return treedef.unflatten([m if is_masked_node(m) else jnp.zeros_like(p) for p, m in flat])


def _check_modes(growth: str, redistribution: str, prune: str, structure: StructureLike) -> None:
    for name, value, options in (
        ("growth", growth, Growth),
        ("redistribution", redistribution, Redistribution),
        ("prune", prune, Prune),
    ):
        if value not in get_args(options):
            raise ValueError(f"{name} must be one of {list(get_args(options))}, got {value!r}")
    check_structure(structure)
    for unit in structure.values() if isinstance(structure, Mapping) else [structure]:
        if prune == "SET" and not (unit == "weight" or isinstance(unit, weight)):
            raise ValueError(f'prune="SET" takes the most negative weights, and units have no sign: got {unit!r}')
        if growth == "momentum_neuron" and (unit == "channel" or isinstance(unit, channel | n_of_m)):
            raise ValueError(
                f'growth="momentum_neuron" gives every output its share of what is regrown, got {unit!r}: a channel is '
                "all of its output, and with n of m every group regrows what it lost"
            )
