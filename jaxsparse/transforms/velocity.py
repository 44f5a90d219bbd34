"""Momentum measured in time, the sum of the step sizes, and the options that are numbers or schedules of the step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.transforms.checks import check_schedule

__all__ = ["VelocityState", "at_step", "check_time", "velocity"]


class VelocityState(NamedTuple):
    """State of :func:`velocity`.

    Attributes:
      count: (), int32: the updates so far.
      ema: v, the exponential average of the gradients, like the params.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    ema: Any

    @property
    def counts_for_schedule(self) -> bool:
        """Whether the count is that of a schedule, which goes on where the average begins anew."""
        return True


def velocity(
    step_size: ArrayLike | optax.Schedule, momentum_time: ArrayLike = 9.5
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum whose memory is measured in time, the sum of the step sizes.

    .. math:: v \leftarrow e^{-s/\tau} v + (1 - e^{-s/\tau}) g, \qquad \Delta = -s v

    With s = 1 and :math:`\tau` = 9.5 that is SGD with momentum 0.9 and a learning rate of 0.1; as s goes to zero, the
    average reaches over more and more steps.

    Args:
      step_size: s >= 0, a float or a schedule of the step.
      momentum_time: :math:`\tau` > 0.

    Returns:
      A gradient transformation with the state :class:`VelocityState`; :func:`jaxsparse.chain` finds its momentum.

    Raises:
      ValueError: for numbers out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = velocity(1.0, momentum_time=9.5)
      >>> updates, _ = tx.update({"w": jnp.ones(1)}, tx.init({"w": jnp.zeros(1)}))
      >>> print(f"{float(updates['w'][0]):.4f}")
      -0.0999

    References:
      Siegel, Chen, Zhang and Xu, `Training Sparse Neural Networks using Compressed Sensing
      <https://arxiv.org/abs/2008.09661>`_, 2020.
    """
    check_schedule("step_size", step_size, 0, None, steps=[0])
    check_time("momentum_time", momentum_time)

    def init_fn(params):
        return VelocityState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        s = at_step(step_size, state.count)
        fading = s / momentum_time

        def times(scalar, x):  # in float32, or what is wider
            dtype = np.promote_types(scalar.dtype, x.dtype)
            return scalar.astype(dtype) * x.astype(dtype)

        def average(v, g):
            return v if g is None else (times(jnp.exp(-fading), v) - times(jnp.expm1(-fading), g)).astype(v.dtype)

        treedef = jax.tree.structure(state.ema)
        grads = treedef.flatten_up_to(updates)
        averages = [average(v, g) for v, g in zip(jax.tree.leaves(state.ema), grads, strict=True)]
        moves = [None if g is None else times(-s, v).astype(v.dtype) for v, g in zip(averages, grads, strict=True)]
        new_state = VelocityState(optax.safe_increment(state.count), treedef.unflatten(averages))
        return treedef.unflatten(moves), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def at_step(value: ArrayLike | optax.Schedule, count: jax.Array) -> jax.Array:
    """The value of a number or schedule at a step, float32."""
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def check_time(name: str, value: Any) -> None:
    """Raise a ValueError for a concrete number that is not above 0."""
    if not isinstance(value, jax.core.Tracer) and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
