"""The link of methods that drop weights and grow as many in the same layer: dynamic sparse training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, Sparsity, check_allocation, check_sparsities
from jaxsparse.layouts import LayoutLike
from jaxsparse.masks import validate_masks
from jaxsparse.structures import StructureLike, check_structure, check_units, mask_structures
from jaxsparse.transforms import regrow
from jaxsparse.transforms.chain import align_signal
from jaxsparse.transforms.checks import check_range, check_schedule, check_steps
from jaxsparse.transforms.landing import on_update_steps
from jaxsparse.transforms.layers import Layer, Rule, layers_of, on_units
from jaxsparse.transforms.mask_link import MaskState, every, given_masks, mask_link, random_start
from jaxsparse.transforms.renewal import Renewing
from jaxsparse.trees import is_masked_node

__all__ = ["drop_and_grow", "exchange_link", "exchanged_masks", "gradient_of", "zeros_to_add_to"]

Drop = Callable[[Sequence[Layer], jax.Array, jax.Array], Sequence[jax.Array]]
Grow = Callable[[Sequence[Layer], Sequence[jax.Array], jax.Array], Sequence[jax.Array]]


def drop_and_grow(fraction: ArrayLike, drop: Drop, grow: Grow) -> Rule:
    """A rule for :func:`on_units`: each layer drops a fraction of its weights and grows as many.

    Args:
      fraction: the drop fraction, in [0, 1]. Of A weights the nearest number to fraction * A goes.
      drop, grow: of :mod:`jaxsparse.transforms.regrow`.

    Returns:
      (layers, which of them rest) -> (new masks, which of them rest).
    """

    def rule(layers, resting):
        kept = regrow.counts(layers)
        left = jnp.round(kept.astype(jnp.float32) * (1 - jnp.asarray(fraction, jnp.float32))).astype(jnp.int32)
        lose = jnp.where(resting, 0, kept - jnp.clip(left, 0, kept))
        return grow(layers, drop(layers, kept, lose), lose), resting

    return rule


def exchanged_masks(
    params: Any,
    signal: Any,
    masks: Any,
    rule: Rule,
    structure: StructureLike,
    layout: LayoutLike,
    *,
    key: jax.Array | None = None,
    what: str = "momentum",
) -> Any:
    """One mask update by a rule, as a pure function: the new masks, of the form of ``masks``, which are checked.

    Args:
      params, signal, masks: trees: the weights, what growth goes by, and bool arrays, the scalar True or ``MaskedNode``
        for dense leaves.
      rule, structure, layout, key, what: as :func:`on_units` and :func:`layers_of` take them.
    """
    checked = validate_masks(masks, params)
    check_units(checked, mask_structures(structure, params, checked, layout=layout))
    layers = layers_of(params, signal, checked, structure=structure, layout=layout, key=key, what=what)
    new, _ = on_units(layers, rule, jnp.zeros(len(layers), bool))
    renewed = jax.tree.structure(checked).unflatten(new)
    return jax.tree.map(lambda n, old: old if is_masked_node(n) else n, renewed, masks, is_leaf=is_masked_node)


def exchange_link(
    state: type[MaskState],
    rule: Callable[[MaskState], Rule],
    *,
    sparsity: Sparsity,
    update_every: ArrayLike,
    start_at: ArrayLike,
    stop_at: ArrayLike | None,
    allocation: Allocation,
    at_least: ArrayLike,
    masks: Any,
    structure: StructureLike,
    prunable: Any,
    layout: LayoutLike,
    key: ArrayLike,
    draws: bool,
    renewing: Renewing,
    signal: Callable[..., Any] | None = None,
    own: Callable[[Any, Any], Any] | None = None,
    own_update: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A link that starts from random masks, or from given ones, and exchanges weights within each layer.

    Layers that have not moved since their mask was chosen, such as frozen ones, keep it.

    Args:
      state: a subclass of :class:`MaskState`.
      rule: the state at a mask update -> what changes the masks of the layers, such as :func:`drop_and_grow`.
      sparsity, update_every, start_at, stop_at, allocation, at_least, masks, structure, prunable, layout, key: as
        :func:`jaxsparse.rigl` takes them.
      draws, renewing, signal, own, own_update: as :func:`mask_link` does.

    Raises:
      ValueError: for options that are out of range.
    """
    check_allocation(allocation)
    check_structure(structure)
    check_steps("at_least", at_least, 0)
    renewing.check()
    if masks is None:
        check_sparsities(sparsity)

    def change(layers, state):
        new, resting = on_units(layers, rule(state), state.watched.resting)
        return new, state.kept, resting

    return mask_link(
        state,
        random_start(sparsity, allocation, at_least, structure, prunable, layout)
        if masks is None
        else given_masks(masks, structure, layout),
        change,
        when=every(update_every, start_at=start_at, stop_at=stop_at),
        signal=signal,
        own=own,
        own_update=own_update,
        watch=True,
        structure=structure,
        layout=layout,
        key=key,
        draws=draws,
        renewing=renewing,
        what="gradient",
    )


def check_fraction(fraction: Any, stop_at: Any, who: str) -> optax.Schedule:
    """The schedule of a drop fraction: a number falls from there to 0 on step ``stop_at``, as half a cosine.

    Raises:
      ValueError: for a number or a schedule out of [0, 1], or a number without a ``stop_at``.
    """
    if callable(fraction):
        check_schedule("drop_fraction", fraction, steps=[0] if stop_at is None else [0, stop_at])
        return fraction
    check_range("drop_fraction", fraction, 0, 1)
    if stop_at is None:
        raise ValueError(
            f"{who} needs stop_at, the step on which its drop fraction has fallen to 0 (its authors end at three "
            "quarters of all steps); or a schedule as drop_fraction, such as optax.constant_schedule(0.3)"
        )

    def cosine(step):
        time = jnp.clip(jnp.asarray(step, jnp.float32) / jnp.maximum(stop_at, 1), 0, 1)
        return fraction * 0.5 * (1 + jnp.cos(jnp.pi * time))

    return cosine


def zeros_to_add_to(param: Any) -> jax.Array:
    """Zeros like a param for sums and averages of its gradients: in float32, or what is wider."""
    return jnp.zeros_like(param, dtype=np.promote_types(jnp.result_type(param), jnp.float32))


def gradient_of(extra_args: dict[str, Any], who: str) -> Any:
    """The gradient that a chain hands its members, or the caller does.

    Raises:
      ValueError: if there is none.
    """
    if extra_args.get("grad") is None:
        raise ValueError(
            f"{who} grows weights by their gradients and is handed none: use jaxsparse.chain in place of optax.chain, "
            "or call tx.update(grads, opt_state, params, grad=grads)"
        )
    return extra_args["grad"]


def sums_of_gradients(window: int, update_every: ArrayLike, who: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The sum of the gradients of the last ``window`` steps before masks change, as ``own`` of a link.

    Args:
      window: how many steps, the one on which masks change among them.
      update_every: steps between two mask updates.
      who: the method, in errors.

    Returns:
      ``own`` and ``own_update`` of :func:`mask_link`.

    Raises:
      ValueError: for a window that is none, or longer than ``update_every``.
    """
    check_steps("accumulate", window, 1)
    if not any(isinstance(steps, jax.core.Tracer) for steps in (window, update_every)) and window > update_every:
        raise ValueError(f"accumulate must be at most update_every, {update_every}, got {window}")

    def own(params, masks):
        leaves, treedef = jax.tree.flatten(params)
        flat = zip(leaves, treedef.flatten_up_to(masks), strict=True)
        return treedef.unflatten([mask if is_masked_node(mask) else zeros_to_add_to(p) for p, mask in flat])

    def own_update(state, updates, params, extra_args):
        del updates
        ahead = -state.count % update_every  # steps to the next mask update
        treedef = jax.tree.structure(params)
        gradients = align_signal(gradient_of(extra_args, who), params, "grad")

        def added(sums):
            rows = zip(treedef.flatten_up_to(sums), gradients, strict=True)
            return treedef.unflatten([
                s if is_masked_node(s)
                else jnp.where(ahead == window - 1, 0, s) + (0 if g is None else g.astype(s.dtype))
                for s, g in rows
            ])  # fmt: skip

        return on_update_steps(ahead < window, added, state.own)

    return own, own_update
