"""Optimizers that Optax has, as convolutional networks take them, for the configs to call by name."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib


def muon_of_convolutions(
    learning_rate: float | Callable[[Any], Any],
    adam_factor: float = 0.1,
    ns_steps: int = 5,
    beta: float = 0.95,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon for convolutions, and Adam for the other params.

    ``optax.contrib.muon`` by itself takes matrices alone. A kernel of a convolution, (height, width, input channels,
    output channels), is orthogonalised as the matrix of its output channels by all the rest; matrices, which in
    convolutional networks are those of classifiers, biases and norms are Adam's.

    Args:
      learning_rate: of Muon, a number or a schedule.
      adam_factor: the learning rate of Adam, as a share of Muon's at the same step.
      ns_steps: the Newton-Schulz steps that orthogonalise.
      beta: the momentum.
      weight_decay: of the kernels of convolutions, decoupled.

    Returns:
      The optimizer.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)}
      >>> state = muon_of_convolutions(0.02).init(params)
      >>> momenta, *_ = state.inner_states["muon"].inner_state
      >>> jax.tree.map(jnp.shape, momenta.mu)
      {'bias': MaskedNode(), 'kernel': (3, 3, 4, 8)}

    Source:
      Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024
      (https://kellerjordan.github.io/posts/muon/), whose convolutions are flattened in the same way.
    """

    def adam_rate(step: Any) -> Any:
        return adam_factor * (learning_rate(step) if callable(learning_rate) else learning_rate)

    return optax.contrib.muon(
        learning_rate,
        ns_steps=ns_steps,
        beta=beta,
        weight_decay=weight_decay,
        adam_learning_rate=adam_rate,
        muon_weight_dimension_numbers=_matrices_of,
    )


def _matrices_of(params: optax.Params) -> Any:
    """For each leaf how it is a matrix, or None for those of Adam."""

    def of(leaf: Any) -> Any:
        axes = tuple(range(leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:-1], axes[-1:]) if leaf.ndim > 2 else None

    return jax.tree.map(of, params)
