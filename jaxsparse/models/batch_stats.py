"""Statistics of batch normalisation, gathered anew."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

__all__ = ["reestimate_batch_stats"]


def reestimate_batch_stats(
    model: nn.Module, params: Any, batch_stats: Any, batches: Iterable[jax.Array], **kwargs: Any
) -> Any:
    r"""Recompute running means and variances of batch normalisation, as the plain mean over batches.

    Use this for a network whose channels, gates or masks have changed since its statistics were gathered: gates are
    random in training, but not in evaluation.

    A call in training replaces the statistics r by :math:`m r + (1 - m) s`, with those of the batch, s. The momentum m
    of each leaf is measured, by two calls with the first batch; all others start from r = 0.

    Args:
      model: the model.
      params: its params, those to evaluate with.
      batch_stats: its batch statistics, for their structure. Those that a call does not change stay as they are.
      batches: inputs of the model, a few hundred examples each, such as twenty batches of the train images.
      **kwargs: further arguments of the model's call that make it gather statistics, such as ``train=True``.

    Returns:
      Batch statistics like ``batch_stats``.

    Raises:
      ValueError: if there are no batches, or the model gathers no statistics when called like this.

    Examples:
      >>> import jax, flax.linen as nn, jax.numpy as jnp
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[1.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> stats = reestimate_batch_stats(model, variables["params"], variables["batch_stats"], [x])
      >>> [round(float(stats[name][0]), 3) for name in ("mean", "var")]
      [2.0, 1.0]
    """
    # The batches are whole: no axis of devices is bound here.
    local = model.clone(axis_name=None) if getattr(model, "axis_name", None) else model

    @jax.jit
    def updated(start, images):
        _, new = local.apply({"params": params, "batch_stats": start}, images, mutable=["batch_stats"], **kwargs)
        return new["batch_stats"]

    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    total, momenta, number = None, None, 0
    for images in batches:
        found = updated(zeros, images)
        if total is None:
            # As large as what is found, so that the difference keeps its digits.
            start = jax.tree.map(lambda x: jnp.abs(x) + 1, found)
            momenta = jax.tree.map(_momentum, updated(start, images), found, start)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        number += 1
    if total is None:
        raise ValueError("reestimate_batch_stats needs at least one batch")
    if all(momentum == 1 for momentum in jax.tree.leaves(momenta)):
        raise ValueError(
            "the model gathered no statistics: call it as in training, with reestimate_batch_stats(..., train=True) "
            "or the like"
        )
    return jax.tree.map(
        lambda old, x, momentum: old if momentum == 1 else x / (number * (1 - momentum)), batch_stats, total, momenta
    )


def _momentum(after: jax.Array, after_zero: jax.Array, start: jax.Array) -> float:
    """The momentum of a leaf, by what it is after a call that it started as ``start``, and as zeros.

    One that is not updated has 1. Statistics in float32 tell it to about a millionth.
    """
    shares = (np.asarray(after, np.float64) - np.asarray(after_zero, np.float64)) / np.asarray(start, np.float64)
    return round(float(np.median(shares)), 6)
