"""Hard-concrete gates as a Flax layer, with a sample for each example."""

import jax
from flax import linen as nn

from jaxsparse.methods.l0 import EPSILON, hard_concrete, hard_concrete_mean

__all__ = ["HardConcreteGate"]


class HardConcreteGate(nn.Module):
    """Multiplies every channel by a hard-concrete gate, drawn anew for each example.

    This is what the code of Dep-L0 does. :func:`jaxsparse.l0` draws one sample for a batch (or for each device), which
    needs no change to the model and no work in the forward pass; with a sample for each example the gradient of the
    gates varies less. The penalty is added to the loss by hand, of :func:`jaxsparse.prob_open`.

    Where ``apply`` is given a key for "gates" they are drawn, elsewhere they are those to evaluate with.

    Attributes:
      log_alpha: mean of the initial values; the standard deviation is 0.01. 3 is that of Dep-L0's code.
      per_example: whether examples, the first axis, have gates of their own.

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
        """``x`` (batch, ..., channels) times the gates.

        Args:
          x: features.
          log_alpha: (channels,), such as of :func:`jaxsparse.dependent_logits`; None: a parameter of the layer.
        """
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
