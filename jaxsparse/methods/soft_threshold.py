"""Soft thresholds that are trained with the weights: every layer finds its own sparsity.

Kusupati et al., *Soft Threshold Weight Reparameterization for Learnable Sparsity*, 2020
(https://arxiv.org/abs/2002.03231). Where the paper leaves something open, the authors' code is followed
(https://github.com/RAIVNLab/STR).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike, leaf_layouts, warn_of_guesses
from jaxsparse.placement import copied, varying_like, zeros
from jaxsparse.prunable import prunable_leaves
from jaxsparse.reductions import all_false
from jaxsparse.transforms.checks import check_precision
from jaxsparse.transforms.latent import LatentState, as_optimizer, latent
from jaxsparse.transforms.protocols import link_states
from jaxsparse.trees import by_path, is_masked_node, listed
from jaxsparse.user_warnings import warn

__all__ = ["SoftThresholdState", "Thresholds", "soft_threshold"]


class Thresholds(NamedTuple):
    """The thresholds of :func:`soft_threshold`.

    Attributes:
      raw: like the latent weights: s, float32, of the leaf's rank, with size 1 for all axes along which weights share
        a threshold. The threshold is sigmoid(s).
      state: the state of their optimizer.
    """

    raw: Any
    state: Any


class SoftThresholdState(LatentState):
    """State of :func:`soft_threshold`; ``own`` holds its :class:`Thresholds`."""

    method = "soft_threshold"

    def eval_weights(self) -> Any:
        """The latent weights, shrunk; these are the params after any update, but not yet the first ones."""
        return jax.tree.map(_shrunk, self.weights, self.own.raw)

    def problems(self, params: Any | None) -> list[str]:
        """Thresholds that are not finite, and the problems of :class:`LatentState`."""
        found = [
            f"{self.method}: the threshold of {path} is not finite. The training has diverged"
            for path, s in by_path(self.own.raw).items()
            if not bool(jnp.isfinite(s).all())
        ]
        return found or super().problems(params)


def soft_threshold(
    inner: optax.GradientTransformation,
    *,
    init: ArrayLike = -10.0,
    scope: Literal["layer", "channel"] = "layer",
    threshold_optimizer: optax.GradientTransformation | None = None,
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learn the sparsity of every layer by a trainable soft threshold (Kusupati et al., 2020).

    A wrapper: around an optimizer.

    Soft threshold reparameterisation (STR): the params that training hands out are latent weights w, shrunk by the
    threshold of their layer,

    .. math:: p = \mathrm{sign}(w) \, \mathrm{relu}(|w| - \sigma(s))

    with :math:`\sigma` the sigmoid, so weights below the threshold are exactly 0. Their gradient G is passed on by the
    chain rule, to both w and s:

    .. math::
       g_w &= G \, [|w| > \sigma(s)] \\
       g_s &= -\sigma'(s) \sum G \, \mathrm{sign}(w) \, [|w| > \sigma(s)]

    A weight of exactly 0 is above no threshold and gets no gradient: leave matrices out that start at 0.

    **Weight decay sets the sparsity.** There is no budget. Where s is far below 0, :math:`\sigma'(s)` vanishes and only
    the decay :math:`\lambda` moves it, towards 0: after learning rates :math:`\eta_t` with momentum :math:`\mu` it is
    near :math:`s_0 \exp(-\lambda \sum \eta_t / (1 - \mu))`. From about -7 on, a threshold of 0.001, weights are
    lost, until the loss holds against it. More decay means more zeros, and without any decay there are hardly any. A
    lower ``init`` starts later.

    Args:
      inner: the optimizer of the latent weights, with weight decay: ``optax.chain(optax.add_decayed_weights(5e-4),
        optax.sgd(0.1, momentum=0.9))``. (That of ``optax.adamw`` has to be about 1000 times as strong.)
      init: the first s, finite. The authors have -3200 for a ResNet-50 with :math:`\lambda` = 2.25e-5 and 100 epochs.
      scope: what shares a threshold: the weights of a "layer", as published, or those of each output "channel".
        Layers of a stack have a threshold each.
      threshold_optimizer: the optimizer of s. None: ``inner``, with a state of its own for them, as published: the same
        learning rate, momentum and weight decay. It then gets no extra args, and clips the norm of s by itself. Give
        one where ``inner`` treats matrices in another way than vectors, such as muon.
      prunable: which leaves get thresholds, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`SoftThresholdState`: a copy of the sparse leaves, and a byte a
      weight. Its ``update`` needs the params.

    Raises:
      ValueError: for unknown options, an ``init`` that is not finite, and, by ``init``, for a sparse link inside
        ``inner`` where that is the optimizer of s too, and params with a replica axis.

    Warns:
      UserWarning: for leaves whose outputs had to be guessed, with the scope "channel".

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.array([[0.5, -0.25], [0.125, 1.0]])}
      >>> tx = jaxsparse.soft_threshold(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)), init=-3.0)
      >>> opt_state = tx.init(params)
      >>> params = jaxsparse.eval_params(opt_state, params)
      >>> updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> round(float(jax.nn.sigmoid(opt_state.own.raw["kernel"])[0, 0]), 4)  # s has decayed to -1.5
      0.1824
      >>> [round(float(w), 4) for w in params["kernel"].ravel()]  # and the weights to 0.25, -0.125, 0.0625 and 0.5
      [0.0676, 0.0, 0.0, 0.3176]

    References:
      Kusupati et al., `Soft Threshold Weight Reparameterization for Learnable Sparsity
      <https://arxiv.org/abs/2002.03231>`_, 2020; code: https://github.com/RAIVNLab/STR.

    .. warning::
      Nothing may move the params after the wrapper. Thresholds of sharded leaves, and those trained on other numbers of
      devices, differ in the last bits, since sums of gradients do.
    """
    if scope not in ("layer", "channel"):
        raise ValueError(f'scope must be "layer" or "channel", got {scope!r}')
    check_precision("init", init)
    if not isinstance(init, jax.core.Tracer) and not np.isfinite(init):
        raise ValueError(f"init must be a finite number, got {init}")
    who = SoftThresholdState.method
    optimizer = as_optimizer(
        inner if threshold_optimizer is None else threshold_optimizer,
        "inner" if threshold_optimizer is None else "threshold_optimizer",
        who,
    )

    def latents(params):
        chosen = prunable_leaves(params, prunable, layout=layout)
        return jax.tree.map(lambda p, c: p if c else optax.MaskedNode(), params, chosen)

    def start(state, params):
        if threshold_optimizer is None and link_states(state.inner_state):
            raise ValueError(
                f"{who}: inner has a sparse link in it, which cannot move the thresholds: give a threshold_optimizer"
            )
        layouts = leaf_layouts(params, layout)
        if scope == "channel":
            warn_of_guesses(
                {path: layouts[path] for path in by_path(state.weights)}, f"{who} with a threshold a channel"
            )

        if still := all_false({path: w != 0 for path, w in by_path(state.weights).items()}):
            warn(
                f"{who}: {listed(still)} is zero, below every threshold, so no gradient reaches it: leave it out, "
                "prunable=jaxsparse.all_but(...)",
            )

        def first(path, w):
            at: Any = layouts[path]
            apart = (*at.stack, *at.outputs) if scope == "channel" else at.stack
            shape = [n if axis in apart else 1 for axis, n in enumerate(w.shape)]
            return zeros(w, shape).astype(_wide(w)) + jnp.asarray(init, _wide(w))

        leaves, treedef = jax.tree.flatten(state.weights, is_leaf=is_masked_node)
        paths = iter(by_path(state.weights))
        raw = treedef.unflatten([w if is_masked_node(w) else first(next(paths), w) for w in leaves])
        raw = varying_like(raw, params)
        return forward(state._replace(own=Thresholds(raw, optimizer.init(jax.tree.map(copied, raw)))))[1]

    def forward(state):
        masks = jax.tree.map(lambda w, s: _above(w, s) > 0, state.weights, state.own.raw)
        return jax.tree.map(_shrunk, state.weights, state.own.raw), state._replace(masks=masks)

    def pull(grads, weights, state):
        """The chain rule: the gradient is passed on to weights and thresholds, and the thresholds move."""

        def of_both(g, w, mask, s):
            if is_masked_node(s):
                return g, s
            if g is None:
                return None, jnp.zeros_like(s)
            shared = tuple(axis for axis, n in enumerate(s.shape) if n == 1)
            passed = jnp.where(mask, g, jnp.zeros_like(g))
            total = jnp.sum(passed.astype(s.dtype) * jnp.sign(w).astype(s.dtype), shared, keepdims=True)
            return passed, -jax.nn.sigmoid(s) * jax.nn.sigmoid(-s) * total

        leaves, treedef = jax.tree.flatten(weights)
        raw, thresholds = state.own.raw, state.own
        rows = zip(treedef.flatten_up_to(grads), leaves, treedef.flatten_up_to(state.masks),
                   treedef.flatten_up_to(raw), strict=True)  # fmt: skip
        of_weights, of_raw = zip(*[of_both(*row) for row in rows], strict=True) if leaves else ((), ())
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam knows no other
            moves, next_state = optimizer.update(treedef.unflatten(of_raw), thresholds.state, raw)
        return treedef.unflatten(of_weights), state._replace(
            own=Thresholds(optax.apply_updates(raw, moves), next_state)
        )

    return latent(SoftThresholdState, inner, latents, forward, start=start, pull=pull)


def _wide(w: jax.Array) -> Any:
    """The dtype of the thresholds of a leaf: float32 at least, for they move in small steps far from 0."""
    return w.dtype if jnp.finfo(w.dtype).bits >= 32 else jnp.float32


def _above(w: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.abs(w).astype(s.dtype) - jax.nn.sigmoid(s)


def _shrunk(w: jax.Array, s: jax.Array) -> jax.Array:
    return (jnp.sign(w).astype(s.dtype) * jax.nn.relu(_above(w, s))).astype(w.dtype)
