"""Fixed masks: train a network whose zeros stay where they are."""

from typing import Any, NamedTuple

import optax

from jaxsparse.links import check_zeros, land_on_masks, refuse_replicated, require_bool, require_params
from jaxsparse.masks import copied_masks, validate_masks

__all__ = ["MaskUpdatesState", "mask_updates"]


class MaskUpdatesState(NamedTuple):
    """State of :func:`mask_updates`.

    Attributes:
      masks: like the params: bool arrays, ``optax.MaskedNode()`` for dense leaves.
    """

    masks: Any

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """Fixed masks need no momentum."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """Pruned weights that are not zero."""
        return [] if params is None else check_zeros(self.masks, params, "mask_updates")


def mask_updates(masks: Any) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the params on fixed masks. A link: last in the chain.

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

    def init_fn(params):
        refuse_replicated(params, "mask_updates")
        return MaskUpdatesState(copied_masks(validate_masks(masks, params), params))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "mask_updates")
        require_bool(state.masks, "mask_updates")
        return land_on_masks(updates, params, state.masks), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
