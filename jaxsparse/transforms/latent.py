"""Wrappers with latent weights: the loss sees f(w), the optimizer moves w.

Straight-through estimators, soft thresholds, reparameterisations and gates differ in f, and in how the gradient at f(w)
becomes that of w. What they share is :func:`latent`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse.placement import copied, of_shapes_too
from jaxsparse.transforms.checks import check_zeros, refuse_replicated, require_bool, require_params
from jaxsparse.trees import by_path, is_masked_node

__all__ = ["LatentState", "identity_pull", "latent", "map_latents"]


class _Fields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    weights: Any
    inner_state: Any
    masks: Any = ()
    own: Any = ()


class LatentState(_Fields):
    """State of a wrapper with latent weights and masks; a subclass names the method.

    Attributes:
      count: (), int32: the updates so far.
      weights: the latent weights, like the params; ``optax.MaskedNode()`` for leaves that have none.
      inner_state: the state of the inner optimizer.
      masks: like ``weights``: bool arrays, False where f(w) is zero.
      own: anything else the method keeps; () for nothing.
    """

    method: ClassVar[str] = "latent"

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """False: the optimizer is inside the wrapper."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """Latent weights that are not finite, pruned weights of the params that are not zero."""
        found = not_finite(self.weights, self.method)
        return found + ([] if params is None else check_zeros(self.masks, params, self.method))


def identity_pull(grads: Any, weights: Any, state: Any) -> tuple[Any, Any]:
    """The gradient at f(w), taken for that of w: the default ``pull`` of :func:`latent`."""
    del weights
    return grads, state


def latent(
    state: type[Any],
    inner: optax.GradientTransformation,
    latents: Callable[[Any], Any],
    forward: Callable[[Any], tuple[Any, Any]],
    *,
    start: Callable[[Any, Any], Any] | None = None,
    pull: Callable[[Any, Any, Any], tuple[Any, Any]] = identity_pull,
    push: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimise latent weights w while the loss sees f(w). A wrapper: around an optimizer.

    The params that training holds are :math:`p = f(w)`. With G their gradient, J the ``pull`` and u the update that the
    inner optimizer makes,

    .. math::
       w &\leftarrow w + u(J G) \\
       \Delta p &= f(w) - p

    so a weight that f sets to zero is exactly 0, whatever it was. Leaves without latent weights take the update
    of the inner optimizer. Weight decay and schedules belong to the inner optimizer and act on w.

    Args:
      state: a subclass of :class:`LatentState` with the name of the ``method``; or another NamedTuple class with a
        ``method``, the fields ``count``, ``weights`` and ``inner_state``, and defaults for all others.
      inner: the optimizer of the latent weights and of the leaves that have none.
      latents: params -> the first latent weights, in the dtypes and shapes of the params, ``optax.MaskedNode()`` for
        leaves that have none. They are copied, for state and params may both be donated.
      forward: state -> (f(w), state). The ``weights`` in the state are those that have just moved and ``count`` is the
        step that sees f(w), a tree like ``weights``. The method puts its masks, and what else has changed, into the
        state.
      start: (state, params) -> the first state, given one with ``count``, ``weights`` and ``inner_state``. Each field
        needs buffers of its own. None: that of ``forward``.
      pull: (gradients, weights, state) -> (gradients of the latent weights, state). Both trees have all leaves of the
        params, and ``state`` is the one that made them. :func:`map_latents` maps over the leaves with latent weights.
      push: (updates of the inner optimizer, state) -> those by which w moves. None: the same.

    Returns:
      A gradient transformation. Its ``update`` needs the params.

    Raises:
      ValueError: for an inner optimizer that is none, and, by ``init``, for params with a replica axis.

    Examples:
      SR-STE (Zhou et al., 2021): straight-through magnitude pruning, with a decay of the pruned weights.

      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> class HalvedState(LatentState):
      ...     method = "halved"
      >>> def halved(inner, decay):
      ...     def forward(state):
      ...         masks = jax.tree.map(lambda w: jaxsparse.top_k_mask(w, w.size // 2, absolute=True), state.weights)
      ...         return jaxsparse.apply_masks(state.weights, masks), state._replace(masks=masks)
      ...
      ...     def pull(grads, weights, state):
      ...         return map_latents(lambda g, w, m: g + decay * jnp.where(m, 0, w), grads, weights, state.masks), state
      ...
      ...     return latent(HalvedState, inner, lambda params: params, forward, pull=pull)
      >>> params = {"w": jnp.array([1.0, -2.0, 3.0, -4.0])}
      >>> tx = halved(optax.sgd(0.5), decay=1.0)
      >>> opt_state = tx.init(params)
      >>> params = jaxsparse.sparsify(opt_state, params)
      >>> updates, opt_state = tx.update({"w": jnp.array([0.0, 4.0, 4.0, 0.0])}, opt_state, params)
      >>> opt_state.weights["w"].tolist(), optax.apply_updates(params, updates)["w"].tolist()
      ([0.5, -3.0, 1.0, -4.0], [0.0, -3.0, 0.0, -4.0])

    .. warning::
      Nothing may move the params after the wrapper.
    """
    who = state.method
    inner = as_optimizer(inner, "inner", who)

    def init_fn(params):
        refuse_replicated(params, who)
        weights = latents(params)
        first = state(
            count=jnp.zeros([], jnp.int32),
            weights=jax.tree.map(copied, weights),
            inner_state=inner.init(filled(weights, params)),
        )
        return forward(first)[1] if start is None else start(first, params)

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params, who)
        require_bool(getattr(state, "masks", ()), who)
        behind = filled(state.weights, params)
        grads, state = pull(updates, behind, state)
        if "grad" in extra_args:  # what a chain inside takes for its gradient
            extra_args["grad"] = grads
        proposed, inner_state = inner.update(grads, state.inner_state, behind, **extra_args)
        if push is not None:
            proposed = push(proposed, state)

        leaves, treedef = jax.tree.flatten(params)
        moves, weights = treedef.flatten_up_to(proposed), treedef.flatten_up_to(state.weights)
        weights = [
            w if u is None or is_masked_node(w) else (w + u).astype(w.dtype)
            for w, u in zip(weights, moves, strict=True)
        ]
        state = state._replace(
            count=optax.safe_increment(state.count), weights=treedef.unflatten(weights), inner_state=inner_state
        )
        image, state = forward(state)

        def land(p, u, z):
            dtype = jnp.result_type(p)
            if is_masked_node(z):
                return None if u is None else jnp.asarray(u, dtype)
            return z.astype(dtype) - p  # where z is 0, p + (-p) is exactly 0

        rows = zip(leaves, moves, treedef.flatten_up_to(image), strict=True)
        return treedef.unflatten([land(*row) for row in rows]), state

    return optax.GradientTransformationExtraArgs(of_shapes_too(init_fn), update_fn)


def map_latents(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map over the leaves that have latent weights, leaving the others as they are.

    Args:
      function: from a leaf of each tree to the new leaf.
      tree: a tree like the params; leaves that are None, as gradients may be, stay so.
      *rest: trees like it, such as the masks of a state, with ``optax.MaskedNode()`` for leaves without latent weights.

    Returns:
      A tree like ``tree``.

    Examples:
      >>> map_latents(lambda g, w: g + w, {"bias": 1, "kernel": 2}, {"bias": optax.MaskedNode(), "kernel": 10})
      {'bias': 1, 'kernel': 12}
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    rows = zip(leaves, *map(treedef.flatten_up_to, rest), strict=True)
    return treedef.unflatten(
        [row[0] if row[0] is None or any(map(is_masked_node, row)) else function(*row) for row in rows]
    )


def as_optimizer(optimizer: Any, name: str, who: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer, such that it takes extra args; a ValueError if it is none."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"{who}: {name} must be an optimizer, such as optax.adam(1e-3), got {optimizer!r}")
    return optax.with_extra_args_support(optimizer)


def not_finite(weights: Any, who: str) -> list[str]:
    """A sentence for each leaf of the latent weights that is not finite."""
    return [
        f"{who}: the weights of {path} are not finite. The training has diverged"
        for path, w in by_path(weights).items()
        if not bool(jnp.isfinite(w).all())
    ]


def filled(weights: Any, params: Any) -> Any:
    """The latent weights, and the params where there are none."""
    return map_latents(lambda p, w: w, params, weights)
