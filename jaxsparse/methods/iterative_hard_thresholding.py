"""Iterative hard thresholding: after every step only the largest weights stay, and every weight may return.

Blumensath and Davies, *Iterative Hard Thresholding for Compressed Sensing*, 2009 (https://arxiv.org/abs/0805.0510). A
reference for neural networks, in JAX, is ``iht`` of https://github.com/LOG-postech/safe-jax at 531347f
(``sparsify/gmp_iht.py``).
"""

from typing import Any, Literal

import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike, check_structure
from jaxsparse.transforms.checks import check_schedule, check_steps, whole_steps
from jaxsparse.transforms.mask_link import MaskState, dense_start, mask_link
from jaxsparse.transforms.prune import prune_to

__all__ = ["IterativeHardThresholdingState", "iterative_hard_thresholding"]


class IterativeHardThresholdingState(MaskState):
    """State of :func:`iterative_hard_thresholding`; the masks are those of the last thresholding."""

    method = "iterative_hard_thresholding"


def iterative_hard_thresholding(
    sparsity: ArrayLike | optax.Schedule,
    *,
    every: ArrayLike = 1,
    scope: Literal["layer", "global"] = "layer",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train with the largest weights of every step, chosen anew from all (Blumensath and Davies, 2009).

    A link: last in the chain.

    .. math:: \theta_{t+1} = H_k(\theta_t + u_t)

    with u the proposed update, by gradients of all weights, and :math:`H_k` the projection that keeps the k entries of
    largest magnitude and sets the others to 0. Nothing remembers what was pruned: a weight returns on the step on which
    its update exceeds the smallest weight that stays, and has the value of that update. The momentum of pruned weights
    goes on, so that small gradients add up. Counts are exact, ties included (the lowest indices stay).

    Args:
      sparsity: the fraction of zeros, in [0, 1], from the first thresholding on; or a schedule, step -> fraction, such
        as the cubic ``optax.polynomial_schedule(0.0, 0.9, 3, steps)``.
      every: threshold on the steps 0, ``every``, 2 ``every``, ..., int >= 1; on the steps between, the masks stay.
      scope: which weights are ranked together: those of each "layer", which all have ``sparsity``, or all, "global".
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer.
      structure: what is kept or dropped as one, see :mod:`jaxsparse.structures`. With ``n_of_m`` the n largest of every
        group stay.
      prunable, layout: as for :func:`jaxsparse.magnitude_pruning`.

    Returns:
      A gradient transformation with the state :class:`IterativeHardThresholdingState`: one byte a weight of sparse
      leaves. It starts with all weights. Its ``update`` needs the params.

    Raises:
      ValueError: for numbers out of range, a schedule that is not in [0, 1] on one of the steps 0, 1, 10, ..., 10,000,
        unknown options, a structure that does not fit a leaf and says "error" to that, params with a replica axis,
        missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.array([[3.0, 0.5, 0.0, -1.0]])}
      >>> tx = optax.chain(optax.sgd(1.0), jaxsparse.iterative_hard_thresholding(0.5))
      >>> grads = {"kernel": jnp.array([[0.0, 0.0, -2.0, 0.0]])}  # makes it 3, 0.5, 2, -1
      >>> updates, opt_state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[3.0, 0.0, 2.0, 0.0]]

    References:
      Blumensath and Davies, `Iterative Hard Thresholding for Compressed Sensing <https://arxiv.org/abs/0805.0510>`_,
      2009.

    .. warning::
      With ``every=1`` a selection among all weights is part of every step.
    """
    check_schedule("sparsity", sparsity)
    every = whole_steps("every", every, 1)
    check_steps("at_least", at_least, 0)
    check_structure(structure)
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be one of ['layer', 'global'], got {scope!r}")

    def change(layers, state):
        return *prune_to(layers, sparsity, state.count, scope, at_least=at_least, revive=True), None

    return mask_link(
        IterativeHardThresholdingState,
        dense_start(structure, prunable, layout),
        change,
        when=lambda step: step % every == 0,
        proposed=True,
        structure=structure,
        layout=layout,
    )
