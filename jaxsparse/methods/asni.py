r"""ASNI: global magnitude pruning in one round of training, and the two numbers a layer that it leads to.

Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (https://arxiv.org/abs/2202.09284). *ASNI-I*,
:func:`asni`, prunes the whole network by magnitude on a schedule, once an epoch. *ASNI-II* starts again from what is
left, its signs alone: every weight of a layer from one of two numbers, :func:`centroids` and :func:`amenable_init`, and
trains on these masks, :func:`jaxsparse.mask_updates`. The author's code is followed
(https://github.com/sdamadi/image-classification at 91f7b48, ``utils/pruning.py``, ``utils/init.py``).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import check_total
from jaxsparse.layouts import LayoutLike
from jaxsparse.links import (
    check_budget,
    check_range,
    check_steps,
    check_zeros,
    land_on_masks,
    on_update_steps,
    refuse_replicated,
    require_bool,
    require_params,
)
from jaxsparse.masks import validate_masks
from jaxsparse.placement import varying_like
from jaxsparse.prunable import default_choice, prunable_leaves
from jaxsparse.selection import count_true, global_top_k_masks
from jaxsparse.structures import (
    Structure,
    StructureLike,
    check_structure,
    leaf_structures,
    mask_structures,
    n_of_m,
    unit_scores,
    weight,
)
from jaxsparse.trees import is_masked_node, leaf_paths, path_name

__all__ = ["ASNIState", "amenable_init", "asni", "asni_counts", "centroids"]

_SMALLEST_SHARE = 0.001  # of the weights that are left: the author's code skips prunings of no more


class ASNIState(NamedTuple):
    """State of :func:`asni`.

    Attributes:
      count: (), int32: the updates so far.
      masks: like the params: bool arrays, ``optax.MaskedNode()`` for dense leaves.
      kept: (), int32: how many weights the masks keep. (With units of several weights, perhaps less than the
        schedule leaves.)
      nan_scores: (), int32: NaNs met among the weights that masks were chosen by.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    masks: Any
    kept: jax.Array
    nan_scores: jax.Array

    def sparse_masks(self) -> Any:
        """The masks in the form of a state."""
        return self.masks

    def wants_momentum(self) -> bool:
        """Pruning by magnitude needs no momentum."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """NaN weights seen, masks off their count, pruned weights that are not zero."""
        found = check_budget(self.masks, self.kept, "asni")
        if nans := int(jnp.max(jax.tree.leaves(self.nan_scores)[0])):
            found.append(
                f"asni: {nans} NaN among the weights when they were pruned. They rank last, so the masks are valid, "
                "but the training has diverged"
            )
        return found + ([] if params is None else check_zeros(self.masks, params, "asni"))


def asni(
    schedule: ArrayLike | optax.Schedule,
    update_every: ArrayLike,
    *,
    exact: bool = False,
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ASNI-I: global magnitude pruning on a schedule (Damadi et al., 2022). A link: last in the chain.

    Stage t = 0, 1, ... ends after (t + 1) ``update_every`` steps. Of the n weights that are then left in all prunable
    leaves together, those of smallest magnitude go, in whatever layer they are:

    .. math:: \lfloor n \, q_t \rfloor, \qquad q_t = \frac{s_t - s_{t-1}}{1 - s_{t-1}}, \quad s_{-1} = 0

    which brings the share of zeros to about s, the schedule. Where q is at most 0.001 nothing goes, and these weights
    are not made up for later: the author's code does so, and ends a little below s. What is pruned stays pruned.
    Counts are exact, ties included (the lowest indices stay), and s is computed in double precision.

    Pruning happens on the first step of the next stage, from the params as they come in: who evaluates at the end of a
    stage sees the network as it was trained, and nothing is pruned after the last. So N stages of training end at
    :math:`s_{N-2}`, as in the author's tables.

    Args:
      schedule: stage (an int32) -> fraction of zeros, such as :func:`jaxsparse.sigmoid_sparsity`; values are clipped to
        [0, 1]. A number prunes once, after the first stage.
      update_every: steps of a stage, int >= 1; the author has one epoch.
      exact: leave out q: let n times :math:`1 - s_t` weights be left (of all n, rounded), and skip nothing. For short
        stages, each of which would fall under the 0.001.
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer. 0, as published: nothing stops
        a layer from being emptied, which :func:`jaxsparse.check` then says.
      structure: what goes as one, see :mod:`jaxsparse.structures`: "weight", "kernel", "channel",
        :func:`jaxsparse.block`, :func:`jaxsparse.n_of_m`, or a mapping from path to these. Units of all leaves rank
        together by their scores, and stay from the largest down as long as they fit into the number of weights that the
        schedule leaves: it is never exceeded, and what is short of it by less than a unit is made up for by the next
        stage. With ``n_of_m`` the n largest of every group always stay, the rest rank as single weights: a network that
        has 2:4 everywhere ends at exactly that if the schedule ends at 0.5 (or above).
      prunable: which leaves get masks, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`ASNIState`: one byte a weight of sparse leaves. Its ``update``
      needs the params.

    Raises:
      ValueError: for numbers out of range, a structure that does not fit a leaf and says "error" to that, params with
        a replica axis, 2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
      >>> tx = optax.chain(optax.sgd(0.0), asni(0.75, update_every=1))
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):  # nothing goes on the first step, which is the whole first stage
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["kernel"].tolist()
      [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 7.0, 8.0]]

    References:
      Damadi, Nouri and Pirsiavash, `Amenable Sparse Network Investigator <https://arxiv.org/abs/2202.09284>`_, 2022.

    .. warning::
      In ``optax.inject_hyperparams`` name the schedule as static (``static_args="schedule"``): it counts stages, and
      would be called with steps.
    """
    check_steps("update_every", update_every, 1)
    if not callable(schedule):
        check_range("schedule", schedule, 0, 1)
    check_steps("at_least", at_least, 0)
    check_structure(structure)

    def init_fn(params):
        refuse_replicated(params, "asni")
        chosen = prunable_leaves(params, prunable, layout=layout)
        leaf_structures(structure, params, chosen, layout=layout)  # warns of what does not fit, once
        masks = jax.tree.map(lambda p, c: jnp.ones_like(p, bool) if c else jnp.ones((), bool), params, chosen)
        masks = validate_masks(masks, params)
        total = sum(mask.size for mask in jax.tree.leaves(masks))
        check_total([total])
        kept, nan_scores = varying_like((jnp.int32(total), jnp.zeros([], jnp.int32)), params)
        return ASNIState(jnp.zeros([], jnp.int32), masks, kept, nan_scores)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "asni")
        require_bool(state.masks, "asni")

        def pruned(old):
            masks, kept, nan_scores = old
            flat, treedef = jax.tree.flatten(masks)
            weights = _masked_leaves(params, masks)
            units = jax.tree.leaves(mask_structures(structure, params, masks, layout=layout, quiet=True))
            total = sum(mask.size for mask in flat)
            stage = state.count // update_every - 1
            if all(isinstance(unit, weight) for unit in units):
                kept = _left(schedule, stage, kept, total, exact)
                kept = jnp.maximum(kept, sum(jnp.minimum(at_least, mask.size) for mask in flat))
                new = global_top_k_masks(weights, kept, where=flat, absolute=True, at_least=at_least) if flat else flat
            else:  # what is left is counted from the start, since the masks may keep less
                left = jax.lax.fori_loop(
                    0, stage + 1, lambda t, n: _left(schedule, t, n, total, exact), jnp.int32(total)
                )
                new, kept = _largest(weights, flat, units, left, at_least)
            nan_scores += sum(count_true(jnp.isnan(w) & m) for w, m in zip(weights, flat, strict=True))
            return treedef.unflatten(new), kept, nan_scores

        due = (state.count > 0) & (state.count % update_every == 0)
        masks, kept, nan_scores = on_update_steps(due, pruned, (state.masks, state.kept, state.nan_scores))
        new_state = ASNIState(optax.safe_increment(state.count), masks, kept, nan_scores)
        return land_on_masks(updates, params, masks), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def asni_counts(schedule: ArrayLike | optax.Schedule, weights: int, stages: int, *, exact: bool = False) -> list[int]:
    """How many of its prunable weights a network has left after the pruning that follows each stage of :func:`asni`.

    Args:
      schedule: stage -> fraction of zeros, or a number.
      weights: the number of prunable weights, below 2**31.
      stages: how many stages, at least 0.
      exact: as for :func:`asni`. (With a ``structure``, these are what is left at most.)

    Examples:
      >>> import jaxsparse
      >>> schedule = jaxsparse.sigmoid_sparsity(0.98, stages=50, scale=5)
      >>> asni_counts(schedule, 266_200, 50)[-2:]  # LeNet-300-100 after 49 stages, and after 50
      [7925, 7458]
    """
    check_total([weights])
    left = jax.jit(lambda stage, kept: _left(schedule, stage, kept, weights, exact))
    counts, kept = [], jnp.int32(weights)
    for stage in range(stages):
        kept = left(jnp.int32(stage), kept)
        counts.append(int(kept))
    return counts


def centroids(params: Any, masks: Any, *, biases: bool = False) -> dict[str, tuple[jax.Array, jax.Array]]:
    r"""The two numbers of each layer: the means of its negative and of its positive weights that are not pruned.

    .. math:: c^-_l = \mathrm{mean} \{ w \in W_l : w < 0 \}, \qquad c^+_l = \mathrm{mean} \{ w \in W_l : w > 0 \}

    (Damadi et al., 2022: the points about which the weights of a trained sparse layer concentrate.)

    Args:
      params: the trained params.
      masks: like ``params``: bool arrays, the scalar True for dense leaves; as :func:`jaxsparse.get_masks` gives them.
      biases: those of the biases of the layers too, for :func:`amenable_init` to keep two numbers of each.

    Returns:
      path -> (negative, positive), float32 scalars, of every leaf that has a mask or that
      :func:`jaxsparse.prunable.prunable_leaves` would choose. 0 where a layer has no weights of that sign.

    Raises:
      ValueError: for masks that do not fit, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 3.0], [-5.0, 9.0]])}
      >>> masks = {"kernel": jnp.array([[True, True], [True, False]])}
      >>> {path: tuple(map(float, pair)) for path, pair in centroids(params, masks).items()}
      {'kernel': (-5.0, 2.0)}
    """
    wanted = ("kernel", "bias") if biases else ("kernel",)
    return {leaf.path: leaf.centroids() for leaf in _leaves(params, masks) if leaf.role in wanted}


def amenable_init(params: Any, masks: Any, centroids: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Any:
    """The initialisation of ASNI-II: every weight is the number of its layer and sign.

    Masks and signs are those of the trained network. Biases become 0 and the scales of normalisations 1, so the whole
    network is its masks, one bit a weight for the sign, and two numbers a layer. Where ``centroids`` has biases, these
    keep two numbers of theirs too, and those of normalisations stay as they are (the author's ``quantize_bias``).

    Args:
      params: the trained params, whose signs count.
      masks: like ``params``: bool arrays, the scalar True for dense leaves.
      centroids: path -> (negative, positive), as :func:`centroids` gives them.

    Returns:
      A pytree like ``params``, with the same dtypes. Weights whose sign has no number (0) stay as they are, and so do
      leaves that are none of kernel, bias or scale (by name, or 1-D beside a scale).

    Raises:
      ValueError: for masks that do not fit, and for centroids of leaves that the params lack, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 3.0], [-5.0, 9.0]]), "bias": jnp.array([0.5, 0.1])}
      >>> masks = {"kernel": jnp.array([[True, True], [True, False]]), "bias": jnp.array(True)}
      >>> start = amenable_init(params, masks, centroids(params, masks))
      >>> start["kernel"].tolist(), start["bias"].tolist()
      ([[2.0, 2.0], [-5.0, 0.0]], [0.0, 0.0])
    """
    if unknown := sorted(set(centroids) - set(leaf_paths(params))):
        raise ValueError(f"there are centroids of {', '.join(unknown)}, which the params lack")
    leaves = _leaves(params, masks)
    quantised_biases = any(leaf.role == "bias" and leaf.path in centroids for leaf in leaves)

    def start(leaf):
        if leaf.path in centroids:
            return leaf.quantised(*centroids[leaf.path])
        if leaf.role == "scale":
            return jnp.ones_like(leaf.value)
        if leaf.role == "bias" or (leaf.role == "normalisation bias" and not quantised_biases):
            return jnp.zeros_like(leaf.value)
        return leaf.value

    return jax.tree.structure(params).unflatten([start(leaf) for leaf in leaves])


class _Leaf(NamedTuple):
    path: str
    value: jax.Array
    alive: jax.Array  # bool, the shape of the value
    role: str  # "kernel", "bias", "scale", "normalisation bias" or ""

    def centroids(self) -> tuple[jax.Array, jax.Array]:
        value = self.value.astype(jnp.float32)
        negative, positive = self.alive & (value < 0), self.alive & (value > 0)
        counts = [jnp.maximum(count_true(w), 1).astype(jnp.float32) for w in (negative, positive)]
        return jnp.sum(value, where=negative) / counts[0], jnp.sum(value, where=positive) / counts[1]

    def quantised(self, negative: ArrayLike, positive: ArrayLike) -> jax.Array:
        value, negative, positive = self.value, *(jnp.asarray(c, self.value.dtype) for c in (negative, positive))
        new = jnp.where((value < 0) & (negative != 0), negative, value)
        new = jnp.where((value > 0) & (positive != 0), positive, new)
        return jnp.where(self.alive, new, jnp.zeros_like(new))


def _leaves(params: Any, masks: Any) -> list[_Leaf]:
    """The leaves with their roles, by their names as Flax, Haiku and Equinox give them."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    checked = treedef.flatten_up_to(validate_masks(masks, params))
    parts = [path_name(path).rpartition("/") for path, _ in flat]
    scales = [name.endswith("scale") or (name == "weight" and jnp.ndim(leaf) == 1)
              for (_, leaf), (_, _, name) in zip(flat, parts, strict=True)]  # fmt: skip
    normalised = {layer for (layer, _, _), is_scale in zip(parts, scales, strict=True) if is_scale}
    matrices = default_choice(params)
    leaves = []
    for (path, value), mask, (layer, _, name), is_scale in zip(flat, checked, parts, scales, strict=True):
        if not is_masked_node(mask) or matrices[path_name(path)]:
            role = "kernel"
        elif is_scale:
            role = "scale"
        elif name.endswith(("bias", "offset")) or name == "b":
            role = "normalisation bias" if layer in normalised else "bias"
        else:
            role = ""
        alive = jnp.ones(jnp.shape(value), bool) if is_masked_node(mask) else jnp.asarray(mask)
        leaves.append(_Leaf(path_name(path), jnp.asarray(value), alive, role))
    return leaves


def _left(
    schedule: ArrayLike | optax.Schedule, stage: ArrayLike, kept: jax.Array, total: int, exact: bool
) -> jax.Array:
    """How many of the ``kept`` weights are left after a stage, int32."""
    # In double precision, whatever else the program has: 14.7 million weights (VGG-16) leave nothing for the rounding
    # of float32, and every device has to find the same number.
    with jax.enable_x64(True):
        stage = jnp.asarray(stage, jnp.int32)

        def zeros_after(t):
            value = schedule(t) if callable(schedule) else schedule
            return jnp.clip(jnp.asarray(value).astype(jnp.float64), 0, 1)

        now = zeros_after(stage)
        if exact:
            left = total - jnp.round(total * now)
        else:
            before = jnp.where(stage > 0, zeros_after(jnp.maximum(stage - 1, 0)), 0.0)
            of = kept.astype(jnp.float64)
            share = (now - before) / jnp.where(before < 1, 1 - before, 1.0)  # q
            left = of - jnp.where(share > _SMALLEST_SHARE, jnp.floor(of * share), 0.0)
        return jnp.minimum(left.astype(jnp.int32), kept)


def _largest(
    weights: list[jax.Array], masks: list[jax.Array], units: list[Structure], left: jax.Array, at_least: ArrayLike
) -> tuple[list[jax.Array], jax.Array]:
    """The masks of the largest units that ``left`` weights have room for, and how many weights these masks keep."""
    # What stays in any case, the n largest of every group, takes no part in the ranking.
    safe = [unit.top(w, where=mask, absolute=True) if isinstance(unit, n_of_m) else None
            for w, mask, unit in zip(weights, masks, units, strict=True)]  # fmt: skip
    where = [unit.units(mask) if fixed is None else mask & ~fixed
             for mask, unit, fixed in zip(masks, units, safe, strict=True)]  # fmt: skip
    sizes = [unit.unit_size(mask.shape) for mask, unit in zip(masks, units, strict=True)]
    scores = [unit_scores(unit, w) for w, unit in zip(weights, units, strict=True)]
    reserved = sum((count_true(fixed) for fixed in safe if fixed is not None), jnp.int32(0))
    left = jnp.maximum(left - reserved, 0)
    chosen = global_top_k_masks(scores, left, where=where, absolute=True, sizes=sizes, at_least=at_least)
    kept = reserved + sum(size * count_true(mask) for size, mask in zip(sizes, chosen, strict=True))
    new = [unit.expand(mask, w) if fixed is None else mask | fixed
           for unit, mask, w, fixed in zip(units, chosen, weights, safe, strict=True)]  # fmt: skip
    return new, kept


def _masked_leaves(params: Any, masks: Any) -> list[jax.Array]:
    """The leaves of the params that have masks."""
    leaves, treedef = jax.tree.flatten(params)
    flat = zip(leaves, treedef.flatten_up_to(masks), strict=True)
    return [leaf for leaf, mask in flat if not is_masked_node(mask)]
