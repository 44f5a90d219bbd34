"""Specialisation of a network's channels: the share of their activity that is due to a single class."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.trees import by_path, natural_order

__all__ = ["class_activity", "class_specialization"]


def class_activity(features: Any, labels: jax.Array, num_classes: int) -> dict[str, jax.Array]:
    """Measure how active each channel is on the examples of each class.

    For channel c and class k this is the sum of ``|activation|`` over all examples of the class and all positions. Add
    the results of several batches with ``jax.tree.map(jnp.add, activity, of_next_batch)``. Can be jitted.

    Args:
      features: a pytree of activations, each (examples, ..., channels), of layers behind their ReLU.
      labels: (examples,), integers below ``num_classes``.
      num_classes: the number of classes.

    Returns:
      path of the layer -> (channels, num_classes), float32.

    Raises:
      ValueError: if activations and labels differ in their number of examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> activations = {"conv": jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 2.0]])}
      >>> class_activity(activations, jnp.array([0, 1, 1]), num_classes=2)["conv"].tolist()
      [[1.0, 3.0], [0.0, 4.0]]

      For a Flax model, ``model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])``
      returns the outputs of its layers. They do not include a ReLU that is a plain function: apply it with
      ``jax.tree.map(jax.nn.relu, ...)``.
    """
    of_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    found = {}
    for path, leaf in sorted(by_path(features).items(), key=lambda item: natural_order(item[0])):
        if leaf.ndim < 2 or leaf.shape[0] != of_class.shape[0]:
            raise ValueError(
                f"activations of {path}: expected (examples, ..., channels) with {of_class.shape[0]} examples, as many "
                f"as there are labels, got shape {leaf.shape}"
            )
        real = jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf
        sizes = jnp.abs(real.astype(jnp.float32)).sum(axis=tuple(range(1, leaf.ndim - 1)))
        found[path] = jnp.matmul(sizes.T, of_class, precision=jax.lax.Precision.HIGHEST)
    return found


def class_specialization(activity: Mapping[str, Any], *, drop: float = 0.05) -> dict[str, np.ndarray]:
    """Measure how specialised channels are: the share of a channel's activity that is due to its top class.

    A channel that responds equally to all classes has 1 / classes, and one that responds to a single class has 1. The
    paper finds that channels of sparse networks are less specialised than those of dense ones.

    Args:
      activity: the result of :func:`class_activity`.
      drop: leave out the least active channels that together have less than this share of a layer's activity, in
        [0, 1).

    Returns:
      path of the layer -> (channels that were not left out,), float64, in channel order.

    Raises:
      ValueError: if an activity is not (channels, classes), or negative or not finite.

    Examples:
      >>> class_specialization({"conv": [[1.0, 3.0], [2.0, 2.0], [0.0, 0.1]]})["conv"].tolist()
      [0.75, 0.5]

    References:
      Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, 2019, `arXiv:1907.04840
      <https://arxiv.org/abs/1907.04840>`_, section 5.2 and Figure 3; channels are left out as in the authors' code
      (``sparselearning/utils.py``, ``plot_class_feature_histograms``).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: expected a share in [0, 1), got {drop}")
    found = {}
    for path, of_layer in activity.items():
        sums = np.asarray(of_layer, np.float64)
        if sums.ndim != 2 or not np.isfinite(sums).all() or (sums < 0).any():
            raise ValueError(
                f"activity of {path}: expected sums (channels, classes), finite and not negative, got {of_layer!r}"
            )
        of_channel = sums.sum(1)
        order = np.argsort(of_channel, kind="stable")
        shares = np.cumsum(of_channel[order]) / (of_channel.sum() or 1.0)
        kept = np.sort(order[np.searchsorted(shares, drop) :])
        kept = kept[of_channel[kept] > 0]
        found[path] = sums[kept].max(1, initial=0.0) / of_channel[kept]
    return found
