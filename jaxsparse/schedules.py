"""Prune-rate schedules: Optax schedules, step (from 0) to value.

The prune rate is the share of a layer's weights that one mask update replaces.
"""

import optax

__all__ = ["cosine_prune_rate", "linear_prune_rate"]


def cosine_prune_rate(init_value: float, steps: int, end_value: float = 0.005) -> optax.Schedule:
    r"""Cosine decay of the prune rate, the default of sparse momentum.

    .. math:: p_t = p_T + (p_0 - p_T) \frac{1 + \cos(\pi t / T)}{2}

    after T steps it stays at the end value. (The paper says that it decays to zero;
    the authors' code, followed here, stops at 0.005.)

    Args:
      init_value: :math:`p_0`, in [0, 1].
      steps: :math:`T`, the number of training steps, at least 1.
      end_value: :math:`p_T`, in [0, 1].

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = cosine_prune_rate(0.5, 100)
      >>> [round(float(schedule(t)), 4) for t in (0, 50, 100)]
      [0.5, 0.2525, 0.005]

    References:
      Dettmers and Zettlemoyer, Sparse Networks from Scratch, 2019;
      https://github.com/TimDettmers/sparse_learning (CosineDecay).
    """
    _check(init_value, steps, end_value)
    decay = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: end_value + (init_value - end_value) * decay(step)


def linear_prune_rate(init_value: float, steps: int, end_value: float = 0.0) -> optax.Schedule:
    r"""Linear decay of the prune rate, :math:`p_t = p_0 + (p_T - p_0) t / T`.

    Args:
      init_value: :math:`p_0`, in [0, 1].
      steps: :math:`T`, the number of training steps, at least 1.
      end_value: :math:`p_T`, in [0, 1].

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = linear_prune_rate(0.5, 100)
      >>> [round(float(schedule(t)), 4) for t in (0, 50, 100)]
      [0.5, 0.25, 0.0]
    """
    _check(init_value, steps, end_value)
    return optax.linear_schedule(init_value, end_value, steps)


def _check(init_value: float, steps: int, end_value: float) -> None:
    for name, value in (("init_value", init_value), ("end_value", end_value)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a prune rate and must be in [0, 1], got {value}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
