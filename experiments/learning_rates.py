"""Learning rates of the papers that Optax has under no name of its own, for the configs to call by theirs."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax


def decays_at(init_value: float, decay_rate: float, at: Sequence[int]) -> optax.Schedule:
    """A constant that is multiplied by ``decay_rate`` at each of some steps.

    Args:
      init_value: before the first of them.
      decay_rate: the factor.
      at: the steps, the first ones with the new value.

    Examples:
      >>> schedule = decays_at(0.1, 0.5, [30, 60])
      >>> [round(float(schedule(step)), 4) for step in (29, 30, 60)]
      [0.1, 0.05, 0.025]
    """
    return optax.piecewise_constant_schedule(init_value, {step: decay_rate for step in at})


def epoch_cosine(init_value: float, every: int, epochs: int, scale: float) -> optax.Schedule:
    """ASNI's cosine: constant within an epoch, and above 0 in the last one.

    Args:
      init_value: in the first epoch.
      every: steps of an epoch.
      epochs: the number of epochs of the training.
      scale: the cosine reaches 0 after this times ``epochs + 1`` epochs.

    Examples:
      >>> schedule = epoch_cosine(1.0, every=100, epochs=9, scale=1.0)
      >>> [round(float(schedule(step)), 4) for step in (0, 99, 100, 899)]
      [1.0, 1.0, 0.9755, 0.0955]
    """

    def cosine(step):
        epoch = step // every
        return 0.5 * init_value * (1 + jnp.cos(jnp.pi * epoch / (scale * (epochs + 1))))

    return cosine


def warmed_up(schedule: optax.Schedule | float, steps: float) -> optax.Schedule:
    """A schedule, or a constant, times 1/n, 2/n, ..., n/n on the first n steps: it starts with step 0 all the same.

    Args:
      schedule: step -> learning rate, or a number.
      steps: n > 0.

    Examples:
      >>> schedule = warmed_up(0.1, 4)
      >>> [round(float(schedule(step)), 4) for step in (0, 1, 3, 10)]
      [0.025, 0.05, 0.1, 0.1]

    References:
      Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017 (arXiv:1706.02677), section 2.
    """
    rate = schedule if callable(schedule) else optax.constant_schedule(schedule)
    return lambda step: rate(step) * jnp.minimum(1.0, (step + 1) / steps)


def starting_at(schedule: optax.Schedule | float, first: int) -> optax.Schedule | float:
    """A schedule without its first steps; a constant stays.

    Args:
      schedule: step -> learning rate, or a number.
      first: the step that comes first.

    Examples:
      >>> schedule = starting_at(optax.linear_schedule(1.0, 0.0, 10), 4)
      >>> [round(float(schedule(step)), 4) for step in (0, 1, 6)]
      [0.6, 0.5, 0.0]
    """
    return (lambda step: schedule(step + first)) if first and callable(schedule) else schedule
