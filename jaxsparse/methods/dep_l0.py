"""Dependent gates: L0 regularisation with gates that a generator network predicts from the neighbouring layer.

Li and Ji, *Dep-L0: Improving L0-based Network Sparsification via Dependency Modeling*, 2021
(https://arxiv.org/abs/2107.00070). Where the paper leaves something open, the authors' code is followed
(https://github.com/leo-yangli/dep-l0).
"""

from collections.abc import Sequence

import jax
import optax
from jax.typing import ArrayLike

from jaxsparse.gates import Penalty, check_direction, dependent_logits
from jaxsparse.groups import Group
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.gated import GatedState, gated, group_tuple

__all__ = ["DepL0State", "dep_l0"]


class DepL0State(GatedState):
    """State of :func:`dep_l0`."""

    method = "dep_l0"


def dep_l0(
    inner: optax.GradientTransformation,
    groups: Sequence[Group],
    *,
    penalty: float | Penalty,
    direction: str = "forward",
    input_width: int | None = None,
    gate_optimizer: optax.GradientTransformation | None = None,
    freeze_gates_at: int | None = None,
    axis_name: str | None = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Remove channels by gates that a generator network predicts from the neighbouring layer (Li and Ji, 2021).

    A wrapper: around an optimizer.

    Weights, gates and evaluation are those of :func:`jaxsparse.l0`, but log_alpha is the output of a generator network
    (:func:`jaxsparse.dependent_logits`),

    .. math:: h_0 = 1, \quad h_l = \log\alpha_l = \log(100) \tanh(h_{l-1} W_l + c_l)

    whose params W and c are in the state and train with the optimizer of the gates. W starts from
    U(-1/sqrt(inputs), 1/sqrt(inputs)), c from N(3, 0.01^2), so about nine in ten gates start open.

    Args:
      inner, groups, gate_optimizer, freeze_gates_at, axis_name, key: as for :func:`jaxsparse.l0`; groups in network
        order. The authors train the generator with Adam, 1e-3.
      penalty: a :class:`jaxsparse.Penalty`; a float is its strength, with ``counts="neighbours"``.
      direction: "forward", each group's gates depend on those of the group before it, or "backward", of the group
        after it.
      input_width: the size of the generator's constant input, int >= 1; None: the size of the group where the chain
        starts.

    Returns:
      A gradient transformation with the state :class:`DepL0State`. Its ``update`` needs the params.

    Raises:
      ValueError: for an unknown direction, numbers out of range, and, by ``init``, groups that do not fit the params,
        and ``optax.MultiSteps`` or ``apply_if_finite`` around ``inner`` alone, which the gates would not heed.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
      >>> groups = [
      ...     jaxsparse.Group("inputs", {"fc1/kernel": 0}, {"fc1/kernel": 0}),
      ...     jaxsparse.Group("hidden", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc2/kernel": 0}),
      ... ]
      >>> tx = jaxsparse.dep_l0(optax.sgd(0.1), groups, penalty=jaxsparse.Penalty(1e-3, "all"))
      >>> opt_state = tx.init(params)
      >>> {name: log_alpha.shape for name, log_alpha in jaxsparse.get_log_alpha(opt_state).items()}
      {'inputs': (5,), 'hidden': (4,)}

    References:
      Li and Ji, `Dep-L0: Improving L0-based Network Sparsification via Dependency Modeling
      <https://arxiv.org/abs/2107.00070>`_, 2021.

    .. warning::
      Nothing may move the params after the wrapper: only :func:`jaxsparse.check` finds it.
    """
    groups = group_tuple(groups)
    check_direction(direction)
    check_range("input_width", input_width, 1)

    def init_gates(sizes, key):
        order = sizes if direction == "forward" else sizes[::-1]
        widths = [order[0] if input_width is None else input_width, *order]
        layers = []
        for inputs, outputs, k in zip(widths, order, jax.random.split(key, len(order)), strict=False):
            kernel_key, bias_key = jax.random.split(k)
            bound = inputs**-0.5
            kernel = jax.random.uniform(kernel_key, (inputs, outputs), minval=-bound, maxval=bound)
            layers.append({"kernel": kernel, "bias": 3 + 0.01 * jax.random.normal(bias_key, (outputs,))})
        return layers

    return gated(
        DepL0State,
        inner,
        groups,
        penalty if isinstance(penalty, Penalty) else Penalty(penalty, "neighbours"),
        init_gates,
        generate=lambda generator: dependent_logits(generator, direction),
        gate_optimizer=gate_optimizer,
        freeze_gates_at=freeze_gates_at,
        axis_name=axis_name,
        key=key,
    )
