"""Optax schedules, step (from 0) to value: prune rates, sparsities, the step sizes and averagings of dual averaging.

The prune rate is the share of a layer's weights that one mask update replaces. The sparsity is the fraction of zeros
that pruning is to reach; its schedules count stages (or steps, as their user will have it), and compute in double
precision where that is enabled, as it is in :func:`jaxsparse.asni`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = [
    "RDASchedules", "constant_sparsity", "cosine_prune_rate", "cubic_sparsity", "linear_prune_rate", "linear_sparsity",
    "rda_cosine", "rda_halving", "rda_log_cosine", "sigmoid_sparsity", "two_phase_sparsity",
]  # fmt: skip


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


def sigmoid_sparsity(
    magnitude: float, stages: int, scale: float, translation: float = 0.5, *, normalised: bool = False
) -> optax.Schedule:
    r"""The sparsity of ASNI, a sigmoid: slow, fast, slow.

    .. math:: s_t = m \, \sigma\!\left(\frac{t - \tau N}{c}\right), \qquad t = 0, \dots, N - 1

    It starts above 0 and ends below m, as published. With ``normalised``, it is shifted and stretched to reach m
    exactly, from exactly 0 one stage before the first, at N - 2: nothing is pruned after the last stage, so N stages of
    training with :func:`jaxsparse.asni` end there.

    .. math:: s_t = m \, \frac{\sigma(x_t) - \sigma(x_{-1})}{\sigma(x_{N-2}) - \sigma(x_{-1})}, \qquad
       x_t = \frac{t - \tau (N - 1)}{c}

    Args:
      magnitude: m, in [0, 1].
      stages: N, at least 1.
      scale: c > 0, in stages: the smaller, the steeper.
      translation: :math:`\tau`: where in the N stages the sigmoid has its middle.
      normalised: whether it ends at ``magnitude`` exactly.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = sigmoid_sparsity(0.99, stages=160, scale=16)
      >>> [round(float(schedule(t)), 4) for t in (0, 80, 159)]
      [0.0066, 0.495, 0.9829]
      >>> round(float(sigmoid_sparsity(0.99, stages=160, scale=16, normalised=True)(158)), 4)
      0.99

    References:
      Damadi, Nouri and Pirsiavash, Amenable Sparse Network Investigator, 2022;
      https://github.com/sdamadi/image-classification (utils/pruning.py).
    """
    _check_sparsities(stages, magnitude=magnitude)
    if not scale > 0:
        raise ValueError(f"scale is a number of stages and must be above 0, got {scale}")

    length = _prunings(stages) if normalised else stages

    def value(t):
        return jax.nn.sigmoid((t - translation * length) / scale)

    if not normalised:
        return lambda stage: magnitude * value(_as_float(stage))

    def normal(stage):
        t = _as_float(stage)
        # The ends in the same precision and by the same operations, so that the last stage is exact.
        first, last = (value(jnp.full_like(t, end)) for end in (-1, length - 1))
        return magnitude * jnp.clip((value(t) - first) / (last - first), 0, 1)

    return normal


def two_phase_sparsity(first: optax.Schedule, second: optax.Schedule, boundary: int) -> optax.Schedule:
    r"""One sparsity schedule on top of another, ASNI's general form (its final runs have one phase).

    .. math:: s_t = a_t \text{ for } t < K, \qquad s_t = a_{K-1} + b_{t-K} \text{ for } t \ge K

    Args:
      first: a, for instance ``sigmoid_sparsity(0.8, stages=K, scale=5)``.
      second: b, what is added later.
      boundary: K, at least 1.

    Raises:
      ValueError: for a boundary below 1.

    Examples:
      >>> schedule = two_phase_sparsity(linear_sparsity(0.5, 5), linear_sparsity(0.4, 2), boundary=5)
      >>> [round(float(schedule(t)), 2) for t in range(7)]
      [0.12, 0.25, 0.38, 0.5, 0.5, 0.9, 0.9]

    References:
      As :func:`sigmoid_sparsity`.
    """
    if boundary < 1:
        raise ValueError(f"boundary is a stage and must be at least 1, got {boundary}")

    def value(stage):
        t = jnp.asarray(stage)
        return jnp.where(t < boundary, first(t), first(jnp.full_like(t, boundary - 1)) + second(t - boundary))

    return value


def cubic_sparsity(final_value: float, stages: int, *, init_value: float = 0.0, start: int = 0) -> optax.Schedule:
    r"""The sparsity of gradual magnitude pruning: fast at first, ever slower.

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{n}\right)^3

    from :math:`s_i` at :math:`t_0` to :math:`s_f` at :math:`t_0 + n`, and constant before and after. (N stages of
    training with :func:`jaxsparse.asni` end at :math:`s_{N-2}`: that is :math:`s_f` for n up to :math:`N - 2 - t_0`.)

    Args:
      final_value: :math:`s_f`, in [0, 1].
      stages: n, at least 1.
      init_value: :math:`s_i`, in [0, 1].
      start: :math:`t_0`.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = cubic_sparsity(0.8, 10)
      >>> [round(float(schedule(t)), 4) for t in (0, 5, 10, 20)]
      [0.0, 0.7, 0.8, 0.8]

    References:
      Zhu and Gupta, To prune, or not to prune, 2017 (arXiv:1710.01878), eq. (1).
    """
    _check_sparsities(stages, final_value=final_value, init_value=init_value)

    def value(stage):
        left = 1 - jnp.clip((_as_float(stage) - start) / stages, 0, 1)
        return final_value + (init_value - final_value) * left**3

    return value


def linear_sparsity(final_value: float, stages: int, *, init_value: float = 0.0) -> optax.Schedule:
    r"""The same share more in each stage: :math:`s_t = s_i + (s_f - s_i) (t + 1) / (N - 1)`, constant from N - 2 on.

    Nothing is pruned after the last stage, so N stages of training with :func:`jaxsparse.asni` end at :math:`s_f`.

    Args:
      final_value: :math:`s_f`, in [0, 1].
      stages: N, at least 1, those of training.
      init_value: :math:`s_i`, in [0, 1]: before the first stage.

    Raises:
      ValueError: for values out of range.

    Examples:
      >>> schedule = linear_sparsity(0.8, 5)
      >>> [round(float(schedule(t)), 2) for t in range(5)]
      [0.2, 0.4, 0.6, 0.8, 0.8]
    """
    _check_sparsities(stages, final_value=final_value, init_value=init_value)
    steps = _prunings(stages)

    def value(stage):
        way = jnp.maximum((_as_float(stage) + 1) / steps, 0)
        return jnp.where(way >= 1, final_value, init_value + (final_value - init_value) * way)  # exact at the end

    return value


def constant_sparsity(value: float) -> optax.Schedule:
    """The same sparsity always: all pruning at once.

    Args:
      value: in [0, 1].

    Raises:
      ValueError: for a value out of range.

    Examples:
      >>> constant_sparsity(0.9)(7)
      0.9
    """
    _check_sparsities(1, value=value)
    return optax.constant_schedule(value)


class RDASchedules(NamedTuple):
    """Two schedules that belong together, for :func:`jaxsparse.rda`.

    Attributes:
      step_size: s of every step.
      averaging: a of every step, in [0, 1].
    """

    step_size: optax.Schedule
    averaging: optax.Schedule


def rda_cosine(init_value: float, steps: int) -> RDASchedules:
    r"""The cosine pair of training with compressed sensing: the step size goes to 0, the averaging to 1.

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
    """The halving pair of training with compressed sensing: at each boundary s and 1 - a are halved.

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


def _prunings(stages: int) -> int:
    """How often a training of so many stages prunes: not after the last (but a single stage has a schedule too)."""
    return max(stages - 1, 1)


def _counted_from_1(step):
    return jnp.asarray(step, jnp.float32) + 1


def _check_rda(init_value: float, steps: int) -> None:
    if not init_value >= 0:
        raise ValueError(f"init_value is a step size and must be at least 0, got {init_value}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _check_sparsities(stages: int, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a sparsity, a fraction of zeros, and must be in [0, 1], got {value}")
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")


def _check(init_value: float, steps: int, end_value: float) -> None:
    for name, value in (("init_value", init_value), ("end_value", end_value)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a prune rate and must be in [0, 1], got {value}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
