"""Scores of the weights, or of the weights and their gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.masks import as_key
from jaxsparse.placement import gathered, placed_like
from jaxsparse.saliency.floats import wide
from jaxsparse.selection import random_scores

__all__ = ["gradient_times_weight", "lamp", "lamp_scores", "magnitude", "movement", "random", "squared_gradient"]


def magnitude(params: Any, grads: Any = None) -> Any:
    r"""The magnitude of every weight, :math:`|w|`.

    Args:
      params: the weights, a pytree of arrays.
      grads: not used.

    Examples:
      >>> import jax.numpy as jnp
      >>> magnitude({"w": jnp.array([1.0, -2.0])})["w"].tolist()
      [1.0, 2.0]
    """
    del grads
    return jax.tree.map(jnp.abs, params)


def random(params: Any, key: ArrayLike) -> Any:
    """Random scores, of which the largest are a uniformly random choice.

    Args:
      params: a pytree of arrays, for their shapes.
      key: an int or PRNG key.

    Returns:
      float32 scores; only their order means anything, see :func:`jaxsparse.selection.random_scores`.

    Examples:
      >>> import jax.numpy as jnp
      >>> random({"w": jnp.ones((2, 3))}, 0)["w"].shape
      (2, 3)
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = [jax.random.fold_in(as_key(key), i) for i in range(len(leaves))]
    return treedef.unflatten([random_scores(k, jnp.shape(leaf)) for k, leaf in zip(keys, leaves, strict=True)])


def gradient_times_weight(params: Any, grads: Any) -> Any:
    r"""The change of the loss to first order if a weight were removed, :math:`|g w|`.

    On the gradients of one or a few batches at initialisation these are the scores of SNIP, see :func:`snip`.

    Args:
      params, grads: pytrees of arrays of the same shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> gradient_times_weight({"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 1.0])})["w"].tolist()
      [3.0, 2.0]
    """
    return jax.tree.map(lambda w, g: jnp.abs(wide(w) * wide(g)), params, grads)


def squared_gradient(params: Any, grads: Any) -> Any:
    r"""The change of the loss to second order if a weight were removed, :math:`g^2 w^2 / 2`.

    The square of the gradient stands for the diagonal of the Hessian, as in Optimal Brain Damage with the empirical
    Fisher information (LeCun et al., 1989; Theis et al., 2018, https://arxiv.org/abs/1801.05787, eq. 6). For the mean
    of squares over examples hand in the root of :func:`fisher_diagonal`.

    Args:
      params, grads: pytrees of arrays of the same shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> squared_gradient({"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 1.0])})["w"].tolist()
      [4.5, 2.0]
    """
    return jax.tree.map(lambda w, g: jnp.square(wide(w) * wide(g)) / 2, params, grads)


def movement(params: Any, grads: Any) -> Any:
    r"""The movement of a weight away from zero, :math:`-g w`: signed, the largest grow under gradient descent.

    Movement pruning (Sanh et al., 2020, https://arxiv.org/abs/2005.07683, eq. 6) sums these over the steps of
    fine-tuning.

    Args:
      params, grads: pytrees of arrays of the same shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> movement({"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 1.0])})["w"].tolist()
      [-3.0, 2.0]
    """
    return jax.tree.map(lambda w, g: -wide(g) * wide(w), params, grads)


def lamp(params: Any, grads: Any = None) -> Any:
    """The scores of layer-adaptive magnitude pruning, see :func:`lamp_scores`: for ``scope="global"``.

    Args:
      params: the weights, a pytree of arrays.
      grads: not used.

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(float(score), 3) for score in lamp({"w": jnp.array([1.0, -2.0, 3.0])})["w"]]
      [0.071, 0.308, 1.0]
    """
    del grads
    return jax.tree.map(lamp_scores, params)


def lamp_scores(weights: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
    r"""The scores of layer-adaptive magnitude pruning (LAMP), which rank the weights of all layers together.

    .. math:: \frac{w_i^2}{\sum_{j:\, w_j^2 \ge w_i^2} w_j^2}

    over the weights of one layer. The largest of every layer has the score 1, so no layer is lost. Of equal
    weights, each one's sum has those of lower index and itself: they rank one after another, the lowest index highest.
    (A leaf counts as one layer, also if it is a stack of several.)

    Args:
      weights: floats of any shape.
      mask: bool of that shape: which weights there still are; None: all.

    Returns:
      float32 of that shape; 0 for weights that there are no more.

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(float(score), 3) for score in lamp_scores(jnp.array([1.0, -2.0, 3.0]))]
      [0.071, 0.308, 1.0]

    References:
      Lee et al., *Layer-adaptive Sparsity for the Magnitude-based Pruning*, 2021, eq. (2).
    """
    weights = jnp.asarray(weights)
    squares = jnp.square(weights.astype(jnp.float32))
    squares = gathered(squares if mask is None else jnp.where(mask, squares, 0)).reshape(-1)
    order = jnp.argsort(squares, descending=True)
    larger = jnp.cumsum(squares[order])
    scores = jnp.zeros_like(squares).at[order].set(squares[order] / jnp.where(larger > 0, larger, 1))
    return placed_like(scores.reshape(weights.shape), weights)
