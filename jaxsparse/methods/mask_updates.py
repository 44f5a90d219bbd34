"""Fixed masks: train a network whose zeros stay where they are."""

from typing import Any

import optax

from jaxsparse.transforms.mask_link import MaskState, given_masks, mask_link

__all__ = ["MaskUpdatesState", "mask_updates"]


class MaskUpdatesState(MaskState):
    """State of :func:`mask_updates`."""

    method = "mask_updates"


def mask_updates(masks: Any) -> optax.GradientTransformationExtraArgs:
    r"""Keep given masks fixed while training or fine-tuning.

    A link: last in the chain.

    .. math:: \Delta_i = u_i \text{ if } m_i \text{ else } -w_i

    where u is the proposed update: from the first update on, what is masked out is exactly 0.

    Args:
      masks: a pytree like the params: bool arrays of the leaf's shape, the scalar True for leaves without a mask.

    Returns:
      A gradient transformation. Its ``update`` needs the params.

    Raises:
      ValueError: by ``init``, if a mask has another tree, shape or dtype than its leaf
        (which is named); by ``update``, without params.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = optax.chain(optax.sgd(1.0), mask_updates({"w": jnp.array([True, False])}))
      >>> updates, _ = tx.update({"w": jnp.array([0.5, 0.5])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [0.5, 0.0]
    """
    return mask_link(MaskUpdatesState, given_masks(masks))
