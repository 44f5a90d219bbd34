"""ADMM: dense weights that are pulled, more and more, towards a sparse copy of themselves.

Zhang et al., *A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers*, 2018
(https://arxiv.org/abs/1804.03294), in the form of Lee et al., *SAFE: Finding Sparse and Flat Minima to Improve
Pruning*, 2025 (https://arxiv.org/abs/2506.06866), whose code is followed (https://github.com/LOG-postech/safe-jax).
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import check_total
from jaxsparse.layouts import LayoutLike
from jaxsparse.masks import validate_masks
from jaxsparse.placement import of_shapes_too
from jaxsparse.structures import StructureLike, check_structure
from jaxsparse.transforms.checks import (
    check_range,
    check_schedule,
    check_steps,
    refuse_replicated,
    require_bool,
    require_params,
    whole_steps,
)
from jaxsparse.transforms.landing import on_update_steps
from jaxsparse.transforms.latent import as_optimizer, map_latents, not_finite
from jaxsparse.transforms.layers import layers_of
from jaxsparse.transforms.mask_link import dense_start
from jaxsparse.transforms.prune import counts_at, prune_globally, prune_layers
from jaxsparse.trees import by_path, is_masked_node

__all__ = ["ADMMState", "admm"]


class _Fields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    inner_state: Any
    masks: Any
    target: Any
    dual: Any


class ADMMState(_Fields):
    """State of :func:`admm`.

    Attributes:
      count: (), int32: the updates so far.
      inner_state: the state of the inner optimizer.
      masks: like the params: bool arrays, the largest of the weights at the last projection, all True before the first;
        ``optax.MaskedNode()`` for dense leaves.
      target: like ``masks``, in the dtypes of the params: z, the sparse copy.
      dual: like ``target``: u, the scaled dual variable.
    """

    method: ClassVar[str] = "admm"

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """False: the optimizer is inside the wrapper."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """Weights that are not finite. The params are dense, and need not be zero where the masks are False."""
        found = not_finite(self.dual, self.method)
        if params is None or found:
            return found
        leaves = by_path(params)
        return not_finite({path: leaves[path] for path in by_path(self.dual)}, self.method)


def admm(
    inner: optax.GradientTransformation,
    sparsity: ArrayLike,
    *,
    every: ArrayLike = 32,
    penalty: ArrayLike | optax.Schedule = 1e-3,
    scope: Literal["global", "layer"] = "global",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prune by pulling dense weights towards a sparse copy of themselves, with ADMM or SAFE (Zhang et al., 2018).

    A wrapper: around an optimizer. **The params stay dense**, and :func:`jaxsparse.eval_params` gives the sparse ones.

    The loss is minimised among the weights of the given sparsity by the alternating direction method of multipliers:
    the optimizer moves dense weights w, with a penalty on their distance from a sparse copy z, and u adds up what is
    left of that distance. With g the gradient, :math:`\lambda_t` the ``penalty`` and H the projection that keeps the
    largest magnitudes, the first line in each step, and the others in every 32nd (``every``):

    .. math::
       w &\leftarrow w + \mathrm{inner}(g + \lambda_t (w - z + u)) \\
       z &\leftarrow H(w + u) \\
       u &\leftarrow w + u - z

    from z = H(w) and u = 0. The masks are those of H(w), taken in the same steps as z. So ``eval_params`` is H(w)
    exactly after a number of steps that ``every`` divides; before the first projection it is w. Counts are exact.

    SAFE (Lee et al., 2025) takes the gradient at the point :math:`w + \rho g / \|g\|` and lets the penalty rise from 0.
    That is ``optax.contrib.sam`` around this wrapper, see the example.

    Args:
      inner: the optimizer of the dense weights, with its weight decay.
      sparsity: the fraction of zeros of H, in [0, 1].
      every: steps between two projections, int >= 1. (The authors of SAFE have 32.)
      penalty: :math:`\lambda`, at least 0, or a schedule of it, such as :func:`jaxsparse.rising_cosine`.
      scope: which weights are ranked together: "global", all, or those of each "layer", which then all have this
        sparsity.
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer.
      structure: what is kept or dropped as one, see :mod:`jaxsparse.structures`.
      prunable: which leaves get masks, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`ADMMState`: two copies of the sparse leaves, and a byte a weight.
      Its ``update`` needs the params.

    Raises:
      ValueError: for numbers out of range, unknown options, a structure that does not fit a leaf and says "error" to
        that, params with a replica axis, 2**31 weights or more, missing params.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> tx = jaxsparse.admm(optax.sgd(0.5), 0.5, every=2, penalty=0.4)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):  # the small ones shrink by 0.5 * 0.4 of their size
      ...     updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [[round(float(w), 4) for w in row] for row in params["kernel"]]
      [[0.64, -1.28], [3.0, -4.0]]
      >>> jaxsparse.eval_params(opt_state, params)["kernel"].tolist()
      [[0.0, 0.0], [3.0, -4.0]]

      SAFE, with a radius of 0.1:

      >>> rho, penalty = 0.1, jaxsparse.rising_cosine(1e-3, steps=10_000)
      >>> tx = optax.contrib.sam(
      ...     jaxsparse.admm(optax.sgd(0.1, momentum=0.9), 0.5, penalty=penalty),
      ...     optax.chain(optax.contrib.normalize(), optax.sgd(rho)),
      ...     opaque_mode=True,
      ... )
      >>> opt_state, grad = tx.init(params), jax.grad(lambda params: jnp.sum(params["kernel"] ** 4))
      >>> updates, opt_state = tx.update(grad(params), opt_state, params, grad_fn=lambda params, _: grad(params))

    References:
      Zhang et al., `A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers
      <https://arxiv.org/abs/1804.03294>`_, 2018; Lee et al., `SAFE: Finding Sparse and Flat Minima to Improve Pruning
      <https://arxiv.org/abs/2506.06866>`_, 2025; code: https://github.com/LOG-postech/safe-jax.

    .. warning::
      Do not train on from what ``eval_params`` or ``sparsify`` return: they are copies to evaluate. (Before the first
      step ``sparsify`` changes nothing.)
    """
    who = ADMMState.method
    inner = as_optimizer(inner, "inner", who)
    check_range("sparsity", sparsity, 0, 1, required=True)
    every = whole_steps("every", every, 1)
    check_steps("at_least", at_least, 0)
    check_schedule("penalty", penalty, 0, None, steps=[0])
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", got {scope!r}')
    check_structure(structure)

    def largest(weights, masks):
        """The masks of H, for a tree with all leaves."""
        everything = jax.tree.map(jnp.ones_like, masks)
        layers = layers_of(weights, None, everything, structure=structure, layout=layout)
        of_layers, of_all = counts_at(layers, sparsity)
        if scope == "global":
            new, _ = prune_globally(layers, of_all, at_least=at_least)
        else:
            sizes = [math.prod(layer.structure.unit_shape(layer.mask.shape)) for layer in layers]
            fewest = jnp.minimum(jnp.asarray(at_least, jnp.int32), jnp.asarray(sizes, jnp.int32))
            new, _ = prune_layers(layers, jnp.maximum(of_layers, fewest))
        return jax.tree.structure(masks).unflatten(new)

    def init_fn(params):
        refuse_replicated(params, who)
        masks = validate_masks(dense_start(structure, prunable, layout)(params, None), params)
        check_total(mask.size for mask in jax.tree.leaves(masks))
        weights = _with_masks(params, masks)
        return ADMMState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
            masks=masks,
            target=_where(largest(params, masks), weights),
            dual=jax.tree.map(jnp.zeros_like, weights),
        )

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params, who)
        require_bool(state.masks, who)
        strength = penalty(state.count) if callable(penalty) else penalty

        def pulled(g, p, z, u):
            return g + (jnp.asarray(strength, p.dtype) * (p - z + u)).astype(g.dtype)

        grads = map_latents(pulled, updates, params, state.target, state.dual)
        if "grad" in extra_args:  # what a chain inside takes for its gradient
            extra_args["grad"] = grads
        proposed, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(params)
        moves = [None if u is None else jnp.asarray(u, jnp.result_type(p))
                 for p, u in zip(leaves, treedef.flatten_up_to(proposed), strict=True)]  # fmt: skip
        # No loop can be differentiated backwards: for gradients of the update itself, z and u are constants.
        now, old = jax.lax.stop_gradient(((leaves, moves), (state.masks, state.target, state.dual)))

        def projected(old):
            masks, _, dual = old
            weights = treedef.unflatten([p if u is None else p + u for p, u in zip(*now, strict=True)])
            both = map_latents(jnp.add, weights, dual)
            target = _where(largest(both, masks), _with_masks(both, masks))
            dual = jax.tree.map(jnp.subtract, _with_masks(both, masks), target)
            return largest(weights, masks), target, dual

        masks, target, dual = on_update_steps(state.count % every == every - 1, projected, old)
        count = optax.safe_increment(state.count)
        return treedef.unflatten(moves), ADMMState(count, inner_state, masks, target, dual)

    return optax.GradientTransformationExtraArgs(of_shapes_too(init_fn), update_fn)


def _with_masks(tree: Any, masks: Any) -> Any:
    """The leaves that have masks; ``optax.MaskedNode()`` for the others."""
    return jax.tree.map(lambda mask, x: mask if is_masked_node(mask) else x, masks, tree, is_leaf=is_masked_node)


def _where(masks: Any, weights: Any) -> Any:
    return jax.tree.map(lambda mask, w: jnp.where(mask, w, jnp.zeros_like(w)), masks, weights)
