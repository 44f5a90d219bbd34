"""Straight-through top-k: the loss sees the largest weights, all weights learn.

Wortsman, Farhadi and Rastegari, *Discovering Neural Wirings*, 2019 (https://arxiv.org/abs/1906.00586). Evci et al.,
*Rigging the Lottery*, 2020, compare with it on layers of fixed sparsity (https://github.com/google-research/rigl at
d39fc7d, ``SparseDNWOptimizer``); jaxpruner has it with a schedule of the sparsity (``SteMagnitudePruning``).
"""

from typing import Any, Literal

import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation
from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike
from jaxsparse.transforms.largest import Largest, Zeros
from jaxsparse.transforms.masked_latent import MaskedLatentState, masked_latent

__all__ = ["StraightThroughState", "straight_through"]


class StraightThroughState(MaskedLatentState):
    """State of :func:`straight_through`."""

    method = "straight_through"
    limits = "the schedule of the sparsity left [0, 1]"


def straight_through(
    inner: optax.GradientTransformation,
    sparsity: Zeros,
    *,
    scope: Literal["layer", "global"] = "layer",
    allocation: Allocation = "uniform",
    every: ArrayLike = 1,
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train all weights, while the network computes with the largest of them (Wortsman et al., 2019).

    A wrapper: around an optimizer.

    The loss sees the k largest of the latent weights w, and its gradient is taken for that of all of them, as if
    nothing had been pruned (a straight-through estimator). With u the update of the inner optimizer,

    .. math::
       \tilde w &= m(w) \, w, \qquad m_i = 1 \text{ for the } k \text{ largest } |w_i| \text{, else } 0 \\
       w &\leftarrow w + u\!\left(\frac{\partial L}{\partial \tilde w}\right)

    so a pruned weight moves on, and is back with the value that it has by then as soon as it is among the k largest.
    :math:`\tilde w` are the params that training holds, w is in the state. Masks are chosen anew for every step, with
    exact counts, ties included (the lowest indices stay). Weight decay and schedules belong to the inner optimizer and
    act on all of w.

    Args:
      inner: the optimizer of the weights, with its weight decay and schedules.
      sparsity: the fraction of zeros, in [0, 1); one for each leaf, a mapping from patterns of paths to such numbers,
        as for :func:`jaxsparse.random_masks`; or a schedule, step -> fraction, which is clipped to [0, 1]:
        :func:`jaxsparse.check` says so.
      scope: which weights are ranked together: those of each "layer", or "global", all, whatever their layer.
      allocation: how layers share the sparsity, for the scope "layer": "uniform", all have it, "erdos_renyi" or
        "erdos_renyi_kernel" (:func:`jaxsparse.erdos_renyi`).
      every: masks are chosen on the multiples of so many steps, int >= 1; on other steps this costs nothing, and a
        weight that is pruned stays so. The published method has 1.
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer.
      structure: what is kept or dropped as one, see :mod:`jaxsparse.structures`. With ``n_of_m``, the n largest of
        every group stay whatever the sparsity is.
      prunable: which leaves have latent weights, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`StraightThroughState`: a copy of the sparse leaves in their own
      dtype, and one byte a weight. Its ``update`` needs the params.

    Raises:
      ValueError: for an inner optimizer that is none, numbers out of range, a schedule that begins out of range,
        unknown options, a structure that does not fit a leaf and says "error" to that, params with a replica axis,
        2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> tx = jaxsparse.straight_through(optax.sgd(0.5), 0.5)
      >>> opt_state = tx.init(params)
      >>> params = jaxsparse.sparsify(opt_state, params)
      >>> updates, opt_state = tx.update({"w": jnp.array([[0.0, 4.0], [4.0, 0.0]])}, opt_state, params)
      >>> opt_state.weights["w"].tolist(), optax.apply_updates(params, updates)["w"].tolist()
      ([[1.0, -4.0], [1.0, -4.0]], [[0.0, -4.0], [0.0, -4.0]])

    References:
      Wortsman, Farhadi and Rastegari, `Discovering Neural Wirings <https://arxiv.org/abs/1906.00586>`_, 2019.

    .. warning::
      Nothing may move the params after the wrapper: only :func:`jaxsparse.check` finds it.
    """
    largest = Largest(sparsity, scope, allocation, at_least, layout).checked()

    def choose(layers, state, params):
        now, clipped = largest.at(state.count)
        masks, kept = largest.masks(layers, largest.counts(layers, now, params))
        return masks, state._replace(kept=kept, clipped=state.clipped + clipped)

    return masked_latent(
        StraightThroughState, inner, choose, every=every, structure=structure, prunable=prunable, layout=layout
    )
