"""The action of a link: the update that lands on its masks, and work on some steps only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.placement import steady
from jaxsparse.trees import is_masked_node

__all__ = ["land_on_masks", "on_update_steps"]


def land_on_masks(updates: Any, params: Any, masks: Any, *, resting: jax.Array | None = None) -> Any:
    """Turns an update into one that leaves every pruned weight at exactly 0: ``-p``, since ``p + (-p)`` is 0.

    Args:
      updates: the proposed update, like ``params``; None for leaves without one, which stays so where they are dense.
      params: the params.
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves.
      resting: (), bool: whether kept weights that are 0 stay there, as those do that have just been regrown; None: no.

    Returns:
      The update, in the dtypes of the params.
    """

    def land(p, u, mask):
        if u is None and is_masked_node(mask):
            return None
        u = jnp.zeros_like(p) if u is None else jnp.asarray(u, jnp.result_type(p))
        if is_masked_node(mask):
            return u
        # Compared as a number: on a CPU, XLA's select on a stored bool is not vectorised and takes a third longer.
        if resting is None:
            return jax.lax.select(mask.astype(jnp.uint8) != 0, u, -p)
        moves = mask.astype(p.dtype) * (jnp.abs(p) + jnp.where(resting, 0, 1).astype(p.dtype)) > 0
        return jax.lax.select(moves, u, -p)

    leaves, treedef = jax.tree.flatten(params)
    proposed, masks = treedef.flatten_up_to(updates), treedef.flatten_up_to(masks)
    return treedef.unflatten([land(*each) for each in zip(leaves, proposed, masks, strict=True)])


def on_update_steps(due: jax.Array, compute: Callable[[Any], Any], old: Any) -> Any:
    """``compute(old)`` on the steps on which it is due, ``old`` unchanged on the others, at no cost there.

    A loop that runs once or not at all, rather than a ``lax.cond``: XLA updates the carry of a loop in place, while
    a conditional copies what it passes on, twice, on every step. And under ``vmap`` a cond becomes a select that
    computes on every step; a loop runs only when some lane is due, and leaves the other lanes as they were.

    What ``compute`` reads should be ``old``, the params and the optimizer state just stored: anything that must first
    be made from these is best made inside.

    Args:
      due: bool scalar.
      compute: makes the new values from the old.
      old: the old values, a pytree. If ``compute`` took them from elsewhere, they would have to be copied.

    Returns:
      A pytree like ``old``.

    Examples:
      >>> import jax.numpy as jnp
      >>> on_update_steps(jnp.array(True), lambda x: x + 1, jnp.arange(3)).tolist()
      [1, 2, 3]
    """
    if not isinstance(due, jax.core.Tracer):  # outside of jit a loop would be compiled anew at every call
        return compute(old) if due else old
    compute, old = steady(compute, old)
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), compute(carry[1])), (due, old)
    )[1]
