"""Sparse evolutionary training (SET): drop the weights closest to zero, grow at random.

Mocanu, Mocanu, Stone, Nguyen, Gibescu and Liotta, *Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity inspired by Network Science*, 2018 (https://arxiv.org/abs/1707.04780), Algorithm 1. The authors' code is
https://github.com/dcmocanu/sparse-evolutionary-artificial-neural-networks at 62ac974 (``set_mlp_keras_cifar10.py``).
"""

from typing import Any, Literal

import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, Sparsity
from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike, require_signs
from jaxsparse.transforms import regrow
from jaxsparse.transforms.checks import check_schedule
from jaxsparse.transforms.exchange import drop_and_grow, exchange_link
from jaxsparse.transforms.mask_link import MaskState
from jaxsparse.transforms.renewal import Renewing

__all__ = ["SparseEvolutionaryState", "sparse_evolutionary"]


class SparseEvolutionaryState(MaskState):
    """State of :func:`sparse_evolutionary`."""

    method = "sparse_evolutionary"


def sparse_evolutionary(
    sparsity: Sparsity,
    update_every: ArrayLike,
    *,
    drop_fraction: ArrayLike | optax.Schedule = 0.3,
    drop: Literal["sign", "magnitude"] = "sign",
    allocation: Allocation = "erdos_renyi",
    at_least: ArrayLike = 0,
    masks: Any = None,
    start_at: ArrayLike = 0,
    stop_at: ArrayLike | None = None,
    bias_correction: tuple[ArrayLike, ArrayLike] | None = None,
    track: bool = False,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Train a fixed number of weights, a part of which moves to random places (Mocanu et al., 2018).

    A link: last in a :func:`jaxsparse.chain`. The method is known as SET.

    On the first step after every ``update_every`` steps, each layer drops a fraction :math:`\zeta` = ``drop_fraction``
    of its smallest positive weights and the same fraction of its negative weights closest to 0 (Algorithm 1, lines 10
    and 11), and grows as many weights in places that are then empty, at random (line 12). A weight that is grown starts
    at 0 with an optimizer state of zeros and takes its first step on the next step; one that was dropped and grown at
    once keeps its value. Every layer keeps its number of weights, exactly. (A stack of layers, as of a scan, counts as
    one.)

    Layers that have not moved since their mask was chosen (``optax.freeze``) keep it.

    Args:
      sparsity: the fraction of zeros among the prunable weights, in [0, 1), possibly traced; or one for each prunable
        leaf, as for :func:`jaxsparse.sparse_momentum`.
      update_every: steps between mask updates, int >= 1. (The authors: one epoch.)
      drop_fraction: :math:`\zeta`, in [0, 1]; or a schedule of the step. Of n weights the nearest number to
        :math:`\zeta n` goes.
      drop: what goes: "sign", as published; or "magnitude", the smallest of each layer, as in the SET that RigL and
        later papers compare with.
      allocation: how the masks share ``sparsity`` among the layers: "erdos_renyi" (eq. 1 of the paper),
        "erdos_renyi_kernel" or "uniform".
      at_least, masks, start_at, stop_at, bias_correction, track: as for :func:`jaxsparse.rigl`.
      structure, prunable, layout: as for :func:`jaxsparse.sparse_momentum`. The authors leave the last layer dense:
        ``prunable=jaxsparse.all_but("head/kernel")``.
      key: an int or PRNG key, possibly traced, for the initial masks and the growth.

    Returns:
      A gradient transformation with the state :class:`SparseEvolutionaryState`: one byte a weight of sparse leaves. Its
      ``update`` needs the params.

    Raises:
      ValueError: for options out of range, ``drop="sign"`` with a structure whose units have no sign, params with a
        replica axis, masks that do not fit, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
      >>> tx = jaxsparse.chain(
      ...     optax.sgd(0.01, momentum=0.9),
      ...     jaxsparse.sparse_evolutionary(sparsity=0.9, update_every=500),
      ... )
      >>> int(jaxsparse.get_masks(tx.init(params))["kernel"].sum())
      20

      The recipe of *In-Time Over-Parameterization* (SET-ITOP: Liu et al., 2021, https://arxiv.org/abs/2102.02887):

      >>> set_itop = jaxsparse.sparse_evolutionary(
      ...     0.9, update_every=1500, drop_fraction=jaxsparse.cosine_prune_rate(0.5, 100_000), drop="magnitude",
      ...     allocation="erdos_renyi_kernel", track=True,
      ... )

    References:
      Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
      Network Science <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    if drop not in ("sign", "magnitude"):
        raise ValueError(f'drop must be "sign" or "magnitude", got {drop!r}')
    if drop == "sign":
        require_signs(structure, 'drop="sign" tells positive weights from negative ones')
    check_schedule("drop_fraction", drop_fraction, steps=[0] if stop_at is None else [0, stop_at])

    def rule(state):
        fraction = drop_fraction(state.count) if callable(drop_fraction) else drop_fraction
        if drop == "magnitude":
            return drop_and_grow(fraction, regrow.drop_smallest, regrow.grow_random)

        def by_sign(layers, resting):
            survivors = regrow.drop_by_sign(layers, fraction, resting)
            lost = regrow.counts(layers) - regrow.counts(layers, survivors)
            return regrow.grow_random(layers, survivors, lost), resting

        return by_sign

    return exchange_link(
        SparseEvolutionaryState,
        rule,
        sparsity=sparsity,
        update_every=update_every,
        start_at=start_at,
        stop_at=stop_at,
        allocation=allocation,
        at_least=at_least,
        masks=masks,
        structure=structure,
        prunable=prunable,
        layout=layout,
        key=key,
        draws=True,
        renewing=Renewing(False, bias_correction, update_every, track),
    )
