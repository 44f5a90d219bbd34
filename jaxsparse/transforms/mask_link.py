"""The common part of methods that hold masks and change them on some steps.

A method says where its masks start and how they change, the rest is :func:`mask_link`: pruned weights stay at 0, masks
change on the steps on which they are due and cost nothing on the others, and what went wrong is counted in the state.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, Sparsity, check_total
from jaxsparse.layouts import LayoutLike
from jaxsparse.masks import as_key, copied_masks, random_masks, validate_masks
from jaxsparse.placement import is_abstract, varying_like
from jaxsparse.positions import fold_in
from jaxsparse.prunable import prunable_leaves
from jaxsparse.reductions import count_true, sums
from jaxsparse.structures import StructureLike, check_units, leaf_structures, mask_structures
from jaxsparse.transforms.chain import is_stored
from jaxsparse.transforms.checks import (
    check_budget,
    check_steps,
    check_zeros,
    counted,
    refuse_replicated,
    require_bool,
    require_params,
    whole_steps,
)
from jaxsparse.transforms.landing import land_on_masks, on_update_steps
from jaxsparse.transforms.layers import Layer, Layers, each, layers_of, with_signals
from jaxsparse.transforms.renewal import Renewing, Restarting
from jaxsparse.trees import is_function, is_masked_node, leaf_paths
from jaxsparse.user_warnings import warn

__all__ = ["MaskState", "Watched", "dense_start", "every", "given_masks", "mask_link", "random_start"]

Start = Callable[[Any, jax.Array | None], Any]
Change = Callable[[list[Layer], "MaskState"], tuple[Any, ...]]


class Watched(NamedTuple):
    """A record of the layers that move and of those that rest, for a link that watches them.

    Attributes:
      fingerprints: (sparse leaves,), uint32: of each one's weights when its mask was last chosen. One that still has
        the same weights at the next mask update is frozen.
      resting: (sparse leaves,), bool: which kept their masks in the last mask update, since they are frozen, or
        without any signal, or have one that is not finite.
    """

    fingerprints: jax.Array
    resting: jax.Array


class _Fields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    masks: Any
    kept: jax.Array
    nan_scores: jax.Array
    key: Any = ()
    own: Any = ()
    watched: Any = ()
    renewal: Any = ()


class MaskState(_Fields):
    """State of a method that holds masks; a subclass names the method.

    Attributes:
      count: (), int32: the updates so far.
      masks: like the params: bool arrays, ``optax.MaskedNode()`` for dense leaves.
      kept: (), int32: how many weights the masks keep.
      nan_scores: (), int32: NaNs met among the weights and signals that masks were chosen by.
      key: (), typed PRNG key: for the random choices of mask updates, with the step; () if a method makes none.
      own: what the method keeps beside, such as its own average of the gradients; () if nothing.
      watched: :class:`Watched`; () for a link that does not watch.
      renewal: :class:`Renewal`; () for a link that leaves regrown weights the optimizer state that they have.
    """

    method: ClassVar[str] = "masks"
    needs_momentum: ClassVar[bool] = False
    restarts_all: ClassVar[bool] = False  # whether the whole optimizer starts anew with what is regrown

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """Whether the momentum has to come from an optimizer before this link."""
        return self.needs_momentum and not jax.tree.leaves(self.own)

    def recounted(self, before: Self | None) -> Self:
        """The state whose masks may keep as many weights as they do now; ``before`` had more layers, or larger ones."""
        return self._replace(kept=counted(self.masks, self.kept))

    def problems(self, params: Any | None) -> list[str]:
        """NaN scores seen, masks off their count, pruned weights that are not zero."""
        found = check_budget(self.masks, self.kept, self.method)
        nans = int(jnp.max(jax.tree.leaves(self.nan_scores)[0]))  # flax.nnx wraps the leaves of an optimizer state
        if nans:
            found.append(
                f"{self.method}: {nans} NaN among the weights and signals when masks were updated. They rank last, so "
                "the masks are valid, but the training has diverged"
            )
        return found + ([] if params is None else check_zeros(self.masks, params, self.method))

    def notes(self) -> list[str]:
        """Layers that took no part in the last mask update."""
        if not jax.tree.leaves(self.watched):
            return []
        resting = jax.device_get(jax.tree.leaves(self.watched.resting)[0])
        resting = resting.any(axis=tuple(range(resting.ndim - 1)))
        return [
            f"{self.method}: {path} kept its mask in the last mask update, because it does not move or has no "
            "momentum: it is frozen, or no gradient reaches it, or a gradient was not finite on that step. If it is "
            "meant to be frozen, leave it out, or it stays as sparse as it was at the start: "
            f"prunable=jaxsparse.all_but({path!r})"
            for path, rests in zip(leaf_paths(self.masks), resting, strict=True)
            if rests
        ]


def every(steps: ArrayLike, *, start_at: ArrayLike = 0, stop_at: ArrayLike | None = None) -> Callable[..., jax.Array]:
    """The steps on which masks change: the positive multiples of ``steps`` in [start_at, stop_at).

    Args:
      steps: int >= 1.
      start_at, stop_at: steps, ints >= 0; ``stop_at=None``: no end.

    Returns:
      From a step, an int32, to whether masks change on it.

    Raises:
      ValueError: for what is not a whole number of steps, or out of range.

    Warns:
      UserWarning: if there is no such step, but for ``stop_at=0``, which says so.

    Examples:
      >>> due = every(10, stop_at=30)
      >>> [step for step in range(50) if due(step)]
      [10, 20]
    """
    steps = whole_steps("update_every", steps, 1)
    check_steps("start_at", start_at, 0)
    check_steps("stop_at", stop_at, 0)
    if stop_at is not None and not any(isinstance(step, jax.core.Tracer) for step in (steps, start_at, stop_at)):
        interval = int(steps)
        if 0 < int(stop_at) <= max(1, -(-int(start_at) // interval)) * interval:  # type: ignore[arg-type]
            warn(
                f"masks never change: no multiple of update_every, {steps}, is in [start_at, stop_at), which is "
                f"[{start_at}, {stop_at})",
            )

    def due(count):
        now = (count > 0) & (count % steps == 0) & (count >= start_at)
        return now if stop_at is None else now & (count < stop_at)

    return due


def given_masks(masks: Any, structure: StructureLike = "weight", layout: LayoutLike = None) -> Start:
    """A start from given masks, checked against the params, and copied, for the state may be donated."""

    def start(params, key):
        del key
        checked = validate_masks(masks, params)
        check_units(checked, mask_structures(structure, params, checked, layout=layout))
        return copied_masks(checked, params)

    return start


def random_start(
    sparsity: Sparsity,
    allocation: Allocation,
    at_least: ArrayLike,
    structure: StructureLike,
    prunable: Any,
    layout: LayoutLike,
) -> Start:
    """A start from random masks, as :func:`jaxsparse.random_masks` makes them of these options."""

    def start(params, key):
        return random_masks(
            params, sparsity, allocation=allocation, at_least=at_least, prunable=prunable, structure=structure,
            layout=layout, key=key,
        )  # fmt: skip

    return start


def dense_start(structure: StructureLike = "weight", prunable: Any = None, layout: LayoutLike = None) -> Start:
    """A start with every weight of the prunable leaves kept; warns of leaves that do not fit the structure."""

    def start(params, key):
        del key
        chosen = prunable_leaves(params, prunable, layout=layout)
        leaf_structures(structure, params, chosen, layout=layout)  # warns of what does not fit, once
        return jax.tree.map(lambda p, c: jnp.ones_like(p, bool) if c else jnp.ones((), bool), params, chosen)

    return start


def mask_link(
    state: type[MaskState],
    start: Start,
    change: Change | None = None,
    *,
    when: Callable[[jax.Array], jax.Array] | None = None,
    signal: Callable[..., Any] | None = None,
    own: Callable[[Any, Any], Any] | None = None,
    own_update: Callable[..., Any] | None = None,
    watch: bool = False,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
    key: ArrayLike | None = None,
    draws: bool = True,
    renewing: Renewing | Restarting | None = None,
    what: str = "momentum",
    proposed: bool = False,
    shaped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A link that keeps pruned weights at exactly 0 and changes its masks on some steps.

    Args:
      state: a subclass of :class:`MaskState` with the name of the ``method``.
      start: (params, key) -> the first masks, in the form of :func:`jaxsparse.random_masks` or of a state.
      change: (layers, state) -> (their new masks, in their order; how many weights these keep, or None to count them,
        if the link watches; which layers rest, or None for those that are frozen; and, if it makes scores itself, how
        many NaN are in them besides those of weights and signals). It sees the state as it is at that step, with
        ``watched.resting`` saying which layers are frozen. None: the masks stay. What it computes of each layer by
        itself it computes by :func:`each`.
      when: step -> whether masks change on it, such as :func:`every`.
      signal: (updates, own, extra args) -> what ``change`` sees as ``Layer.signal``: a tree like the params, or a
        function that makes one. It is made on the steps on which masks change, only.
      own: (params, masks) -> the first ``MaskState.own``.
      own_update: (state, updates, params, extra args) -> the next one, on every step.
      watch: keep track of the layers that do not move, or whose signal is not finite, in ``MaskState.watched``.
      structure, layout: as the method got them.
      key: an int or PRNG key; None for a method that makes no random choice.
      renewing: how regrown weights start, with an optimizer state of zeros; None: with the state that they have. Only
        :func:`jaxsparse.chain` can see to that.
      what: what to call the signal in errors.
      proposed: the layers have the weights that the proposed update leads to, pruned ones too, in place of the params.
      shaped: ``change`` asks where in its leaf a weight is: layers that repeat one another keep their shapes.
      draws: whether ``change`` makes random choices, by ``Layer.key``. If not, only ``start`` has the key.

    Returns:
      A gradient transformation. Its ``update`` needs the params.
    """
    who = state.method

    def init_fn(params):
        refuse_replicated(params, who)
        start_key, draw_key = (None, None) if key is None else jax.random.split(as_key(key))
        masks = validate_masks(start(params, start_key), params)
        flat, weights = jax.tree.leaves(masks), _masked_leaves(params, masks)
        check_total(mask.size for mask in flat)
        # Each field has a buffer of its own, for the state may be donated.
        watched: Any = ()
        if watch:
            unknown = any(map(is_abstract, weights))
            watched = Watched(
                jnp.zeros(len(flat), jnp.uint32) if unknown else fingerprints(weights, flat),
                varying_like(jnp.zeros(len(flat), bool), params),
            )
        return state(
            count=jnp.zeros([], jnp.int32),
            masks=masks,
            kept=sum(map(count_true, flat), jnp.zeros([], jnp.int32)),
            nan_scores=varying_like(jnp.zeros([], jnp.int32), params),
            key=draw_key if draws and key is not None else (),
            own=() if own is None else own(params, masks),
            watched=watched,
            renewal=() if renewing is None else renewing.init(params, masks),
        )

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params, who)
        require_bool(state.masks, who)
        if own_update is not None:
            state = state._replace(own=own_update(state, updates, params, extra_args))
        landed = None
        if change is not None and when is not None:
            seen = None if signal is None else signal(updates, state.own, extra_args)
            if not isinstance(state.count, jax.core.Tracer) and not is_function(seen):
                with_signals(params, seen, state.masks, what)  # outside jit, errors would come on a mask update alone
            old = state.masks, state.kept, state.nan_scores, state.watched, state.renewal

            def changed(old):
                masks, kept, nan_scores, watched, renewal = old
                draw = fold_in(state.key, state.count) if draws and key is not None else None
                weights = _moved(params, updates, masks) if proposed else params
                layers = layers_of(weights, seen, masks, structure=structure, layout=layout, key=draw, what=what)
                layers = Layers(layers, flat=False) if shaped else layers
                nans, *looks = each(layers, _looked_at if watch else _nans)
                nan_scores += jnp.sum(nans, dtype=jnp.int32)
                if watch:  # a step whose gradient overflowed, which an optimizer may skip, chooses no masks
                    prints, lost = looks
                    watched = Watched(prints, (prints == watched.fingerprints) | (lost > 0))
                new, kept, resting, *of_scores = change(layers, state._replace(kept=kept, watched=watched))
                nan_scores += sum(of_scores)
                if watch:
                    resting = watched.resting if resting is None else resting
                    prints, of_layers = each(layers, _looked_at_anew, new)
                    watched = Watched(prints, resting)
                    kept = jnp.sum(of_layers, dtype=jnp.int32) if kept is None else kept
                renewed = jax.tree.structure(masks).unflatten(new)
                if renewing is not None:
                    renewal = renewing.renewed(renewal, masks, renewed, state.count)
                return renewed, kept, nan_scores, watched, renewal

            if isinstance(renewing, Renewing) and renewing.always:
                landed = state.masks
            due = when(state.count)
            new = on_update_steps(due, changed, old)
            fields = "masks", "kept", "nan_scores", "watched", "renewal"
            state = state._replace(**dict(zip(fields, new, strict=True)))
            if renewing is not None:
                if not is_stored(extra_args.get("momentum")):
                    warn(
                        f"{who} is in no jaxsparse.chain, so the optimizer state of regrown weights cannot be set to "
                        "zero: use jaxsparse.chain in place of optax.chain",
                    )
                state = state._replace(renewal=renewing.at(state.renewal, due, state.count))
                updates = renewing.updates(updates, state.renewal, params, state.count)
        # What has just been regrown stays at 0. It is told by its weight of 0, unless masks may change on every step,
        # when that would hold what was regrown on the last one too: then by the masks of before, at the cost of a copy.
        if landed is not None:
            landing = land_on_masks(updates, params, jax.tree.map(jnp.logical_and, landed, state.masks))
        else:
            resting = state.renewal.now if isinstance(renewing, Renewing) else None
            landing = land_on_masks(updates, params, state.masks, resting=resting)
        return landing, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moved(params: Any, updates: Any, masks: Any) -> Any:
    """The params after an update, in their dtypes, as far as they have masks."""
    leaves, treedef = jax.tree.flatten(params)
    rows = zip(leaves, treedef.flatten_up_to(updates), treedef.flatten_up_to(masks), strict=True)
    return treedef.unflatten([
        p if u is None or is_masked_node(mask) else p + jnp.asarray(u, jnp.result_type(p)) for p, u, mask in rows
    ])  # fmt: skip


@jax.jit
def fingerprints(weights: list[jax.Array], masks: list[jax.Array]) -> jax.Array:
    """One number for the weights that each leaf keeps, (leaves,), uint32: equal as long as no bit of them changes."""
    return _prints_and_counts(weights, masks)[0]


def _prints_and_counts(weights: list[jax.Array], masks: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """:func:`fingerprints`, and how many weights each mask keeps, int32, (leaves,), in one pass."""
    found = [sums([_terms(w, mask), mask]) for w, mask in zip(weights, masks, strict=True)]
    return _of_layers(found, jnp.uint32, jnp.int32)


def _looked_at(layers: list[Layer]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How many weights are NaN, :func:`fingerprints`, and how many signals are not finite, in one pass."""

    def lost(layer):
        return jnp.zeros_like(layer.mask) if layer.given is None else ~jnp.isfinite(layer.signal)

    found = [sums([jnp.isnan(layer.weight), _terms(layer.weight, layer.mask), lost(layer)]) for layer in layers]
    return _of_layers(found, jnp.int32, jnp.uint32, jnp.int32)


def _looked_at_anew(layers: list[Layer], masks: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _prints_and_counts([layer.weight for layer in layers], masks)


def _nans(layers: list[Layer]) -> tuple[jax.Array]:
    """How many NaN there are in each layer: a weight and its signal count as one. Pruned weights are 0."""
    return _of_layers([[count_true(_is_nan(layer))] for layer in layers], jnp.int32)


def _of_layers(found: Sequence[Sequence[jax.Array]], *dtypes: Any) -> Any:
    """The numbers of each layer as arrays, one of each dtype, (layers,)."""
    return tuple(jnp.stack([row[i] for row in found]) if found else jnp.zeros(0, of) for i, of in enumerate(dtypes))


def _is_nan(layer: Layer) -> jax.Array:
    nan = jnp.isnan(layer.weight)
    return nan if layer.given is None else nan | jnp.isnan(layer.signal)


def _terms(w: jax.Array, mask: jax.Array) -> jax.Array:
    """Integers, of which the sum modulo 2**32 is a fingerprint; 0 for what is pruned, and for a zero of either sign."""
    bits = jax.lax.bitcast_convert_type(w, {1: jnp.uint8, 2: jnp.uint16}.get(w.dtype.itemsize, jnp.uint32))
    # Compared as a byte: on a CPU, XLA's select on a stored bool is not vectorised.
    kept = (mask.astype(jnp.uint8) != 0) & (w != 0)
    kept = kept.reshape(kept.shape + (1,) * (bits.ndim - kept.ndim))  # a float64 has two of 32 bits
    bits = jnp.where(kept, bits.astype(jnp.uint32), 0)
    # Nearly the squares: of the bits themselves, one weight a step up and another a step down would cancel.
    terms = bits * (bits | 1)
    return terms if terms.ndim == w.ndim else jnp.sum(terms, axis=-1, dtype=jnp.uint32)


def _masked_leaves(params: Any, masks: Any) -> list[jax.Array]:
    """The leaves of the params that have masks."""
    leaves, treedef = jax.tree.flatten(params)
    return [leaf for leaf, mask in zip(leaves, treedef.flatten_up_to(masks), strict=True) if not is_masked_node(mask)]
