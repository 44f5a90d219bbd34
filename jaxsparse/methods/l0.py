"""L0 regularisation: channels closed by random gates, each independent of the others.

Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*, 2018
(https://arxiv.org/abs/1712.01312). Where the paper leaves something open, the authors' code is followed
(https://github.com/AMLab-Amsterdam/L0_regularization).
"""

from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.gates import Penalty
from jaxsparse.groups import Group
from jaxsparse.transforms.gated import GatedState, gated, group_tuple

__all__ = ["L0State", "l0"]


class L0State(GatedState):
    """State of :func:`l0`."""

    method = "l0"


def l0(
    inner: optax.GradientTransformation,
    groups: Sequence[Group],
    *,
    penalty: float | Penalty,
    log_alpha: float | Sequence[float] = 0.0,
    gate_optimizer: optax.GradientTransformation | None = None,
    freeze_gates_at: int | None = None,
    clamp: tuple[float, float] | None = None,
    axis_name: str | None = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Remove channels by stochastic hard-concrete gates with an L0 penalty (Louizos et al., 2018).

    A wrapper: around an optimizer.

    The params that training hands out are weights times random gates, :math:`p = w z`, with one gate per channel, drawn
    anew at every step. By the chain rule their gradient G is all that weights and gates need:

    .. math::
       g_w &= G z \\
       g_{\log\alpha} &= \frac{\partial z}{\partial\log\alpha} \sum G w + \frac{\partial}{\partial\log\alpha} R

    where the sum is over all that a gate multiplies and R is the penalty. The inner optimizer moves w by
    :math:`g_w`, the optimizer of the gates moves :math:`\log\alpha`, then gates are sampled
    (:func:`jaxsparse.hard_concrete`) and the update lands on their product. So nothing changes in the training loop,
    the loss has no penalty in it, and :func:`jaxsparse.eval_params` gives the weights times the gates to evaluate with
    (:func:`jaxsparse.hard_concrete_mean`). All gates are one after ``init``; sampling starts with the first update.

    Args:
      inner: the optimizer of the weights, with its weight decay and schedules.
      groups: which channels have gates, and what they multiply: the groups that :func:`jaxsparse.trace.channel_groups`
        derives from a model, those of :func:`jaxsparse.models.channel_groups`, or any :class:`jaxsparse.Group`.
      penalty: a :class:`jaxsparse.Penalty`; a float is its strength, with ``counts="alone"``.
      log_alpha: the mean of the first log_alpha, or one for each group; the standard deviation is 0.01. For a drop rate
        p it is log((1 - p) / p): 0 for 0.5, as in Louizos et al.; Li and Ji take 3 for independent gates behind batch
        normalisation.
      gate_optimizer: the optimizer of log_alpha; None: ``optax.adam(1e-3)``.
      freeze_gates_at: the step from which on the gates are held at their test-time values, without penalty, while the
        weights train on; int >= 0. None: never.
      clamp: bounds (low, high) of log_alpha; (log(0.01), log(100)) in the code of Louizos et al. None: no bounds.
      axis_name: the name of a pmapped axis: each device samples its own gates, and the gradients of weights and gates
        are averaged here, after the chain rule. Hand in the gradients of the device, not their mean. The estimate has
        less variance for the same work. None: one sample for all.
      key: an int or a PRNG key, possibly traced.

    Returns:
      A gradient transformation with the state :class:`L0State`. Its ``update`` needs the params.

    Raises:
      ValueError: for numbers out of range, and, by ``init``, for groups that do not fit the params, and for
        ``optax.MultiSteps`` or ``apply_if_finite`` around ``inner`` alone, which the gates would not heed.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
      >>> hidden = jaxsparse.Group("hidden", multiplies={"fc2/kernel": 0}, removes={"fc1/kernel": -1, "fc2/kernel": 0})
      >>> tx = jaxsparse.l0(optax.sgd(1e-3), [hidden], penalty=jaxsparse.Penalty(1.0, examples=60_000))
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(params, opt_state, params)  # gradients of half the squared norm
      >>> params = optax.apply_updates(params, updates)
      >>> jaxsparse.eval_params(opt_state, params)["fc2"]["kernel"][:, 0].round(2).tolist()  # half open
      [0.5, 0.5, 0.5, 0.5]

    References:
      Louizos, Welling and Kingma, `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018.

    .. warning::
      Nothing may move the params after the wrapper: only :func:`jaxsparse.check` finds it. Gates multiply what is
      behind a batch normalisation, never the filter ahead of it.
    """
    groups = group_tuple(groups)
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be bounds (low, high) of log_alpha, got {clamp}")
    if np.ndim(log_alpha) == 1 and not isinstance(log_alpha, Sequence):
        log_alpha = tuple(log_alpha)  # type: ignore[arg-type]  # an array
    starts = tuple(log_alpha) if isinstance(log_alpha, Sequence) else (log_alpha,) * len(groups)
    if len(starts) != len(groups):
        raise ValueError(f"log_alpha is one number, or one for each of the {len(groups)} groups, got {len(starts)}")

    def init_gates(sizes, key):
        keys = jax.random.split(key, len(groups))
        return [
            start + 0.01 * jax.random.normal(k, (size,)) for start, size, k in zip(starts, sizes, keys, strict=True)
        ]

    return gated(
        L0State,
        inner,
        groups,
        penalty if isinstance(penalty, Penalty) else Penalty(penalty, "alone"),
        init_gates,
        gate_optimizer=gate_optimizer,
        freeze_gates_at=freeze_gates_at,
        clamp=clamp,
        axis_name=axis_name,
        key=key,
    )
