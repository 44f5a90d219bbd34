"""RigL: drop by magnitude, grow by gradient.

Evci, Gale, Menick, Castro and Elsen, *Rigging the Lottery: Making All Tickets Winners*, 2020
(https://arxiv.org/abs/1911.11134), Algorithm 1. The authors' code is https://github.com/google-research/rigl at
d39fc7d (``sparse_optimizers_base.py``) and, in JAX, https://github.com/google-research/jaxpruner.
"""

from typing import Any

import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, Sparsity
from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike
from jaxsparse.transforms import regrow
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.exchange import (
    check_fraction,
    drop_and_grow,
    exchange_link,
    exchanged_masks,
    gradient_of,
    sums_of_gradients,
)
from jaxsparse.transforms.mask_link import MaskState
from jaxsparse.transforms.renewal import Renewing

__all__ = ["RigLState", "rigl", "rigl_update"]


class RigLState(MaskState):
    """State of :func:`rigl`; ``own`` is, with ``accumulate``, the sum of the gradients before a mask update."""

    method = "rigl"


def rigl(
    sparsity: Sparsity,
    update_every: ArrayLike = 100,
    *,
    stop_at: ArrayLike | None = None,
    drop_fraction: ArrayLike | optax.Schedule = 0.3,
    allocation: Allocation = "erdos_renyi_kernel",
    at_least: ArrayLike = 0,
    masks: Any = None,
    start_at: ArrayLike = 0,
    accumulate: int | None = None,
    hold: bool = False,
    bias_correction: tuple[ArrayLike, ArrayLike] | None = None,
    track: bool = False,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Train a fixed number of weights, moved to where gradients are large (Evci et al., 2020).

    A link: last in a :func:`jaxsparse.chain`.

    On step t = ``update_every``, 2 ``update_every``, ... before ``stop_at``, each layer l drops the
    :math:`\alpha_t A_l` of its :math:`A_l` weights that have the smallest magnitude, and grows as many of those that it
    then lacks, where the gradient of this step is largest,

    .. math::
       \alpha_t &= \tfrac{\alpha}{2} \left(1 + \cos(\pi t / T_\text{end})\right) \\
       I_\text{drop} &= \text{arg-top-k}(-|\theta|, \alpha_t A_l) \\
       I_\text{grow} &= \text{arg-top-k}_{i \notin \theta \setminus I_\text{drop}}(|\nabla_\theta L|, \alpha_t A_l)

    with :math:`\alpha` = ``drop_fraction`` and :math:`T_\text{end}` = ``stop_at``. A weight that is grown starts at 0
    with an optimizer state of zeros and takes its first step on step t + 1; one that was dropped and grown at once
    keeps its value and its state. Every layer keeps its number of weights, exactly. (A stack of layers, as of a scan,
    counts as one.)

    Layers that have not moved since their mask was chosen (``optax.freeze``) keep it.

    Args:
      sparsity: the fraction of zeros among the prunable weights, in [0, 1), possibly traced; or one for each prunable
        leaf, as for :func:`jaxsparse.sparse_momentum`.
      update_every: steps between mask updates, int >= 1. (On ImageNet: 100 at a batch of 4096; their product counts.)
      stop_at: the first step on which masks stay for good, int >= 0. The authors end at three quarters of all steps.
        None: never, for a ``drop_fraction`` that is a schedule.
      drop_fraction: :math:`\alpha`, in [0, 1]; or a schedule from the step to the drop fraction.
      allocation: how the masks share ``sparsity`` among the layers: "erdos_renyi_kernel" (the default of the paper,
        ERK), "erdos_renyi" or "uniform".
      at_least: the fewest weights (or units) that any layer keeps; all, if it has fewer.
      masks: start from these instead of random ones, as for :func:`jaxsparse.sparse_momentum`.
      start_at: the first step on which masks may change.
      accumulate: grow by the sum of the gradients of this many steps, the last up to and including the mask update, int
        in [1, update_every]. Costs a float32 copy of the sparse leaves. (SRigL: 8 on ImageNet at a batch of 512.) None:
        by the gradient of that step alone, which is not stored.
      hold: on the steps on which masks change the optimizer takes no step, as in the paper and the authors' code: its
        states stay, schedules and counts among them. False: all weights that stay take their step.
      bias_correction: the decays :math:`(\beta_1, \beta_2)` of an Adam-like optimizer. Adam corrects the bias of its
        averages by the age of the run, so a regrown weight, whose averages begin at 0 again, would take steps that are
        too large: its a-th by the factor :math:`(1 - \beta_1^a) / \sqrt{1 - \beta_2^a}`, with Adam's defaults 3.2 at
        first and 6.6 at most, on the 12th. With it they are corrected by the weight's own age. Costs a byte a weight,
        and time on every step. (An addition to the paper.)
      track: keep track of the weights that were ever kept, for :func:`jaxsparse.inspect.explored`. A byte a weight.
      structure, prunable, layout: as for :func:`jaxsparse.sparse_momentum`. Units have the mean of their weights' and
        gradients' absolute values.
      key: an int or PRNG key, possibly traced, for the initial masks.

    Returns:
      A gradient transformation with the state :class:`RigLState`: one byte a weight of sparse leaves. Gradients are not
      stored, but with ``accumulate``. Its ``update`` needs the params, and ``grad``, which :func:`jaxsparse.chain`
      hands it. With several devices that is to be the gradient of the whole batch.

    Raises:
      ValueError: for options out of range, a ``drop_fraction`` that is a number without ``stop_at``, params with a
        replica axis, masks that do not fit; by ``update``, without params or gradients.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
      >>> tx = jaxsparse.chain(
      ...     optax.sgd(0.1, momentum=0.9, nesterov=True),
      ...     jaxsparse.rigl(sparsity=0.9, update_every=100, stop_at=25_000),
      ... )
      >>> opt_state = tx.init(params)
      >>> int(jaxsparse.get_masks(opt_state)["kernel"].sum())
      20

      The recipes of *In-Time Over-Parameterization* (Liu et al., 2021, https://arxiv.org/abs/2102.02887), which
      exchange seldom, half of the weights, to the end:

      >>> steps = 100_000
      >>> rigl_itop = jaxsparse.rigl(
      ...     0.9, update_every=4000, drop_fraction=jaxsparse.cosine_prune_rate(0.5, steps), track=True
      ... )

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners <https://arxiv.org/abs/1911.11134>`_, 2020.

    .. warning::
      What stands before the optimizer, such as clipping by the global norm, sees the gradients of all weights, missing
      ones too. The authors' code hands the optimizer those of present weights alone.
    """
    schedule = check_fraction(drop_fraction, stop_at, "rigl")
    own, add = (None, None) if accumulate is None else sums_of_gradients(accumulate, update_every, "rigl")

    def rule(state):
        return drop_and_grow(schedule(state.count), regrow.drop_smallest, regrow.grow_largest)

    return exchange_link(
        RigLState,
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
        draws=False,
        renewing=Renewing(hold, bias_correction, update_every, track),
        signal=lambda updates, own, extra_args: own if accumulate is not None else gradient_of(extra_args, "rigl"),
        own=own,
        own_update=add,
    )


def rigl_update(
    params: Any,
    grads: Any,
    masks: Any,
    drop_fraction: ArrayLike,
    *,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
) -> Any:
    """One mask update of RigL: each layer drops by magnitude and grows as many weights by gradient.

    Of A weights the nearest integer to ``drop_fraction * A`` is exchanged, as in jaxpruner. (The authors' first code
    rounds down.) Equal scores go by index.

    Args:
      params: the weights, a pytree.
      grads: the gradients of all weights, missing ones too: like ``params``.
      masks: like ``params``: bool arrays, and the scalar True or ``MaskedNode`` for dense leaves.
      drop_fraction: in [0, 1], possibly traced.
      structure, layout: as for :func:`rigl`.

    Returns:
      The new masks, of the form of ``masks``, with as many weights in every layer.

    Raises:
      ValueError: for a drop fraction out of range, or a leaf that does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> weights = {"w": jnp.array([[3.0, 0.1, 0.0, 0.0]])}
      >>> grads = {"w": jnp.array([[0.0, 0.0, 1.0, -5.0]])}
      >>> rigl_update(weights, grads, {"w": jnp.array([[True, True, False, False]])}, 0.5)["w"].tolist()
      [[True, False, False, True]]
    """
    check_range("drop_fraction", drop_fraction, 0, 1)
    rule = drop_and_grow(drop_fraction, regrow.drop_smallest, regrow.grow_largest)
    return exchanged_masks(params, grads, masks, rule, structure, layout, what="grads")
