"""SR-STE: n:m sparsity trained from scratch, with a decay of the pruned weights.

Zhou et al., *Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch*, 2021
(https://arxiv.org/abs/2102.04010), with the authors' code (https://github.com/NM-sparsity/NM-sparsity at 3cebd6b,
``devkit/sparse_ops/sparse_ops.py``).
"""

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import n_of_m
from jaxsparse.transforms.checks import check_schedule
from jaxsparse.transforms.largest import n_largest
from jaxsparse.transforms.latent import map_latents
from jaxsparse.transforms.masked_latent import MaskedLatentState, masked_latent

__all__ = ["SRSTEState", "sr_ste"]


class SRSTEState(MaskedLatentState):
    """State of :func:`sr_ste`."""

    method = "sr_ste"


def sr_ste(
    inner: optax.GradientTransformation,
    n: int,
    m: int,
    *,
    decay: ArrayLike | optax.Schedule = 2e-4,
    every: ArrayLike = 1,
    axis: Literal["inputs", "outputs"] | int = "inputs",
    ragged: Literal["error", "warn"] = "error",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train n:m sparse layers from scratch, all weights behind a straight-through mask (Zhou et al., 2021).

    A wrapper: around an optimizer.

    The loss sees the n largest of every m consecutive latent weights w along the inputs. Its gradient is taken for that
    of all of them, and pruned weights decay. With u the update of the inner optimizer,

    .. math::
       \tilde w &= m(w) \, w \\
       g &= \frac{\partial L}{\partial \tilde w} + \lambda (1 - m(w)) \, w \\
       w &\leftarrow w + u(g)

    :math:`\tilde w` are the params that training holds, w is in the state. Masks are chosen anew for every step; of
    equal weights the lowest indices stay. Without the decay, ``decay=0``, this is the plain straight-through
    estimator, with which weights go in and out of the masks more and more often. ``flips / size`` of the state is the
    flip rate, the fraction of weights that did: in training that goes well it rises and then falls, as with a dense
    network, and with Adam Hu et al. choose ``decay`` by that.

    Args:
      inner: the optimizer of the weights, with its weight decay and schedules, which act on all of w.
      n, m: how many weights stay of how many, ints with 1 <= n <= m.
      decay: :math:`\lambda` >= 0, added to the gradient, so that the learning rate scales it and momentum averages it;
        or a schedule, step -> :math:`\lambda`.
      every: masks are chosen on the multiples of so many steps, int >= 1; on other steps this costs nothing. The
        published method has 1.
      axis: what groups lie along, see :class:`jaxsparse.n_of_m`: the "inputs", which sparse matrix hardware sums over,
        the "outputs", or an axis of all leaves by its number.
      ragged: what becomes of leaves that do not divide into groups of m: "error" names them in a ValueError (leave them
        out by ``prunable``, as the authors do with a first convolution); "warn" names them in a warning and keeps their
        largest weights, a fraction n / m of each leaf, and at least one.
      prunable: which leaves have latent weights, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`SRSTEState`: a copy of the sparse leaves in their own dtype, and
      one byte a weight. Its ``update`` needs the params.

    Raises:
      ValueError: for an inner optimizer that is none, n and m or numbers out of range, leaves that do not divide,
        params with a replica axis, 2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"w": jnp.array([[1.0], [-2.0], [3.0], [-4.0]])}
      >>> tx = jaxsparse.sr_ste(optax.sgd(0.5), 2, 4, decay=0.5)
      >>> opt_state = tx.init(params)
      >>> params = jaxsparse.sparsify(opt_state, params)
      >>> updates, opt_state = tx.update({"w": jnp.array([[0.0], [4.0], [4.0], [0.0]])}, opt_state, params)
      >>> opt_state.weights["w"][:, 0].tolist()  # the decay takes a quarter of the first two
      [0.75, -3.5, 1.0, -4.0]
      >>> optax.apply_updates(params, updates)["w"][:, 0].tolist()
      [0.0, -3.5, 0.0, -4.0]

    References:
      Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
      <https://arxiv.org/abs/2102.04010>`_, 2021; Hu et al., `Accelerating Transformer Pre-training with 2:4 Sparsity
      <https://arxiv.org/abs/2404.01847>`_, 2024 (the flip rate).

    .. warning::
      Nothing may move the params after the wrapper: only :func:`jaxsparse.check` finds it.
    """
    check_schedule("decay", decay, 0, None, steps=[0])

    def pull(grads, weights, state):
        rate = decay(state.count) if callable(decay) else decay

        def decayed(g, w, mask):
            return g + jnp.asarray(rate, g.dtype) * jnp.where(mask, 0, w).astype(g.dtype)

        return map_latents(decayed, grads, weights, state.masks), state

    return masked_latent(
        SRSTEState,
        inner,
        n_largest(n, m),
        pull=pull,
        every=every,
        structure=n_of_m(n, m, axis=axis, ragged=ragged),
        prunable=prunable,
        layout=layout,
    )
