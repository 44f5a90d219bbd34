"""Magnitude pruning: remove the smallest weights, all at once or gradually while training.

Zhu and Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*, 2017
(https://arxiv.org/abs/1710.01878), prune every layer to the same sparsity. Lee et al., *Layer-adaptive Sparsity for the
Magnitude-based Pruning*, 2021 (https://arxiv.org/abs/2010.07611), score weights such that layers can be ranked together
and none is lost (https://github.com/jaeho-lee/layer-adaptive-sparsity at 94e53b1, ``tools/pruners.py``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.reductions import count_true
from jaxsparse.saliency import lamp_scores
from jaxsparse.structures import StructureLike, check_structure, unit_scores, weight
from jaxsparse.transforms.checks import check_range, check_schedule, check_steps, whole_steps
from jaxsparse.transforms.layers import Layer, as_layers, counts, each
from jaxsparse.transforms.mask_link import MaskState, dense_start, mask_link
from jaxsparse.transforms.prune import counts_at, prune_globally, prune_layers, prune_outputs
from jaxsparse.transforms.ranking import rank_globally
from jaxsparse.transforms.scoring import scoring
from jaxsparse.user_warnings import warn

__all__ = ["MagnitudePruningState", "magnitude_pruning"]

Scope: TypeAlias = Literal["layer", "global", "lamp", "output"]
_POWERS = {"cubic": 3, "linear": 1, "constant": 0}  # the exponents of eq. (1)


class MagnitudePruningState(MaskState):
    """State of :func:`magnitude_pruning`."""

    method = "magnitude_pruning"


def magnitude_pruning(
    sparsity: ArrayLike | optax.Schedule,
    *,
    begin: ArrayLike = 0,
    end: ArrayLike | None = None,
    every: ArrayLike = 100,
    schedule: Literal["cubic", "linear", "constant"] = "cubic",
    initial: ArrayLike = 0,
    power: ArrayLike | None = None,
    scope: Scope = "layer",
    score: Literal["magnitude"] | Callable[[Any, Any], Any] | Any = "magnitude",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prune by magnitude, at one step or gradually, by layer or globally (Zhu and Gupta, 2017).

    A link: last in the chain.

    On the steps t = begin, begin + every, ... and on step end, the weights of smallest magnitude go until a fraction
    :math:`s_t` of them is 0,

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3 \qquad (1)

    with :math:`s_f` = ``sparsity``, :math:`s_i` = ``initial``, :math:`t_0` = ``begin`` and :math:`t_1` = ``end``. What
    is pruned stays pruned. Counts are exact, ties included (the lowest indices stay), and s is
    computed in double precision. Pruning happens before the update of its step, from the params as they come in.

    Args:
      sparsity: :math:`s_f`, the fraction of zeros at the end, in [0, 1]; or a schedule, step -> fraction, which is then
        read on the steps above, and ``schedule`` is not used.
      begin: the first step on which weights go, int >= 0.
      end: the last one, int >= begin, on which the sparsity is exactly :math:`s_f`. None: ``begin``, all at once; there
        is no last one with ``schedule="constant"``, or with a ``sparsity`` that is a schedule.
      every: steps between two prunings, int >= 1. (The authors' code has 100.)
      schedule: "cubic", eq. (1), "linear", or "constant": the number itself, for ``optax.inject_hyperparams``, which
        hands in another one on every step.
      initial: :math:`s_i`, in [0, 1], at most ``sparsity``: what goes on step ``begin``.
      power: the exponent of eq. (1) in the place of 3, above 0; None: as ``schedule`` says.
      scope: which weights are ranked together: those of each "layer" (a stack of layers counts as one), which all reach
        :math:`s_t`; "global", all, whatever their layer; "lamp", all by :func:`lamp_scores`; or those of each "output",
        so that all outputs of a layer keep equally many (:math:`s_t`, rounded), as Wanda does: for single weights.
      score: of which the largest stay. "magnitude"; or a function of params and gradients to scores of these, such as
        those of :mod:`jaxsparse.saliency`, which is called with dicts from path to array, of the prunable leaves; or a
        tree like the params with fixed scores, such as those of :func:`jaxsparse.saliency.snip` before training, which
        the state then holds (four bytes a weight). A unit of several weights has the mean of their scores (of
        magnitudes, as its structure says). Scores by gradients need :func:`jaxsparse.chain`, or ``grad=`` in
        ``update``: in ``optax.chain`` a link is given the updates of the optimizer before it, and takes these.
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer.
      structure: what goes as one, see :mod:`jaxsparse.structures`. With ``n_of_m``, the n largest of every group always
        stay.
      prunable: which leaves get masks, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`MagnitudePruningState`: one byte a weight of sparse leaves. Its
      ``update`` needs the params.

    Raises:
      ValueError: for numbers out of range, unknown options, an ``end`` before ``begin``, scores that do not fit a leaf
        (which is named), a structure that does not fit a leaf and says "error" to that, params with a replica axis,
        2**31 weights or more, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
      >>> tx = optax.chain(optax.sgd(0.0), jaxsparse.magnitude_pruning(0.75, begin=1, end=3, every=1))
      >>> opt_state = tx.init(params)
      >>> kept = []
      >>> for _ in range(4):
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     kept.append(int(jaxsparse.count(jaxsparse.get_masks(opt_state))))
      >>> kept
      [8, 8, 3, 2]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017; Lee et al., `Layer-adaptive
      Sparsity for the Magnitude-based Pruning <https://arxiv.org/abs/2010.07611>`_, 2021.

    .. warning::
      "lamp" sorts each layer where weights go; on sharded leaves a sort gathers them.
    """
    once = end is None and not callable(sparsity) and schedule != "constant"
    end = begin if once else end
    begin, end, every = whole_steps("begin", begin, 0), whole_steps("end", end, 0), whole_steps("every", every, 1)
    check_steps("at_least", at_least, 0)
    if isinstance(sparsity, jax.core.Tracer) and once:
        warn(
            "sparsity is a traced number, such as optax.inject_hyperparams hands in, and weights go once, on step "
            "begin. If it comes from a schedule, add schedule='constant', or keep it a schedule by "
            "static_args=('sparsity',). If once is meant, add end=begin"
        )
    check_schedule("sparsity", sparsity, steps=[begin if end is None else end])
    if end is not None and not any(isinstance(step, jax.core.Tracer) for step in (begin, end)) and end < begin:
        raise ValueError(f"end must be at least begin, {begin}, got {end}")
    for name, value, options in (("schedule", schedule, _POWERS), ("scope", scope, _SCOPES)):
        if value not in options:
            raise ValueError(f"{name} must be one of {list(options)}, got {value!r}")
    _check_shape(sparsity, schedule, initial, power)
    check_structure(structure)
    given = structure.values() if isinstance(structure, Mapping) else [structure]
    if scope == "output" and not all(unit == "weight" or isinstance(unit, weight) for unit in given):
        raise ValueError(f"scope='output' ranks single weights, got structure={structure!r}")
    scores = scoring(score)

    def due(step):
        now = (step >= begin) & ((step - begin) % every == 0)
        return now if end is None else (now & (step <= end)) | (step == end)

    def change(layers, state):
        values, nans = scores.of(layers)
        # In double precision, for float32 cannot tell all the weights of a large network.
        with jax.enable_x64(True):
            if callable(sparsity):
                zeros = jnp.nan_to_num(jnp.asarray(sparsity(state.count), jnp.float64), nan=0.0)  # prunes nothing
            else:
                start, zeros = (jnp.asarray(value, jnp.float64) for value in (initial, sparsity))
                if schedule != "constant":
                    first, last, now = (jnp.asarray(step, jnp.float64) for step in (begin, end, state.count))
                    time = jnp.where(now >= last, 1.0, (now - first) / jnp.maximum(last - first, 1.0))
                    exponent = jnp.asarray(_POWERS[schedule] if power is None else power, jnp.float64)
                    zeros = zeros + (start - zeros) * (1 - time) ** exponent  # (1)
            of_layers, of_all = counts_at(layers, jnp.clip(zeros, 0, 1))
        return *_SCOPES[scope](layers, of_layers, of_all, values, at_least), None, nans

    return mask_link(
        MagnitudePruningState,
        dense_start(structure, prunable, layout),
        change,
        when=due,
        signal=scores.signal,
        own=scores.own,
        structure=structure,
        layout=layout,
    )


def _check_shape(sparsity: Any, schedule: str, initial: Any, power: Any) -> None:
    """Raises a ValueError for a first sparsity or an exponent that are out of range, or have no effect."""
    check_range("initial", initial, 0, 1)
    check_range("power", power, 0)
    known = not any(isinstance(value, jax.core.Tracer) for value in (sparsity, initial, power))
    if known and power is not None and power == 0:
        raise ValueError("power must be above 0, got 0")
    by_itself = callable(sparsity) or schedule == "constant"
    if by_itself and (power is not None or (known and initial)):
        raise ValueError("initial and power belong to eq. (1), and there is a schedule in its place")
    if known and not by_itself and initial > sparsity:
        raise ValueError(f"initial must be at most sparsity, {sparsity}, got {initial}")


def _each_layer(layers, of_layers, of_all, scores, at_least):
    del of_all
    sizes = [np.prod(layer.structure.unit_shape(layer.mask.shape)) for layer in layers]
    fewest = jnp.minimum(jnp.asarray(at_least, jnp.int32), jnp.asarray(sizes, jnp.int32))
    return prune_layers(layers, jnp.maximum(of_layers, fewest), scores=scores)


def _each_output(layers, of_layers, of_all, scores, at_least):
    del of_all
    return prune_outputs(layers, of_layers, scores=scores, at_least=at_least)


def _together(layers, of_layers, of_all, scores, at_least):
    del of_layers
    return prune_globally(layers, of_all, scores=scores, at_least=at_least)


def _lamp(
    layers: Sequence[Layer], of_layers: Any, of_all: jax.Array, scores: Sequence[jax.Array] | None, at_least: ArrayLike
) -> tuple[Sequence[jax.Array], jax.Array]:
    """The scores say how many units each layer keeps, magnitude (or the method's score) which.

    Layers that keep n of every m do not compete; what they keep is part of the number of all.
    """
    del of_layers
    layers = as_layers(layers)
    values = layers.column([layer.weight for layer in layers] if scores is None else scores)
    free = [i for i, layer in enumerate(layers) if layer.structure.exchanges]
    some = layers if len(free) == len(layers) else layers.some(free)
    if some is not layers:
        fixed = [i for i in range(len(layers)) if i not in free]

        def reserved(layers, values):
            rows = zip(layers, values, strict=True)
            kept = [layer.structure.reserved(value, layer.mask, absolute=scores is None) for layer, value in rows]
            return jnp.stack(list(map(count_true, kept)))

        taken = each(layers.some(fixed), reserved, values.some(fixed))
        of_all, values = jnp.maximum(of_all - jnp.sum(taken, dtype=jnp.int32), 0), values.some(free)

    def scored(layers, values):
        masks = [layer.structure.units(layer.mask) for layer in layers]
        units = [unit_scores(layer.structure, value) for layer, value in zip(layers, values, strict=True)]
        return [lamp_scores(unit, mask) for unit, mask in zip(units, masks, strict=True)], masks

    lamp, masks = each(some, scored, values)
    sizes = [layer.structure.unit_size(layer.mask.shape) for layer in some]
    chosen = rank_globally(some, lamp, of_all, where=masks, sizes=sizes, at_least=at_least)
    left = counts(some, chosen)
    if some is not layers:
        left = jnp.zeros(len(layers), jnp.int32).at[np.asarray(free)].set(left)
    return prune_layers(layers, left, scores=scores)


_SCOPES = {"layer": _each_layer, "global": _together, "lamp": _lamp, "output": _each_output}
