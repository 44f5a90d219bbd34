"""Top-KAST: a forward set of weights that the loss sees, and a larger backward set that learns.

Jayakumar et al., *Top-KAST: Top-K Always Sparse Training*, 2020 (https://arxiv.org/abs/2106.03517). There is no code of
the authors; sparseml (``modifier_pruning_topkast.py`` at 1c04a01) and torch_topkast (at bf38ad2) are by others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation
from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike
from jaxsparse.transforms.checks import check_budget, check_range, check_schedule, counted
from jaxsparse.transforms.largest import Largest
from jaxsparse.transforms.latent import map_latents
from jaxsparse.transforms.masked_latent import MaskedLatentState, masked_latent

__all__ = ["BackwardSet", "TopKASTState", "top_kast"]


class BackwardSet(NamedTuple):
    """The weights that learn.

    Attributes:
      masks: like the latent weights: bool arrays, a superset of the masks of the state.
      kept: (), int32: how many weights they keep.
    """

    masks: Any
    kept: jax.Array


class TopKASTState(MaskedLatentState):
    """State of :func:`top_kast`; its masks are the forward set, its ``own`` is the :class:`BackwardSet`."""

    method: ClassVar[str] = "top_kast"
    limits: ClassVar[str] = "a schedule of a sparsity left [0, 1], or backward_sparsity was above sparsity"

    def recounted(self, before: Self | None) -> Self:
        """The state with both sets counted anew."""
        own = self.own._replace(kept=counted(self.own.masks, self.own.kept))
        return super().recounted(before)._replace(own=own)

    def problems(self, params: Any | None) -> list[str]:
        """Broken invariants of the masks, and a backward set that is off its count or lacks some of the forward set."""
        found = super().problems(params) + check_budget(self.own.masks, self.own.kept, f"{self.method}, backward set")
        pairs = zip(*map(jax.tree.leaves, (self.masks, self.own.masks)), strict=True)
        if outside := sum(int(jnp.sum(forward & ~backward)) for forward, backward in pairs):
            found.append(f"{self.method}: {outside} weights of the forward set are not in the backward set")
        return found


def top_kast(
    inner: optax.GradientTransformation,
    sparsity: float | jax.Array | optax.Schedule,
    backward_sparsity: float | jax.Array | optax.Schedule,
    *,
    decay: ArrayLike | optax.Schedule = 1e-4,
    penalty: Literal["l2", "l1"] = "l2",
    scope: Literal["layer", "global"] = "layer",
    allocation: Allocation = "uniform",
    every: ArrayLike = 1,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train with the largest weights in the forward pass, and a few more in the gradient (Jayakumar et al., 2020).

    A wrapper: around an optimizer.

    Of the latent weights w of a layer, the forward set A has the largest, a fraction D = 1 - ``sparsity``; the backward
    set B, which contains A, has the largest 1 - ``backward_sparsity``. The loss sees A; B learns, also the weights that
    the loss saw as 0; the rest does not move. An exploration penalty R draws the weights of B to 0, those outside of A
    harder, so that only weights that are worth it stay in A. With u the update of the inner optimizer,

    .. math::
       \tilde w_i &= w_i \text{ for } i \in A \text{, else } 0 \\
       R(w) &= \tfrac12 \sum_{i \in A} w_i^2 + \tfrac{1}{2 D} \sum_{i \in B \setminus A} w_i^2 \\
       g_i &= \frac{\partial L}{\partial \tilde w_i} + \lambda \frac{\partial R}{\partial w_i}
         \text{ for } i \in B \text{, else } 0 \\
       w_i &\leftarrow w_i + u(g)_i \text{ for } i \in B

    :math:`\tilde w` are the params that training holds, w is in the state.

    **Momentum.** The paper trains by SGD without momentum. The momentum or the weight decay of ``inner`` would go on
    moving weights that have left B: their updates are left out here, so nothing outside of B moves, whatever the
    optimizer is. What it has stored of such a weight fades there, and counts again when the weight is back in B.

    Args:
      inner: the optimizer of the weights, with its schedules.
      sparsity: the fraction of zeros of the forward set, in [0, 1); or a schedule, step -> fraction, which is clipped
        to [0, 1]: :func:`jaxsparse.check` says so.
      backward_sparsity: the same of the backward set, at most ``sparsity``. The paper has, for example, 0.8 with 0 or
        0.5.
      decay: :math:`\lambda` >= 0, in the gradient, so that the learning rate scales it; or a schedule.
      penalty: "l2", as above, or "l1", with :math:`|w_i|` in place of :math:`w_i^2 / 2`.
      scope: which weights are ranked together: those of each "layer", as in the paper, or "global", all.
      allocation: how layers share the sparsity, for the scope "layer": "uniform", "erdos_renyi" or
        "erdos_renyi_kernel" (:func:`jaxsparse.erdos_renyi`). D is that of the whole network.
      every: both sets are chosen on the multiples of so many steps, int >= 1; on other steps this costs nothing.
      structure: what is kept or dropped as one, see :mod:`jaxsparse.structures`. With ``n_of_m``, the n largest of
        every group stay, and are both sets of their leaf.
      prunable: which leaves have latent weights, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`TopKASTState`: a copy of the sparse leaves in their own dtype,
      and two bytes a weight. Gradients and moments are dense: it trains as Top-KAST does, and saves no memory. Its
      ``update`` needs the params.

    Raises:
      ValueError: for an inner optimizer that is none, numbers out of range, a backward sparsity above the sparsity, a
        schedule that begins out of range, unknown options, a structure that does not fit a leaf and says "error" to
        that, params with a replica axis, 2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> tx = jaxsparse.top_kast(optax.sgd(0.5), 0.5, 0.25, decay=0.25)  # A keeps 3 and -4, B -2 too
      >>> opt_state = tx.init(params)
      >>> params = jaxsparse.sparsify(opt_state, params)
      >>> updates, opt_state = tx.update({"w": jnp.array([[9.0, 4.0], [4.0, 0.0]])}, opt_state, params)
      >>> opt_state.weights["w"].tolist()  # such as -2 - 0.5 (4 - 0.25 * 2 / 0.5), 3 - 0.5 (4 + 0.25 * 3)
      [[1.0, -3.5], [0.625, -3.5]]
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[0.0, -3.5], [0.0, -3.5]]

    References:
      Jayakumar, Pascanu, Rae, Osindero and Elsen, `Top-KAST: Top-K Always Sparse Training
      <https://arxiv.org/abs/2106.03517>`_, 2020.

    .. warning::
      Nothing may move the params after the wrapper: only :func:`jaxsparse.check` finds it.
    """
    for name, value in (("sparsity", sparsity), ("backward_sparsity", backward_sparsity)):
        if isinstance(value, Mapping | Sequence) or value is None:
            raise ValueError(f"{name} is one number for all leaves, or a schedule, got {value!r}")
        if not callable(value):
            check_range(name, value, 0, 1, open_end=True)
    check_schedule("decay", decay, 0, None, steps=[0])
    if penalty not in _SLOPES:
        raise ValueError(f"penalty must be one of {list(_SLOPES)}, got {penalty!r}")
    forward = Largest(sparsity, scope, allocation, 0, layout).checked()
    backward = Largest(backward_sparsity, scope, allocation, 0, layout).checked("backward_sparsity")
    given = (sparsity, backward_sparsity)
    if not any(callable(value) or isinstance(value, jax.core.Tracer) for value in given) and given[1] > given[0]:
        raise ValueError(f"backward_sparsity must be at most sparsity, {sparsity}, got {backward_sparsity}")
    slope = _SLOPES[penalty]

    def choose(layers, state, params):
        zeros, clipped = forward.at(state.count)
        fewer, also = backward.at(state.count)
        above = jnp.asarray(fewer - zeros > 1e-6, jnp.int32)
        few = forward.counts(layers, zeros, params)
        many = jnp.maximum(backward.counts(layers, fewer, params), few)  # each layer's rounding, too
        masks, kept = forward.masks(layers, few)
        wider, learning = backward.masks(layers, many)
        tree = jax.tree.structure(state.masks)
        return masks, state._replace(
            kept=kept,
            clipped=state.clipped + jnp.maximum(jnp.maximum(clipped, also), above),
            own=BackwardSet(tree.unflatten(wider), learning),
        )

    def pull(grads, weights, state):
        rate = decay(state.count) if callable(decay) else decay
        size = sum(mask.size for mask in jax.tree.leaves(state.masks))
        harder = jnp.float32(size) / jnp.maximum(state.kept, 1).astype(jnp.float32)  # 1 / D

        def learns(g, w, here, there):
            strength = jnp.where(here, jnp.float32(1), harder) * jnp.asarray(rate, jnp.float32)
            return jnp.where(there, g + strength.astype(g.dtype) * slope(w).astype(g.dtype), 0)  # (13), (14)

        return map_latents(learns, grads, weights, state.masks, state.own.masks), state

    def push(updates, state):
        return map_latents(lambda u, there: jnp.where(there, u, 0), updates, state.own.masks)

    return masked_latent(
        TopKASTState,
        inner,
        choose,
        pull=pull,
        push=push,
        every=every,
        structure=structure,
        prunable=prunable,
        layout=layout,
    )


_SLOPES = {"l2": lambda w: w, "l1": jnp.sign}  # of the penalty
