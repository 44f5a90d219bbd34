"""Schedules of the methods that Optax does not have: prune rates, sparsities, step sizes of dual averaging.

Each is a function from the step, counted from 0 in int32, to a value. The prune rate (also called drop fraction) is the
share of a layer's weights that one mask update replaces; the sparsity is the fraction of zeros to reach.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "RDASchedules", "cosine_prune_rate", "rda_cosine", "rda_halving", "rda_log_cosine", "rising_cosine",
    "sigmoid_sparsity",
]  # fmt: skip


def cosine_prune_rate(init_value: float, steps: int, end_value: float = 0.005) -> optax.Schedule:
    r"""Cosine decay of the prune rate, as sparse momentum's authors use it.

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
    return lambda step: end_value + (init_value - end_value) * decay(_as_float(step))


def rising_cosine(end_value: float, steps: int) -> optax.Schedule:
    r"""Half a cosine from 0 up to a value, as for the penalty of SAFE, see :func:`jaxsparse.admm`.

    .. math:: \lambda_t = \lambda \frac{1 - \cos(\pi t / T)}{2}

    Args:
      end_value: :math:`\lambda`, at least 0; it stays there after T steps.
      steps: :math:`T`, the number of training steps, at least 1.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = rising_cosine(2.0, 100)
      >>> [round(float(schedule(t)), 4) for t in (0, 25, 50, 100, 200)]
      [0.0, 0.2929, 1.0, 2.0, 2.0]
    """
    if not end_value >= 0 or not steps >= 1:
        raise ValueError(f"end_value must be at least 0 and steps at least 1, got {end_value} and {steps}")
    falling = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: end_value * (1 - falling(jnp.asarray(step, jnp.float32)))


def sigmoid_sparsity(
    magnitude: float, steps: int, scale: float, translation: float = 0.5, *, begin: int = 0, normalised: bool = False
) -> optax.Schedule:
    r"""The sparsity schedule of ASNI, a sigmoid: slow, fast, slow.

    .. math:: s_t = m \, \sigma(x_t), \qquad x_t = \frac{t - t_0 - \tau T}{c}

    It starts above 0 and ends below m, as published. The author counts epochs from 0 and prunes at the end of each: in
    steps, with epochs of n, :math:`t_0` is n, the step of the first pruning. With ``normalised`` it is shifted and
    stretched to be exactly 0 at t = 0 and exactly m from t = T on:

    .. math:: s_t = m \, \frac{\sigma(x_t) - \sigma(x_0)}{\sigma(x_T) - \sigma(x_0)}

    (E epochs of :func:`jaxsparse.asni` prune for the last time at (E - 1) n: to end there, T is (E - 1) n.)

    Args:
      magnitude: m, in [0, 1].
      steps: T, at least 1.
      scale: c > 0, in steps: the smaller, the steeper.
      translation: :math:`\tau`: where in the T steps the sigmoid has its middle.
      begin: :math:`t_0`, a step of at least 0.
      normalised: whether it ends at ``magnitude`` exactly.

    Returns:
      Step -> sparsity, in double precision where that is enabled, as it is in :func:`jaxsparse.asni`.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = sigmoid_sparsity(0.99, steps=16_000, scale=1_600, begin=100)
      >>> [round(float(schedule(t)), 4) for t in (100, 8_100, 16_000)]
      [0.0066, 0.495, 0.9829]
      >>> round(float(sigmoid_sparsity(0.99, steps=16_000, scale=1_600, normalised=True)(16_000)), 4)
      0.99

    References:
      Damadi, Nouri and Pirsiavash, Amenable Sparse Network Investigator, 2022;
      https://github.com/sdamadi/image-classification (utils/pruning.py).
    """
    if not 0 <= magnitude <= 1:
        raise ValueError(f"magnitude is a sparsity, a fraction of zeros, and must be in [0, 1], got {magnitude}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not scale > 0:
        raise ValueError(f"scale is a number of steps and must be above 0, got {scale}")
    if begin < 0:
        raise ValueError(f"begin is a step and must be at least 0, got {begin}")
    ends = (np.array([0, steps], np.float32) - begin - translation * steps) / scale
    if normalised and not np.tanh(ends[0] / 2) < np.tanh(ends[1] / 2):
        raise ValueError(
            f"a sigmoid around begin + translation * steps = step {begin + translation * steps:g} does not rise from "
            f"step 0 to {steps}, so it cannot be normalised"
        )

    def value(t):
        return jax.nn.sigmoid((t - begin - translation * steps) / scale)

    def normal(step):
        t = _as_float(step)
        # The ends in the same precision and by the same operations, so that the last step is exact.
        first, last = (value(jnp.full_like(t, end)) for end in (0, steps))
        return magnitude * jnp.clip((value(t) - first) / (last - first), 0, 1)

    return normal if normalised else lambda step: magnitude * value(_as_float(step))


class RDASchedules(NamedTuple):
    """A step size and its averaging, a pair of schedules for :func:`jaxsparse.rda`.

    Attributes:
      step_size: s of every step.
      averaging: a of every step, in [0, 1].
    """

    step_size: optax.Schedule
    averaging: optax.Schedule


def rda_cosine(init_value: float, steps: int) -> RDASchedules:
    r"""The cosine pair of :func:`jaxsparse.rda`: the step size goes to 0, the averaging to 1.

    .. math:: s_t = s_0 \frac{1 + \cos(\pi t / T)}{2}, \qquad a_t = \frac{1 - \cos(\pi t / T)}{2} = 1 - s_t / s_0

    for t = 1, ..., T: as the authors count, the first step (step 0) has t = 1, the last t = T and a step size of 0.

    Args:
      init_value: :math:`s_0` >= 0.
      steps: :math:`T`, the number of training steps, at least 1; after them the last value stays.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> step_size, averaging = rda_cosine(1.0, 100)
      >>> [round(float(step_size(t)), 4) for t in (0, 49, 99)]
      [0.9998, 0.5, 0.0]
      >>> [round(float(averaging(t)), 4) for t in (0, 49, 99)]
      [0.0002, 0.5, 1.0]

    References:
      Siegel et al., Training Sparse Neural Networks using Compressed Sensing, 2020;
      https://github.com/dmaywald/xrda-sparse-training (CosineSpecs).
    """
    _check_rda(init_value, steps)

    # (1 - cos x) / 2 = sin^2(x / 2), from either end: 1 + cos would lose the last digits of small step sizes.
    def rising(t):
        return jnp.sin(0.5 * math.pi * t / steps) ** 2

    def passed(step):
        return jnp.minimum(_counted_from_1(step), steps)

    return RDASchedules(lambda step: init_value * rising(steps - passed(step)), lambda step: rising(passed(step)))


def rda_halving(init_value: float, boundaries: Sequence[int]) -> RDASchedules:
    """The halving pair of :func:`jaxsparse.rda`: at each boundary s and 1 - a are halved.

    The authors do so after epochs 60, 100, 140, ..., 420 of 500. Before the first boundary a is 0.

    Args:
      init_value: the first step size, >= 0.
      boundaries: the steps at which they are halved: the first steps with the new values.

    Raises:
      ValueError: for a negative step size or boundary.

    Examples:
      >>> step_size, averaging = rda_halving(1.0, [100, 200])
      >>> [float(step_size(t)) for t in (99, 100, 200)]
      [1.0, 0.5, 0.25]
      >>> [float(averaging(t)) for t in (99, 100, 200)]
      [0.0, 0.5, 0.75]

    References:
      As :func:`rda_cosine` (IterationSpecs).
    """
    _check_rda(init_value, 1)
    for boundary in boundaries:
        if boundary < 0:
            raise ValueError(f"boundaries are steps and must be at least 0, got {boundary}")

    def share(step):
        return jnp.exp2(-sum((jnp.asarray(step >= b, jnp.float32) for b in boundaries), jnp.float32(0)))

    return RDASchedules(lambda step: init_value * share(step), lambda step: 1 - share(step))


def rda_log_cosine(init_value: float, steps: int) -> RDASchedules:
    r"""A warm-up, then the cosine of the logarithm of the step size, with the averaging of :func:`rda_cosine`.

    .. math:: s_t = 50 s_0 t / T \text{ for } t \le T / 50, \text{ then } s_0 \cdot
       10^{1.1 (\cos(\frac{50}{49} \frac{\pi t}{T} - \frac{\pi}{49}) - 1)}

    which ends at :math:`10^{-2.2} s_0`. The authors wrote it for ImageNet.

    Args:
      init_value: :math:`s_0` >= 0, the largest step size.
      steps: :math:`T`, the number of training steps, at least 1; t counts from 1.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> step_size, averaging = rda_log_cosine(1.0, 100)
      >>> [round(float(step_size(t)), 4) for t in (0, 1, 50, 99)]
      [0.5, 1.0, 0.0794, 0.0063]

    References:
      As :func:`rda_cosine` (ExpCosineSpecs).
    """
    _check_rda(init_value, steps)

    def step_size(step):
        t = jnp.minimum(_counted_from_1(step), steps) / steps
        decayed = 10.0 ** (1.1 * (jnp.cos((50 * t - 1) * math.pi / 49) - 1))
        return init_value * jnp.where(t <= 1 / 50, 50 * t, decayed)

    return RDASchedules(step_size, rda_cosine(init_value, steps).averaging)


def _as_float(stage):
    """A count as a float, of double precision where that is enabled: integers would divide to float32."""
    return jnp.asarray(stage, float)


def _counted_from_1(step):
    return jnp.asarray(step, jnp.float32) + 1


def _check_rda(init_value: float, steps: int) -> None:
    if not init_value >= 0:
        raise ValueError(f"init_value is a step size and must be at least 0, got {init_value}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _check(init_value: float, steps: int, end_value: float) -> None:
    for name, value in (("init_value", init_value), ("end_value", end_value)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a prune rate and must be in [0, 1], got {value}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
