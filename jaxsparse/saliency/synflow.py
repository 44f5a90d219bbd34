"""SynFlow: scores by the flow of ones through a network of positive weights, and the masks that they lead to in rounds.

Tanaka, Kunin, Yamins and Ganguli, *Pruning neural networks without any data by iteratively conserving synaptic flow*,
2020 (https://arxiv.org/abs/2006.05467). The authors' code is followed (https://github.com/ganguli-lab/Synaptic-Flow at
9dfa57a, ``Pruners/pruners.py`` and ``prune.py``).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.allocation import check_sparsity
from jaxsparse.layouts import LayoutLike
from jaxsparse.masks import apply_masks, validate_masks, warn_of_empty
from jaxsparse.placement import mask_like
from jaxsparse.saliency.floats import Floats, wide
from jaxsparse.selection import count_true
from jaxsparse.structures import StructureLike, mask_structures
from jaxsparse.transforms.layers import layers_of
from jaxsparse.transforms.mask_link import dense_start
from jaxsparse.transforms.prune import prune_globally
from jaxsparse.trees import by_path, is_masked_node, leaf_paths, listed
from jaxsparse.user_warnings import warn

__all__ = ["synflow", "synflow_masks"]


def synflow(apply: Callable[[Any, Any], jax.Array], params: Any, inputs: Any) -> Any:
    r"""The synaptic flow through every weight: its share of what ones come to in a network of positive weights.

    .. math:: s_j = \left| \frac{\partial R}{\partial |\theta_j|} \right| |\theta_j|, \qquad
              R = \sum f_{|\theta|}(1, \dots, 1)

    where all weights, biases and gains are replaced by their absolute values, and R is the sum of all outputs. No data
    are used.

    Args:
      apply: (params, inputs) -> outputs, one array of floats. It computes as in inference, and what else it needs it
        has itself. Batch statistics take part in R with their absolute values too, as in the authors' code:
        ``lambda p, x: model.apply({"params": p, "batch_stats": jax.tree.map(jnp.abs, stats)}, x, train=False)``.
      params: the weights, a pytree of arrays.
      inputs: an array of floats, or a ``jax.ShapeDtypeStruct``, or a tree of these: ones of its shape go in. One
        example is enough, for a batch of B multiplies all scores by B. (A model of tokens starts from embeddings here.)

    Returns:
      A tree like ``params``: floats >= 0, float64 for float64 weights, else float32; 0 for leaves that are no floats.

    Raises:
      ValueError: for inputs that are no floats, outputs that are not one array of floats, and for scores that are not
        finite: R grows with every layer, and beyond float32 in deep ones. (Under ``jit`` nothing is known of that.)

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": jnp.array([[1.0, -2.0]]), "fc2": jnp.array([[3.0], [-0.5]])}
      >>> scores = synflow(lambda params, x: x @ params["fc1"] @ params["fc2"], params, jnp.ones((1, 1)))
      >>> scores["fc1"].tolist(), scores["fc2"].tolist()  # every layer has the same sum
      ([[3.0, 1.0]], [[3.0], [1.0]])

    References:
      Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic flow
      <https://arxiv.org/abs/2006.05467>`_, 2020, Alg. 1.
    """
    floats = Floats.of(params)
    ones = _ones(inputs)
    _check_outputs(apply, params, ones)
    scores = _flow(apply, floats, ones)
    if not _traced(scores):
        _check_finite(dict(zip(floats.paths, (count_true(~jnp.isfinite(score)) for score in scores), strict=True)))
    return floats.scores(scores)


def synflow_masks(
    apply: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    sparsity: float,
    rounds: int = 100,
    *,
    at_least: ArrayLike = 0,
    prunable: Any = None,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
) -> Any:
    r"""Masks by synaptic flow in many rounds, so that no layer is lost (Tanaka et al., 2020).

    In round e = 1, ..., n the weights of largest :func:`synflow` among those that are left stay, ranked over the whole
    network, computed with all pruned weights at 0. They are a fraction

    .. math:: d^{e/n}, \qquad d = 1 - \text{sparsity}

    of the N prunable weights: :math:`N - \lfloor (1 - d^{e/n}) N \rfloor` of them, as in the authors' code. (So the
    last round may leave one weight more than :func:`jaxsparse.score_masks`, which rounds.) Counts are exact, ties
    included (the lowest indices stay). The params stay as they are: train them under :func:`jaxsparse.mask_updates`.

    Args:
      apply, params, inputs: as for :func:`synflow`.
      sparsity: the fraction of zeros among the prunable weights, in [0, 1), a Python number.
      rounds: n, int >= 1. In one round, layers may be lost.
      at_least, prunable, layout: as for :func:`jaxsparse.random_masks`.
      structure: as for these too, except for n of m. Units of several weights rank by the mean (or the sum) of their
        scores.

    Returns:
      A pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Raises:
      ValueError: as :func:`synflow`, and for numbers out of range.

    Warns:
      UserWarning: for leaves through which nothing flows, which are pruned first, and for those that keep nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": jnp.array([[1.0, -2.0], [0.1, 0.2]]), "fc2": jnp.array([[3.0], [-0.5]])}
      >>> masks = synflow_masks(lambda params, x: x @ params["fc1"] @ params["fc2"], params, jnp.ones((1, 2)), 0.5)
      >>> masks["fc1"].tolist(), masks["fc2"].tolist()
      ([[True, True], [False, False]], [[True], [False]])

    .. note::
      Each round is one gradient on one example. It is compiled once; inside of ``jit`` all rounds are one loop.
    """
    check_sparsity(sparsity)
    if isinstance(sparsity, jax.core.Tracer):
        raise ValueError("sparsity of synflow_masks decides counts and must be a Python number, got a traced value")
    if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or rounds < 1:
        raise ValueError(f"rounds must be an int of at least 1, got {rounds!r}")
    ones = _ones(inputs)
    _check_outputs(apply, params, ones)
    start = validate_masks(dense_start(structure, prunable, layout)(params, None), params)
    for path, unit in by_path(mask_structures(structure, params, start, layout=layout, quiet=True)).items():
        if not unit.exchanges:
            raise ValueError(
                f"synflow_masks ranks the units of all leaves together, and {unit} of {path} has as many in every "
                "group: score_masks takes it, with the scores of synflow"
            )
    names, total = leaf_paths(start), sum(mask.size for mask in jax.tree.leaves(start))
    lefts = np.asarray([_left(float(sparsity), e / rounds, total) for e in range(1, rounds + 1)], np.int32)

    def one_round(params, masks, left):
        floats = Floats.of(apply_masks(params, masks))
        scores = by_path(floats.scores(_flow(apply, floats, ones)))
        mine = [scores[name] for name in names]
        new, _ = prune_globally(
            layers_of(params, None, masks, structure=structure, layout=layout), left, scores=mine, at_least=at_least
        )
        infinite = jnp.stack([count_true(~jnp.isfinite(score)) for score in mine])
        flows = jnp.stack([jnp.any(score > 0) for score in mine])
        return jax.tree.structure(masks).unflatten(list(new)), (infinite, flows)

    seen: list[Any] = []
    if _traced(params):
        masks, _ = jax.lax.scan(lambda masks, left: one_round(params, masks, left), start, jnp.asarray(lefts))
    else:  # XLA is slow at convolutions in a loop on a CPU
        masks, compiled = start, jax.jit(one_round)
        for left in lefts:
            masks, found = compiled(params, masks, left)
            seen.append(found)
    if not _traced(masks):
        infinite, flows = (np.stack(column) for column in zip(*jax.device_get(seen), strict=True))
        _check_finite(dict(zip(names, infinite.max(axis=0), strict=True)))
        if dead := [name for name, flow in zip(names, flows[0], strict=True) if not flow]:
            warn(
                f"nothing flows through {listed(dead)}, so their scores are all 0 and they are pruned first: they, or "
                "gains behind them, start at 0, or their flow is too small for the dtype",
            )
    leaves, treedef = jax.tree.flatten(params)
    kept = {}
    for name, leaf, mask in zip(leaf_paths(params), leaves, treedef.flatten_up_to(masks), strict=True):
        kept[name] = jnp.ones((), bool) if is_masked_node(mask) else mask_like(mask, leaf)
    warn_of_empty({name: kept[name] for name in names})
    return treedef.unflatten(list(kept.values()))


def _flow(apply: Callable[[Any, Any], jax.Array], floats: Floats, ones: Any) -> list[jax.Array]:
    """The scores of the floating-point leaves, in at least 32 bits."""
    absolute = [jnp.abs(leaf) for leaf in floats.leaves]
    gradients = jax.grad(lambda leaves: jnp.sum(wide(apply(floats.whole(leaves), ones))))(absolute)
    return [jnp.abs(wide(g) * wide(w)) for g, w in zip(gradients, absolute, strict=True)]


def _left(sparsity: float, time: float, total: int) -> int:
    """How many weights are left at a time from 0 to 1, as in the authors' code."""
    zeros = sparsity if time == 1 else 1 - (1 - sparsity) ** time
    return total - math.floor(round(zeros * total, 6))  # rounded, for 0.29 * 100 is a little less than 29


def _ones(inputs: Any) -> Any:
    def ones(x):
        shape, dtype = jnp.shape(x), getattr(x, "dtype", jnp.result_type(float))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"synflow puts ones into the network, which mean something as floats, got inputs of dtype {dtype} and "
                f"shape {shape}. Of a model of tokens, give an apply that starts from what their embeddings become"
            )
        return jnp.ones(shape, dtype)

    return jax.tree.map(ones, inputs)


def _check_outputs(apply: Callable[[Any, Any], jax.Array], params: Any, ones: Any) -> None:
    found = jax.eval_shape(apply, params, ones)
    if not isinstance(found, jax.ShapeDtypeStruct) or not jnp.issubdtype(found.dtype, jnp.floating):
        came = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", found)
        raise ValueError(
            f"apply must return one array of floats, whose sum is the flow through the network, got {came}"
        )


def _check_finite(infinite: dict[str, Any]) -> None:
    if bad := {path: int(count) for path, count in infinite.items() if count}:
        raise ValueError(
            f"synflow: scores of {listed(list(bad))} are not finite: the flow grows with every layer, and overflows. "
            "Compute it in float64: with jax.enable_x64(True), of params in float64, by a model that does not cast them"
        )


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
