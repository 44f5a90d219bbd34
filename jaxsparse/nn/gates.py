"""Hard-concrete gates as a Flax layer, with a sample for each example."""

import jax
from flax import linen as nn

from jaxsparse.gates import EPSILON, hard_concrete, hard_concrete_mean

__all__ = ["HardConcreteGate"]


class HardConcreteGate(nn.Module):
    """A layer that multiplies every channel by a hard-concrete gate, sampled for each example.

    The code of Dep-L0 samples like this. :func:`jaxsparse.l0` takes one sample per batch (or per device), which needs
    no change to the model and no work in the forward pass; with one sample per example, the gradient of the gates has
    less variance. Add the penalty to the loss yourself, computed from :func:`jaxsparse.prob_open`.

    If ``apply`` gets a key for "gates", gates are sampled; otherwise they have their values for evaluation.

    Attributes:
      log_alpha: mean of the initial values; their standard deviation is 0.01. Dep-L0's code has 3.
      per_example: whether each example, along the first axis, has its own sample.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxsparse
      >>> gate, x = HardConcreteGate(log_alpha=0.0), jnp.ones((4, 3))
      >>> variables = gate.init(jax.random.key(0), x)
      >>> gate.apply(variables, x).round(1)[0].tolist()
      [0.5, 0.5, 0.5]
      >>> drawn = gate.apply(variables, x, rngs={"gates": jax.random.key(1)})
      >>> bool((drawn[0] != drawn[1]).any())
      True
      >>> penalty = 1e-3 * jaxsparse.prob_open(variables["params"]["log_alpha"]).sum()

    References:
      Li and Ji, *Dep-L0*, 2021 (https://arxiv.org/abs/2107.00070); https://github.com/leo-yangli/dep-l0.
    """

    log_alpha: float = 3.0
    per_example: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, log_alpha: jax.Array | None = None) -> jax.Array:
        """Multiply ``x`` (batch, ..., channels) by the gates.

        Args:
          x: features.
          log_alpha: (channels,), for instance from :func:`jaxsparse.dependent_logits`; None: a parameter of the layer.
        """
        if x.ndim < 2:
            raise ValueError(
                f"HardConcreteGate needs x (batch, ..., channels), got shape {x.shape}: give it an axis more"
            )
        channels = x.shape[-1]
        if log_alpha is None:
            log_alpha = self.param("log_alpha", lambda key: self.log_alpha + 0.01 * jax.random.normal(key, (channels,)))
        if log_alpha.shape != (channels,):
            raise ValueError(f"HardConcreteGate needs log_alpha of shape ({channels},), got {log_alpha.shape}")
        ones = [1] * (x.ndim - 2)
        if self.has_rng("gates"):
            examples = x.shape[0] if self.per_example else 1
            shape = (examples, *ones, channels)
            uniform = jax.random.uniform(self.make_rng("gates"), shape, minval=EPSILON, maxval=1 - EPSILON)
            gates = hard_concrete(log_alpha.reshape(1, *ones, channels), uniform)
        else:
            gates = hard_concrete_mean(log_alpha).reshape(1, *ones, channels)
        return x * gates.astype(x.dtype)
