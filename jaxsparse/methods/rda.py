"""Generalised regularised dual averaging: weight decay, a running mean of the gradients, and reweighted l1, in one.

Siegel, Chen, Zhang and Xu, *Training Sparse Neural Networks using Compressed Sensing*, 2020
(https://arxiv.org/abs/2008.09661), whose optimizer this is (class xRDA of
https://github.com/dmaywald/xrda-sparse-training at f88d0d5).
"""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.methods.reweighted_l1 import reweighted_l1
from jaxsparse.structures import StructureLike
from jaxsparse.transforms.chain import chain
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.velocity import velocity

__all__ = ["rda"]


def rda(
    step_size: ArrayLike | optax.Schedule,
    *,
    l1: ArrayLike | optax.Schedule,
    averaging: ArrayLike | optax.Schedule = 0.0,
    momentum_time: ArrayLike = 9.5,
    weight_time: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    max_factor: ArrayLike = 500.0,
    structure: StructureLike = "weight",
    state_dtype: Any = None,
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Find how few weights are needed, by dual averaging with reweighted l1 (Siegel et al., 2020).

    Weight decay on all params, :func:`jaxsparse.velocity` and :func:`reweighted_l1`, in one chain.

    Args:
      step_size: as for :func:`reweighted_l1`; the authors start at 1.
      l1: as for :func:`reweighted_l1`; the authors take about 1e-6 for convolutional networks with a step size of 1.
      averaging: as for :func:`reweighted_l1`; with the step size from :func:`jaxsparse.rda_cosine` or
        :func:`jaxsparse.rda_halving`.
      momentum_time: as for :func:`jaxsparse.velocity`.
      weight_time: as for :func:`reweighted_l1`; None takes ``momentum_time``, as the authors do.
      weight_decay: >= 0; this times the params is added to the gradients, including those of biases and scales.
      max_factor, structure, state_dtype, prunable, layout: as for :func:`reweighted_l1`.

    Returns:
      A gradient transformation. Its ``update`` needs the params.

    Raises:
      ValueError: as :func:`reweighted_l1`.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
      >>> step_size, averaging = jaxsparse.rda_cosine(1.0, steps=54_000)
      >>> tx = jaxsparse.rda(step_size, l1=3e-6, averaging=averaging, weight_decay=5e-4)
      >>> opt_state = tx.init(params)
      >>> print(jaxsparse.density(jaxsparse.get_masks(opt_state)))  # dense at first; zeros come while training
      1.0

    References:
      Siegel, Chen, Zhang and Xu, `Training Sparse Neural Networks using Compressed Sensing
      <https://arxiv.org/abs/2008.09661>`_, 2020.
    """
    if isinstance(step_size, tuple):
        raise ValueError(
            "step_size must be one schedule, got a pair: unpack it, step_size, averaging = jaxsparse.rda_cosine(...)"
        )
    check_range("weight_decay", weight_decay, 0)
    no_decay = not isinstance(weight_decay, jax.core.Tracer) and weight_decay == 0
    return chain(
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay),
        velocity(step_size, momentum_time),
        reweighted_l1(
            step_size,
            l1=l1,
            averaging=averaging,
            weight_time=momentum_time if weight_time is None else weight_time,
            max_factor=max_factor,
            structure=structure,
            state_dtype=state_dtype,
            prunable=prunable,
            layout=layout,
        ),
    )
