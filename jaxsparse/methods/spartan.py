"""Spartan: a soft choice of the largest weights, which becomes hard as training goes on.

Tai et al., *Spartan: Differentiable Sparsity via Regularized Transportation*, 2022 (https://arxiv.org/abs/2205.14107).
Where the paper leaves something open, the authors' code is followed (https://github.com/facebookresearch/spartan).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import check_total
from jaxsparse.layouts import LayoutLike
from jaxsparse.placement import varying_like
from jaxsparse.prunable import prunable_leaves
from jaxsparse.selection import global_top_k_masks, top_k_masks
from jaxsparse.transforms.checks import check_range, whole_steps
from jaxsparse.transforms.landing import on_update_steps
from jaxsparse.transforms.latent import LatentState, latent
from jaxsparse.trees import is_masked_node

__all__ = ["SpartanState", "spartan"]

_ROUNDS = 100  # of Sinkhorn's algorithm at most


class SpartanState(LatentState):
    """State of :func:`spartan`; ``own`` is like ``weights``: the soft choice y, float32, in [0, 1]."""

    method = "spartan"

    def eval_weights(self) -> Any:
        """The latent weights times the soft choice, where it is among the largest."""
        return jax.tree.map(_chosen, self.weights, self.own, self.masks)


def spartan(
    inner: optax.GradientTransformation,
    sparsity: ArrayLike,
    warmup: ArrayLike,
    freeze_at: ArrayLike,
    *,
    sharpness: ArrayLike = 20.0,
    tolerance: ArrayLike = 0.01,
    scope: Literal["global", "layer"] = "global",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train through a soft choice of the largest weights, which hardens (Tai et al., 2022).

    A wrapper: around an optimizer.

    Of n latent weights w, the k largest are chosen softly, with

    .. math:: y = \sigma(\beta |w| + \mu), \qquad \sum y = k

    where :math:`\sigma` is the sigmoid and :math:`\mu` is found by Sinkhorn's algorithm, as published. With a cost of 1
    for each weight its rounds are :math:`\mu \leftarrow \mu + \log(k / \sum y)`: at most 100 of them, or until
    :math:`\sum y |w|` changes by no more than the ``tolerance``. The params that training hands out are :math:`p = w y`
    for the k largest and exactly 0 for the others. Their gradient G is that of :math:`w y` for all weights (as in dual
    averaging), and is passed on by the chain rule, with :math:`\bar y = y (1 - y)`:

    .. math::
       g_w = G y + \mathrm{sign}(w) \, \beta \bar y \, (G w - C), \qquad
       C = \frac{\sum G w \bar y}{k - \sum y^2}

    k falls linearly from n to (1 - sparsity) n in the first ``warmup`` steps, rounded, and :math:`\beta` grows linearly
    from 1 to the ``sharpness`` until step ``freeze_at``. From then on y stays, with exact zeros, and the weights train
    on: :math:`g_w = G y`. Counts are exact, ties included; at least one weight stays.

    Args:
      inner: the optimizer of the latent weights, with its weight decay.
      sparsity: the fraction of zeros of the prunable weights at the end, in [0, 1).
      warmup: the step from which on this fraction is 0, int >= 1. (The authors have a fifth of all steps.)
      freeze_at: the step from which on the choice stays, int >= ``warmup``. (The authors have four fifths.)
      sharpness: the last :math:`\beta`, at least 1.
      tolerance: where Sinkhorn's algorithm stops, at least 0: the relative change in a round.
      scope: which weights are ranked together: "global", all, or those of each "layer", which then all have this
        sparsity.
      prunable: which leaves are sparse, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`SpartanState`: two copies of the sparse leaves, and a byte a
      weight. Its ``update`` needs the params.

    Raises:
      ValueError: for numbers out of range, an unknown scope, a ``freeze_at`` before ``warmup``, params with a replica
        axis, 2**31 weights or more.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.array([[0.1, -0.2, 0.3, -0.4]])}
      >>> tx = jaxsparse.spartan(optax.sgd(0.1), 0.5, warmup=2, freeze_at=4)
      >>> opt_state = tx.init(params)
      >>> kept = []
      >>> for _ in range(3):
      ...     updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     kept.append(int(jaxsparse.count(jaxsparse.get_masks(opt_state))))
      >>> kept
      [3, 2, 2]

    References:
      Tai et al., `Spartan: Differentiable Sparsity via Regularized Transportation <https://arxiv.org/abs/2205.14107>`_,
      2022; code: https://github.com/facebookresearch/spartan.

    .. warning::
      Every step until ``freeze_at`` ranks all weights, and runs a few rounds over them. Nothing may move the params
      after the wrapper.
    """
    check_range("sparsity", sparsity, 0, 1, open_end=True, required=True)
    warmup, freeze_at = whole_steps("warmup", warmup, 1), whole_steps("freeze_at", freeze_at, 1)
    check_range("sharpness", sharpness, 1)
    check_range("tolerance", tolerance, 0)
    if not any(isinstance(step, jax.core.Tracer) for step in (warmup, freeze_at)) and freeze_at < warmup:
        raise ValueError(f"freeze_at must be at least warmup, {warmup}, got {freeze_at}")
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", got {scope!r}')

    def wanted(count, sizes):
        """k of each layer, or that of all together for each, int32; and beta."""
        totals = np.asarray(sizes, np.float64) if scope == "layer" else np.full(len(sizes), float(sum(sizes)))
        with jax.enable_x64(True):  # float32 cannot tell all the weights of a large network
            zeros = jnp.asarray(sparsity, jnp.float64) * jnp.clip(
                count.astype(jnp.float64) / jnp.asarray(warmup, jnp.float64), 0, 1
            )
            k = jnp.maximum(
                jnp.asarray(totals - jnp.round(totals * zeros), jnp.int32), np.minimum(totals, 1).astype(np.int32)
            )
        sharper = jnp.clip(count.astype(jnp.float32) / jnp.asarray(freeze_at, jnp.float32), 0, 1)
        return k, 1 + (jnp.asarray(sharpness, jnp.float32) - 1) * sharper

    def over(parts, reduce=jnp.sum):
        """A number of each layer, or of all together for each."""
        parts = jnp.stack(parts)
        return parts if scope == "layer" else jnp.full_like(parts, reduce(parts))

    def choose(weights, k, beta):
        """The k largest, and the soft choice of k."""
        if scope == "layer":
            masks = top_k_masks(weights, k, absolute=True)
        else:
            masks = global_top_k_masks(weights, k[0], absolute=True)
        values = [jnp.abs(w).astype(jnp.float32) for w in weights]
        lowest = over([jnp.min(v, where=mask, initial=jnp.inf) for v, mask in zip(values, masks, strict=True)], jnp.min)
        z = [beta * (v - low) for v, low in zip(values, lowest, strict=True)]  # shifted, so that nothing overflows

        def soft(mu):
            return [jax.nn.sigmoid(x + m) for x, m in zip(z, mu, strict=True)]

        def sums(mu):
            soft_choice = soft(mu)
            worth = [jnp.sum(y * v) for y, v in zip(soft_choice, values, strict=True)]
            return over(list(map(jnp.sum, soft_choice))), over(worth)

        def sinkhorn_round(carry):
            rounds, mu, (size, before), done = carry
            mu = jnp.where(done, mu, mu + jnp.log(k.astype(jnp.float32) / size))
            new = sums(mu)
            return rounds + 1, mu, new, done | (jnp.abs(new[1] - before) <= tolerance * jnp.abs(before))

        mu = jnp.zeros_like(lowest)
        carry = jnp.int32(0), mu, sums(mu), jnp.zeros_like(mu, bool)
        carry = jax.lax.while_loop(lambda carry: (carry[0] < _ROUNDS) & ~carry[3].all(), sinkhorn_round, carry)
        all_of_them = k == over([jnp.int32(w.size) for w in weights])
        return masks, [jnp.where(whole, 1.0, y) for whole, y in zip(all_of_them, soft(carry[1]), strict=True)]

    def latents(params):
        chosen = prunable_leaves(params, prunable, layout=layout)
        return jax.tree.map(lambda p, c: p if c else optax.MaskedNode(), params, chosen)

    def start(state, params):
        check_total(w.size for w in jax.tree.leaves(state.weights))
        masks = jax.tree.map(lambda w: jnp.ones_like(w, bool), state.weights)
        soft = jax.tree.map(lambda w: jnp.ones_like(w, jnp.float32), state.weights)
        return varying_like(state._replace(masks=masks, own=soft), params)

    def forward(state):
        weights, treedef = jax.tree.flatten(state.weights)
        # No loop can be differentiated backwards: for gradients of the update itself, y is a constant.
        now, old = jax.lax.stop_gradient((weights, (state.masks, state.own)))

        def chosen_anew(_):
            masks, soft = choose(now, *wanted(state.count, [w.size for w in now]))
            last = state.count >= freeze_at
            soft = [jnp.where(last & ~mask, 0, y) for mask, y in zip(masks, soft, strict=True)]
            return treedef.unflatten(masks), treedef.unflatten(soft)

        masks, soft = on_update_steps(state.count <= freeze_at, chosen_anew, old) if weights else old
        return jax.tree.map(_chosen, state.weights, soft, masks), state._replace(masks=masks, own=soft)

    def pull(grads, weights, state):
        leaves, treedef = jax.tree.flatten(weights)
        given, choice = treedef.flatten_up_to(grads), treedef.flatten_up_to(state.own)
        at = [i for i, y in enumerate(choice) if not is_masked_node(y)]
        if not at:
            return grads, state
        k, beta = wanted(state.count, [leaves[i].size for i in at])
        soft, signs = [choice[i] for i in at], [jnp.sign(leaves[i]).astype(jnp.float32) for i in at]
        of_product = [jnp.zeros_like(y) if given[i] is None else given[i].astype(jnp.float32)
                      for i, y in zip(at, soft, strict=True)]  # fmt: skip
        of_choice = [g * leaves[i].astype(jnp.float32) for i, g in zip(at, of_product, strict=True)]
        slopes = [y * (1 - y) for y in soft]
        above = over([jnp.sum(g * slope) for g, slope in zip(of_choice, slopes, strict=True)])
        below = k.astype(jnp.float32) - over([jnp.sum(jnp.square(y)) for y in soft])
        shifts = jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
        moving = jnp.where(state.count < freeze_at, beta, 0)  # a frozen choice has no slope
        rows = zip(at, of_product, of_choice, soft, slopes, signs, shifts, strict=True)
        for i, of_both, of_y, y, slope, sign, shift in rows:
            if given[i] is not None:
                given[i] = (of_both * y + moving * sign * slope * (of_y - shift)).astype(given[i].dtype)
        return treedef.unflatten(given), state

    return latent(SpartanState, inner, latents, forward, start=start, pull=pull)


def _chosen(w: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w * y.astype(w.dtype), jnp.zeros_like(w))
