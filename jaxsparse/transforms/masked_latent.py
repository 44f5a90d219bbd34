"""The common part of wrappers that mask latent weights, for which all weights compete again and again.

A method says which weights are kept, the rest is :func:`masked_latent`: masks are chosen anew on the steps on which
they are due, the params are the kept weights and exactly 0 elsewhere, and what went wrong is counted in the state.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import check_total
from jaxsparse.layouts import LayoutLike
from jaxsparse.placement import is_abstract, varying_like
from jaxsparse.prunable import prunable_leaves
from jaxsparse.structures import StructureLike, check_structure, leaf_structures
from jaxsparse.transforms.checks import check_budget, check_steps, check_zeros, counted
from jaxsparse.transforms.landing import on_update_steps
from jaxsparse.transforms.latent import as_optimizer, filled, identity_pull, latent, not_finite
from jaxsparse.transforms.layers import Layer, Layers, counts, each, layers_of

__all__ = ["MaskedLatentState", "masked_latent"]

_CHOSEN = ("masks", "kept", "flips", "clipped", "own")  # the fields that change where masks do


class _Fields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    weights: Any
    inner_state: Any
    masks: Any = ()
    kept: Any = ()
    flips: Any = ()
    clipped: Any = ()
    own: Any = ()


class MaskedLatentState(_Fields):
    """State of a wrapper with latent weights of which masks keep some; a subclass names the method.

    Attributes:
      count: (), int32: the updates so far.
      weights: the latent weights, like the params; ``optax.MaskedNode()`` for leaves that have none.
      inner_state: the state of the inner optimizer.
      masks: like ``weights``: bool arrays, of the weights that the loss sees.
      kept: (), int32: how many weights the masks keep.
      flips: (), int32: how many entered or left the masks when these were last chosen. Divided by the number of
        weights it is the flip rate.
      clipped: (), int32: how often a schedule of the sparsity left its range, and was clipped, when masks were chosen.
      own: what the method keeps beside; () if nothing.
    """

    method: ClassVar[str] = "masked_latent"
    limits: ClassVar[str] = "sparsity left [0, 1]"

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """False: the optimizer is inside the wrapper."""
        return False

    def recounted(self, before: Self | None) -> Self:
        """The state whose masks may keep as many weights as they do now; ``before`` had more layers, or larger ones."""
        return self._replace(kept=counted(self.masks, self.kept))

    def problems(self, params: Any | None) -> list[str]:
        """Latent weights that are not finite, masks off their count, schedules out of range, zeros that are none."""
        who = self.method
        found = not_finite(self.weights, who) + check_budget(self.masks, self.kept, who)
        clipped = int(jnp.max(jax.tree.leaves(self.clipped)[0]))  # flax.nnx wraps the leaves of an optimizer state
        if clipped:
            found.append(f"{who}: {clipped} times when masks were chosen, {self.limits}, and was clipped")
        return found + ([] if params is None else check_zeros(self.masks, params, who))


Choose = Callable[[Layers, Any, Any], tuple[Sequence[jax.Array], Any]]
Image = Callable[[Layers, Any], Sequence[jax.Array]]


def masked_latent(
    state: type[MaskedLatentState],
    inner: optax.GradientTransformation,
    choose: Choose,
    *,
    image: Image | None = None,
    own: Callable[[Layers, Any], Sequence[jax.Array]] | None = None,
    pull: Callable[[Any, Any, Any], tuple[Any, Any]] = identity_pull,
    push: Callable[[Any, Any], Any] | None = None,
    every: ArrayLike = 1,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """A wrapper whose masks keep some of its latent weights. All weights compete for them, pruned ones too.

    The masks of step t are chosen from the latent weights that step t - 1 has left, by ``init`` for step 0.

    Args:
      state: a subclass of :class:`MaskedLatentState` with the name of the ``method``.
      inner: the optimizer of the latent weights and of the leaves that have none.
      choose: (layers, state, params) -> (their masks, in their order; the state with ``kept``, and ``clipped`` and
        ``own`` if they change). ``state.count`` is the step that the masks are for; of the params only names and shapes
        matter.
      image: (layers, state) -> the params of each layer, in their order. The layers have the masks of the state. None:
        the weights on their masks.
      own: (layers, params) -> an array for each layer, given those on their first masks: the first ``own``, as a tree
        like the weights. None: that of ``choose``.
      pull, push: as for :func:`latent`.
      every: masks are chosen on the multiples of so many steps, int >= 1. The other steps cost nothing.
      structure, prunable, layout: as the method got them.

    Returns:
      A gradient transformation. Its ``update`` needs the params.
    """
    who = state.method
    inner = as_optimizer(inner, "inner", who)
    check_steps("every", every, 1)
    check_structure(structure)
    always = not isinstance(every, jax.core.Tracer) and int(every) == 1

    def latents(params):
        chosen = prunable_leaves(params, prunable, layout=layout)
        leaf_structures(structure, params, chosen, layout=layout)  # warns of what does not fit, once
        weights = jax.tree.map(lambda p, c: p if c and jnp.ndim(p) else optax.MaskedNode(), params, chosen)
        check_total(w.size for w in jax.tree.leaves(weights))
        return weights

    def made(params):
        """The wrapper for these params, of which the names and shapes tell what each leaf is."""

        def none():
            return varying_like(jnp.zeros([], jnp.int32), params)

        def layers(state):
            return layers_of(filled(state.weights, params), None, state.masks, structure=structure, layout=layout)

        def renewed(state):
            old = layers(state)
            new, state = choose(old, state, params)
            masks = jax.tree.structure(state.masks).unflatten(new)
            flips = jnp.sum(counts(old, each(old, _changed, new)), dtype=jnp.int32)
            return state._replace(masks=masks, flips=flips)

        def first(state):
            all_of_them = jax.tree.map(lambda w: jnp.ones_like(w, bool), state.weights)
            state = renewed(state._replace(masks=all_of_them, clipped=none()))._replace(flips=none())
            if own is None:
                return state
            return state._replace(own=jax.tree.structure(state.weights).unflatten(own(layers(state), params)))

        def start(state, params):
            del params
            if any(map(is_abstract, jax.tree.leaves(state.weights))):
                return jax.eval_shape(first, state)
            return first(state)

        def forward(state):
            def changed(old):
                new = renewed(state._replace(**dict(zip(_CHOSEN, old, strict=True))))
                return tuple(getattr(new, field) for field in _CHOSEN)

            old = tuple(getattr(state, field) for field in _CHOSEN)
            new = changed(old) if always else on_update_steps(state.count % every == 0, changed, old)
            state = state._replace(**dict(zip(_CHOSEN, new, strict=True)))
            seen = _on_masks(layers(state), state) if image is None else image(layers(state), state)
            return jax.tree.structure(state.weights).unflatten(seen), state

        return latent(state, inner, latents, forward, start=start, pull=pull, push=push)

    def init_fn(params):
        return made(params).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        return made(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _changed(layers: Sequence[Layer], masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Where another mask differs from that of each layer."""
    return [new ^ layer.mask for layer, new in zip(layers, masks, strict=True)]


def _on_masks(layers: Layers, state: Any) -> list[jax.Array]:
    """The weights on their masks."""
    del state
    # Compared as a byte: on a CPU, XLA's select on a stored bool is not vectorised.
    return [jnp.where(layer.mask.astype(jnp.uint8) != 0, layer.weight, 0) for layer in layers]
