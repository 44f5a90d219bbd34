"""S-STE: n:m sparsity by a pruning function without jumps.

Hu, Zhu and Chen, *S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training*, 2024
(https://arxiv.org/abs/2409.09099), with the authors' code (https://github.com/huyz2023/2by4-pretrain at 9e33012,
``sparse/legacy.py``).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxsparse.layouts import LayoutLike, leaf_layouts
from jaxsparse.structures import n_of_m
from jaxsparse.transforms.largest import n_largest
from jaxsparse.transforms.layers import Layer
from jaxsparse.transforms.masked_latent import MaskedLatentState, masked_latent

__all__ = ["SSTEState", "s_ste"]


class SSTEState(MaskedLatentState):
    """State of :func:`s_ste`; its ``own`` has the scale of each leaf, float32, with axes of length 1."""

    method = "s_ste"


def s_ste(
    inner: optax.GradientTransformation,
    n: int = 2,
    m: int = 4,
    *,
    axis: Literal["inputs", "outputs"] | int = "inputs",
    ragged: Literal["error", "warn"] = "error",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train n:m sparse layers by a soft threshold in every group, in which nothing jumps (Hu et al., 2024).

    A wrapper: around an optimizer.

    Of every m consecutive latent weights w along the inputs the n largest remain, less the largest that does not: with
    t the (m - n)-th smallest magnitude of the group, for 2:4 the second smallest,

    .. math::
       S(w)_i &= \operatorname{sign}(w_i) \max(|w_i| - t, 0) \\
       \tilde w &= \beta \, S(w), \qquad
       \beta = \frac{\langle w_0, S(w_0) \rangle}{\langle S(w_0), S(w_0) \rangle} \\
       w &\leftarrow w + u\!\left(\frac{\partial L}{\partial \tilde w}\right)

    so a weight that enters or leaves does so through 0, and the loss is continuous in w. :math:`\beta` makes up for
    what the threshold takes: it is the best in squared error for the first weights :math:`w_0` of a leaf, and stays.
    :math:`\tilde w` are the params that training holds, w is in the state, and u is the update of the inner optimizer,
    which gets the gradient at :math:`\tilde w` as it is.

    Masks hold the n largest of every group; one of them that is as large as t is 0 too.

    Args:
      inner: the optimizer of the weights, with its weight decay and schedules, which act on all of w.
      n, m: how many weights stay of how many, ints with 1 <= n <= m. The paper has 2:4.
      axis: what groups lie along, see :class:`jaxsparse.n_of_m`: the "inputs", which sparse matrix hardware sums over,
        the "outputs", or an axis of all leaves by its number.
      ragged: what becomes of leaves that do not divide into groups of m: "error" names them in a ValueError (leave them
        out by ``prunable``); "warn" names them in a warning and takes each whole leaf for a group, of which a fraction
        n / m stays, and at least one weight.
      prunable: which leaves have latent weights, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`. Each layer of a stack has a
        scale of its own.

    Returns:
      A gradient transformation with the state :class:`SSTEState`: a copy of the sparse leaves in their own dtype, one
      byte a weight, and the scales. Its ``update`` needs the params.

    Raises:
      ValueError: for an inner optimizer that is none, n and m out of range, leaves that do not divide, params with a
        replica axis, 2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"w": jnp.array([[1.0], [-2.0], [3.0], [-4.0]])}
      >>> tx = jaxsparse.s_ste(optax.sgd(0.5))
      >>> opt_state = tx.init(params)  # S(w) = (0, 0, 1, -2), so beta = (3 + 8) / (1 + 4)
      >>> params = jaxsparse.sparsify(opt_state, params)
      >>> updates, opt_state = tx.update({"w": jnp.array([[0.0], [0.0], [1.0], [0.0]])}, opt_state, params)
      >>> opt_state.weights["w"][:, 0].tolist()  # so S(w) = (0, 0, 0.5, -2)
      [1.0, -2.0, 2.5, -4.0]
      >>> (optax.apply_updates(params, updates)["w"][:, 0] * 10).round(2).tolist()
      [0.0, 0.0, 11.0, -44.0]

    References:
      Hu, Zhu and Chen, `S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training
      <https://arxiv.org/abs/2409.09099>`_, 2024.

    .. warning::
      The params are :math:`\tilde w` from the first update on. ``sparsify`` knows masks alone, so the first gradient is
      taken at the first weights on their masks. Nothing may move the params after the wrapper: only
      :func:`jaxsparse.check` finds it.
    """

    def image(layers, state):
        return [
            (scale * _soft(layer).astype(jnp.float32)).astype(layer.weight.dtype)  # (20)
            for layer, scale in zip(layers, jax.tree.leaves(state.own), strict=True)
        ]

    def scales(layers, params):
        layouts = leaf_layouts(params, layout)
        return [_scale(layer, layouts[layer.path].stack) for layer in layers]

    return masked_latent(
        SSTEState,
        inner,
        n_largest(n, m),
        image=image,
        own=scales,
        structure=n_of_m(n, m, axis=axis, ragged=ragged),
        prunable=prunable,
        layout=layout,
    )


def _soft(layer: Layer) -> jax.Array:
    """The weights on their mask, less the largest magnitude that their group leaves out."""
    magnitude = jnp.abs(layer.weight)
    if isinstance(layer.structure, n_of_m):
        threshold = layer.structure.group_max(magnitude, ~layer.mask)
    else:
        threshold = jnp.max(magnitude, where=~layer.mask, initial=0)
    return jnp.where(layer.mask, jnp.sign(layer.weight) * (magnitude - threshold), 0)  # (19)


def _scale(layer: Layer, stack: Any) -> jax.Array:
    """The best scale of S(w) for w, in squared error; 1 where S(w) is 0. One for each layer of a stack."""
    weight, soft = layer.weight.astype(jnp.float32), _soft(layer).astype(jnp.float32)
    axes = tuple(axis for axis in range(weight.ndim) if axis not in stack)
    ours, own = (jnp.sum(x * soft, axes, keepdims=True) for x in (weight, soft))
    return jnp.where(own > 0, ours / jnp.where(own > 0, own, 1), 1)
