"""Scores of the loss and its derivatives, made to prune a network before it is trained: SNIP and GraSP."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.layouts import LayoutLike
from jaxsparse.prunable import prunable_leaves
from jaxsparse.saliency.floats import Floats, require_scalar, wide

__all__ = ["fisher_diagonal", "grasp", "snip"]


def snip(loss: Callable[[Any], jax.Array], params: Any) -> Any:
    r"""The connection sensitivity, of SNIP: how fast the loss changes as a weight is taken away.

    .. math:: s_j = \left| \frac{\partial L(m \odot \theta)}{\partial m_j} \right|_{m=1}
                  = \left| \theta_j \, \frac{\partial L}{\partial \theta_j} \right|

    The authors rank all weights of the network together (``score_masks(..., scope="global")``), by one mini-batch: 100
    images of MNIST, 128 of CIFAR-10, with batch normalisation as in inference. They divide by the sum, which changes no
    ranking and is left out here.

    Args:
      loss: params -> a scalar, of one batch or of several: ``lambda params: sum(loss_of(params, b) for b in batches)``.
      params: the weights, a pytree of arrays.

    Returns:
      A tree like ``params``: floats >= 0, float64 for float64 weights, else float32; 0 for leaves that are no floats.

    Raises:
      ValueError: if the loss is not a scalar, or no leaf has floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> snip(lambda params: jnp.sum(params["w"] ** 2), {"w": jnp.array([1.0, -2.0])})["w"].tolist()
      [2.0, 8.0]

    References:
      Lee, Ajanthan and Torr, `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019, eqs. (4) and (5); https://github.com/namhoonlee/snip-public at f028496
      draws the weights anew after the masks are made, and so trains others than those that were scored.
    """
    floats = Floats.of(params)
    require_scalar(loss, params)
    gradients = jax.grad(lambda leaves: loss(floats.whole(leaves)))(floats.leaves)
    return floats.scores([jnp.abs(wide(w) * wide(g)) for w, g in zip(floats.leaves, gradients, strict=True)])


def grasp(loss: Callable[[Any], jax.Array], params: Any, *, prunable: Any = None, layout: LayoutLike = None) -> Any:
    r"""The gradient signal that a weight preserves, of GraSP: by how much the gradient's norm falls without it.

    .. math:: s_j = \theta_j \, (H g)_j, \qquad g = \frac{\partial L}{\partial \theta}, \quad
              H = \frac{\partial^2 L}{\partial \theta^2}

    Signed: the largest are kept, in the whole network together. (The paper's score is :math:`-\theta \odot H g`, of
    which the largest go.) It takes one gradient and one product with the Hessian, as long as three gradients or so. The
    authors divide by the absolute value of the sum, which changes no ranking and is left out here.

    Their loss is the cross-entropy of logits divided by a temperature of 200, summed over two halves of a batch with
    equally many images of every class (10 of each on CIFAR-10), with batch normalisation as in training. All of that is
    up to ``loss``: the mean over the whole batch, or the sum of two losses where batch statistics differ.

    Args:
      loss: params -> a scalar, of one batch or of several: ``lambda params: sum(loss_of(params, b) for b in batches)``.
      params: the weights, a pytree of arrays.
      prunable: the leaves that may be pruned, see :func:`jaxsparse.prunable.prunable_leaves`. In g the others are 0, as
        in the authors' code: biases take no part in the norm that is preserved.
      layout: what leaves are, where the rules of :func:`jaxsparse.layouts.leaf_layouts` do not find it.

    Returns:
      A tree like ``params``: floats, float64 for float64 weights, else float32; 0 for leaves that are no floats.

    Raises:
      ValueError: if the loss is not a scalar, no leaf has floats, or ``prunable`` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)  # g = 2 w, H = 2
      >>> grasp(loss, {"w": jnp.array([[1.0, -2.0]])})["w"].tolist()
      [[4.0, 16.0]]

    References:
      Wang, Zhang and Grosse, `Picking Winning Tickets Before Training by Preserving Gradient Flow
      <https://arxiv.org/abs/2002.07376>`_, 2020, Alg. 1 and 2; https://github.com/alecwangcq/GraSP at f17d87a, which
      scores dense layers with weights drawn for that alone.
    """
    floats = Floats.of(params)
    require_scalar(loss, params)
    chosen = jax.tree.leaves(prunable_leaves(params, prunable, layout=layout))
    gradient = jax.grad(lambda leaves: loss(floats.whole(leaves)))
    whole = gradient(floats.leaves)
    direction = [g if chosen[i] else jnp.zeros_like(g) for i, g in zip(floats.numbers, whole, strict=True)]
    _, product = jax.jvp(gradient, (floats.leaves,), (direction,))
    return floats.scores([wide(w) * wide(hg) for w, hg in zip(floats.leaves, product, strict=True)])


def fisher_diagonal(loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> Any:
    r"""The diagonal of the empirical Fisher information: the mean over examples of each one's squared gradient.

    .. math:: F_j = \frac{1}{B} \sum_{b=1}^B \left( \frac{\partial L_b}{\partial \theta_j} \right)^2

    Its root stands for the gradient in :func:`squared_gradient`, whose scores are then :math:`F_j \theta_j^2 / 2`.

    Args:
      loss: (params, example) -> a scalar, of an example without a batch axis: a model that wants one gets
        ``example[None]``.
      params: the weights, a pytree of arrays.
      batch: the examples, a pytree of arrays whose first axis counts them, B. All B gradients are in memory at once, B
        times the size of the params; for less, average the results of parts of the batch.

    Returns:
      A tree like ``params``: floats >= 0, float64 for float64 weights, else float32; 0 for leaves that are no floats.

    Raises:
      ValueError: if the loss is not a scalar, no leaf has floats, or the arrays of ``batch`` have no examples or
        different numbers of them.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse.saliency import squared_gradient
      >>> params, inputs = {"w": jnp.array([1.0, -2.0])}, jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> fisher = fisher_diagonal(lambda params, x: jnp.sum(params["w"] * x), params, inputs)
      >>> fisher["w"].tolist()  # (1 + 9) / 2 and (0 + 4) / 2
      [5.0, 2.0]
      >>> squared_gradient(params, jax.tree.map(jnp.sqrt, fisher))["w"].round(3).tolist()
      [2.5, 4.0]

    References:
      Theis, Korshunova, Tejani and Huszar, `Faster gaze prediction with dense networks and Fisher pruning
      <https://arxiv.org/abs/1801.05787>`_, 2018, eq. (6).
    """
    floats = Floats.of(params)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or not (next(iter(lengths)) or (0,))[0]:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
        raise ValueError(f"the arrays of batch have the examples along their first axis, got the shapes {shapes}")
    require_scalar(loss, params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], batch))
    gradient = jax.grad(lambda leaves, example: loss(floats.whole(leaves), example))
    gradients = jax.vmap(gradient, in_axes=(None, 0))(floats.leaves, batch)
    return floats.scores([jnp.mean(jnp.square(wide(g)), axis=0) for g in gradients])
