"""Magnitude pruning: remove the smallest weights, all at once or gradually while training.

Zhu and Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*, 2017
(https://arxiv.org/abs/1710.01878), prune every layer to the same sparsity. Lee et al., *Layer-adaptive Sparsity for the
Magnitude-based Pruning*, 2021 (https://arxiv.org/abs/2010.07611), score weights such that layers can be ranked together
and none is lost (https://github.com/jaeho-lee/layer-adaptive-sparsity at 94e53b1, ``tools/pruners.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.saliency import lamp_scores
from jaxsparse.structures import StructureLike, check_structure, unit_scores
from jaxsparse.transforms.checks import check_range, check_steps
from jaxsparse.transforms.layers import Layer, counts, each
from jaxsparse.transforms.mask_link import MaskState, dense_start, mask_link
from jaxsparse.transforms.prune import prune_globally, prune_layers
from jaxsparse.transforms.ranking import rank_globally

__all__ = ["MagnitudePruningState", "magnitude_pruning"]

Scope: TypeAlias = Literal["layer", "global", "lamp"]
# How far pruning has come, from 0 to 1, at a share x of its time: 1 - s_t / s_f of eq. (1) is (1 - x) ** 3.
_PROGRESS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "linear": lambda x: x,
    "constant": jnp.ones_like,
}


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
    scope: Scope = "layer",
    score: Literal["magnitude"] | Callable[[Any, Any], Any] = "magnitude",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prune by magnitude, at one step or gradually, by layer or globally (Zhu and Gupta, 2017).

    A link: last in the chain.

    On the steps t = begin, begin + every, ... and on step end, the weights of smallest magnitude go until a fraction
    :math:`s_t` of them is 0,

    .. math:: s_t = s_f \left(1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3\right) \qquad (1)

    with :math:`s_f` = ``sparsity``, :math:`t_0` = ``begin`` and :math:`t_1` = ``end``: eq. (1) of the paper with
    :math:`s_i = 0`. What is pruned stays pruned. Counts are exact, ties included (the lowest indices stay), and s is
    computed in double precision. Pruning happens before the update of its step, from the params as they come in.

    Args:
      sparsity: :math:`s_f`, the fraction of zeros at the end, in [0, 1]; or a schedule, step -> fraction, which is then
        read on the steps above, and ``schedule`` is not used.
      begin: the first step on which weights go, int >= 0.
      end: the last one, int >= begin, on which the sparsity is exactly :math:`s_f`. None: ``begin``, all at once; of a
        ``sparsity`` that is a schedule: there is no last one.
      every: steps between two prunings, int >= 1. (The authors' code has 100.)
      schedule: "cubic", eq. (1), "linear", or "constant": the number itself, for ``optax.inject_hyperparams``, which
        hands in another one on every step.
      scope: which weights are ranked together: those of each "layer", which all reach :math:`s_t`; "global", all,
        whatever their layer; or "lamp", all by :func:`lamp_scores`.
      score: "magnitude"; or a function of params and gradients to a tree like them, such as those of
        :mod:`jaxsparse.saliency`, of which the largest are kept. It is called with dicts from path to array, of the
        prunable leaves. A unit of several weights has the mean of their scores (of magnitudes, as its structure says).
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
      ValueError: for numbers out of range, unknown options, an ``end`` before ``begin``, a structure that does not fit
        a leaf and says "error" to that, params with a replica axis, 2**31 weights or more, missing params.

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
    if end is None and not callable(sparsity):
        end = begin
    if not callable(sparsity):
        check_range("sparsity", sparsity, 0, 1)
    for name, value, low in (("begin", begin, 0), ("end", end, 0), ("every", every, 1), ("at_least", at_least, 0)):
        check_steps(name, value, low)
    if end is not None and not any(isinstance(step, jax.core.Tracer) for step in (begin, end)) and end < begin:
        raise ValueError(f"end must be at least begin, {begin}, got {end}")
    for name, value, options in (("schedule", schedule, _PROGRESS), ("scope", scope, _SCOPES)):
        if value not in options:
            raise ValueError(f"{name} must be one of {list(options)}, got {value!r}")
    if score != "magnitude" and not callable(score):
        raise ValueError(f'score must be "magnitude" or a function of params and gradients, got {score!r}')
    check_structure(structure)

    def due(step):
        now = (step >= begin) & ((step - begin) % every == 0)
        return now if end is None else (now & (step <= end)) | (step == end)

    def change(layers, state):
        scores = None
        if callable(score):
            gradients = {layer.path: layer.signal for layer in layers}
            found = score({layer.path: layer.weight for layer in layers}, gradients)
            scores = [found[layer.path] for layer in layers]
        # In double precision, for float32 cannot tell all the weights of a large network.
        with jax.enable_x64(True):
            if callable(sparsity):
                zeros = jnp.asarray(sparsity(state.count), jnp.float64)
            else:
                first, last, now = (jnp.asarray(step, jnp.float64) for step in (begin, end, state.count))
                time = jnp.where(now >= last, 1.0, (now - first) / jnp.maximum(last - first, 1.0))  # (1)
                zeros = jnp.asarray(sparsity, jnp.float64) * _PROGRESS[schedule](time)
            zeros = jnp.clip(zeros, 0, 1)
            units = np.asarray([np.prod(layer.structure.unit_shape(layer.mask.shape)) for layer in layers], np.float64)
            of_layers = jnp.asarray(units - jnp.round(units * zeros), jnp.int32)
            total = sum(layer.size for layer in layers)
            of_all = jnp.asarray(total - jnp.round(total * zeros), jnp.int32)
        return *_SCOPES[scope](layers, of_layers, of_all, scores, at_least), None

    return mask_link(
        MagnitudePruningState,
        dense_start(structure, prunable, layout),
        change,
        when=due,
        signal=_gradients if callable(score) else None,
        structure=structure,
        layout=layout,
    )


def _gradients(updates: Any, own: Any, extra_args: Any) -> Any:
    del own
    return updates if extra_args.get("grad") is None else extra_args["grad"]


def _each_layer(layers, of_layers, of_all, scores, at_least):
    del of_all
    sizes = [np.prod(layer.structure.unit_shape(layer.mask.shape)) for layer in layers]
    fewest = jnp.minimum(jnp.asarray(at_least, jnp.int32), jnp.asarray(sizes, jnp.int32))
    return prune_layers(layers, jnp.maximum(of_layers, fewest), scores=scores)


def _together(layers, of_layers, of_all, scores, at_least):
    del of_layers
    return prune_globally(layers, of_all, scores=scores, at_least=at_least)


def _lamp(
    layers: Sequence[Layer], of_layers: Any, of_all: jax.Array, scores: Sequence[jax.Array] | None, at_least: ArrayLike
) -> tuple[Sequence[jax.Array], jax.Array]:
    """The scores say how many units each layer keeps, magnitude (or the method's score) which."""
    del of_layers
    values = [layer.weight for layer in layers] if scores is None else list(scores)

    def scored(layers, values):
        masks = [layer.structure.units(layer.mask) for layer in layers]
        units = [unit_scores(layer.structure, value) for layer, value in zip(layers, values, strict=True)]
        return [lamp_scores(unit, mask) for unit, mask in zip(units, masks, strict=True)], masks

    lamp, masks = each(layers, scored, values)
    sizes = [layer.structure.unit_size(layer.mask.shape) for layer in layers]
    chosen = rank_globally(layers, lamp, of_all, where=masks, sizes=sizes, at_least=at_least)
    return prune_layers(layers, counts(layers, chosen), scores=scores)


_SCOPES = {"layer": _each_layer, "global": _together, "lamp": _lamp}
