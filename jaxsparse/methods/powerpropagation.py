"""Powerpropagation: weights as powers of what the optimizer moves, so that small ones stay small and can be pruned.

Schwarz et al., *Powerpropagation: A sparsity inducing weight reparameterisation*, 2021
(https://arxiv.org/abs/2110.00296).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.prunable import prunable_leaves
from jaxsparse.transforms.chain import chain
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.latent import LatentState, as_optimizer, latent, map_latents, not_finite
from jaxsparse.transforms.protocols import link_states
from jaxsparse.trees import by_path

__all__ = ["PowerpropagationState", "powerpropagation"]


class PowerpropagationState(LatentState):
    """State of :func:`powerpropagation`; ``own`` is alpha, (), float32. The masks are those of a link inside."""

    method = "powerpropagation"

    def sparse_masks(self) -> Any:
        """None of its own: ``optax.MaskedNode()`` for every leaf."""
        return jax.tree.map(lambda _: optax.MaskedNode(), self.weights)

    def problems(self, params: Any | None) -> list[str]:
        """Latent weights that are not finite, params that are not their powers."""
        found = not_finite(self.weights, self.method)
        if params is None or found:
            return found
        leaves, alpha = by_path(params), jax.tree.leaves(self.own)[0]  # flax.nnx wraps the leaves of an optimizer state
        for path, w in by_path(self.weights).items():
            exponent = alpha.reshape(alpha.shape + (1,) * (w.ndim - alpha.ndim)).astype(w.dtype)
            power = jnp.sign(w) * jnp.abs(w) ** exponent
            away = jnp.max(jnp.abs(leaves[path] - power), initial=0)
            if away > 16 * jnp.finfo(w.dtype).eps * (1 + jnp.max(jnp.abs(power), initial=0)):
                found.append(
                    f"{self.method}: {path} is not the power of its latent weights, but up to {float(away):.2g} away. "
                    "Something moves the params after the wrapper: put a link that prunes inside, as prune="
                )
        return found

    def notes(self) -> list[str]:
        """Weights that are kept and 0, which stay there."""
        weights = by_path(self.weights)
        masks = {
            path: mask for link in link_states(self.inner_state) for path, mask in by_path(link.sparse_masks()).items()
        }
        stuck = {path: int(jnp.sum((w == 0) & masks.get(path, True))) for path, w in weights.items()}
        return [
            f"{self.method}: {count} weights of {path} are 0 and not pruned. A power has no slope at 0, so they stay "
            "there: it cannot be combined with methods that grow weights from 0"
            for path, count in stuck.items()
            if count
        ]


def powerpropagation(
    inner: optax.GradientTransformation,
    alpha: ArrayLike = 3.0,
    *,
    prune: optax.GradientTransformation | None = None,
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prune weights that training itself keeps small, by powers of latent weights (Schwarz et al., 2021).

    A wrapper: around an optimizer.

    The params p that training hands out are powers of latent weights w, which the inner optimizer moves by the gradient
    G of the params times the slope of the power:

    .. math::
       p &= w \, |w|^{\alpha - 1} \\
       g_w &= G \, \alpha |w|^{\alpha - 1}

    So large weights learn faster than small ones, which stay near 0, and more of them can be pruned. The first latent
    weights are :math:`\mathrm{sign}(p) |p|^{1 / \alpha}`: training starts from the params as they are. (In bfloat16
    they move by a few percent in the first update: the root is rounded, and the power multiplies that error.) A weight
    at exactly 0 has no slope and stays there.

    By itself it makes no weight 0: ``prune`` does, a link that acts on the latent weights. Their order of
    magnitude is that of the params, in a layer and in the whole network, so magnitude pruning chooses the same weights.

    Args:
      inner: the optimizer of the latent weights. Its weight decay acts on these.
      alpha: :math:`\alpha`, at least 1; 1 changes nothing. The authors have 2 to 5.
      prune: a link such as :func:`jaxsparse.magnitude_pruning`, put behind ``inner`` in a :func:`jaxsparse.chain`. What
        it prunes never comes back. None: there is none, or ``inner`` is such a chain already.
      prunable: which leaves are powers, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions. The link has a choice of its own.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`PowerpropagationState`: a copy of the chosen leaves. Its
      ``update`` needs the params.

    Raises:
      ValueError: for an ``alpha`` below 1, an optimizer or a link that is none, and, by ``init``, for params with a
        replica axis.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.array([[1.0, -0.008], [0.125, -8.0]])}
      >>> tx = jaxsparse.powerpropagation(optax.sgd(0.1), 3, prune=jaxsparse.magnitude_pruning(0.5, begin=1))
      >>> opt_state = tx.init(params)
      >>> [round(float(w), 4) for w in opt_state.weights["kernel"].ravel()]
      [1.0, -0.2, 0.5, -2.0]
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update({"kernel": jnp.ones((2, 2))}, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(w), 4) for w in opt_state.weights["kernel"].ravel()]  # -2 - 0.1 * 3 * 2**2 = -3.2, ...
      [0.553, 0.0, 0.0, -6.272]
      >>> jaxsparse.get_masks(opt_state)["kernel"].tolist()
      [[True, False], [False, True]]

    References:
      Schwarz et al., `Powerpropagation: A sparsity inducing weight reparameterisation
      <https://arxiv.org/abs/2110.00296>`_, 2021.

    .. warning::
      Nothing may move the params after the wrapper, no link either: it goes inside. Methods that grow weights from 0
      do not work inside, for these weights stay 0.
    """
    check_range("alpha", alpha, 1, math.inf, open_end=True, required=True)
    inner = as_optimizer(inner, "inner", PowerpropagationState.method)
    if prune is not None:
        inner = chain(inner, as_optimizer(prune, "prune", PowerpropagationState.method))
    known = isinstance(alpha, int | float)  # else it may be scheduled
    if not isinstance(alpha, jax.core.Tracer) and alpha == int(alpha):
        alpha = int(alpha)  # a whole power is a product

    def power(w, exponent):
        return jnp.abs(w) ** (exponent if isinstance(exponent, int) else jnp.asarray(exponent, w.dtype))

    def latents(params):
        chosen = prunable_leaves(params, prunable, layout=layout)
        return jax.tree.map(lambda p, c: jnp.sign(p) * power(p, 1 / alpha) if c else optax.MaskedNode(), params, chosen)

    def forward(state):
        state = state._replace(own=jnp.asarray(alpha, jnp.float32))  # it may be scheduled
        return jax.tree.map(lambda w: w * power(w, alpha - 1), state.weights), state

    def start(state, params):
        del params
        return state._replace(own=jnp.asarray(alpha, jnp.float32))

    def pull(grads, weights, state):
        of_params = alpha if known else state.own  # the power that made the params at which the gradient was taken

        def slope(g, w, _):
            return (g * (jnp.asarray(of_params, w.dtype) * power(w, of_params - 1)).astype(g.dtype)).astype(g.dtype)

        return map_latents(slope, grads, weights, state.weights), state

    return latent(PowerpropagationState, inner, latents, forward, start=start, pull=pull)
