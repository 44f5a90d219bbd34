"""The ``score=`` of links that prune: magnitudes, a function of params and gradients, or a tree of fixed scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.placement import copied, is_abstract, placed_like, sharding_of
from jaxsparse.selection import count_true
from jaxsparse.transforms.layers import Layer, each
from jaxsparse.trees import is_function, is_masked_node, leaf_paths, score_that_fits, scores_by_path
from jaxsparse.user_warnings import warn

__all__ = ["Scoring", "scoring"]


class Scoring(NamedTuple):
    """The scores of a link that prunes; the first two go to :func:`jaxsparse.transforms.mask_link` by these names.

    Attributes:
      signal: what the layers see as ``Layer.signal``: gradients for a function, the fixed scores of a tree.
      own: the fixed scores in the state; None if there are none.
      of: layers -> (the scores of each, None for magnitudes; how many of them are NaN besides the weights and signals,
        which the link counts itself).
    """

    signal: Callable[..., Any] | None
    own: Callable[[Any, Any], Any] | None
    of: Callable[[Sequence[Layer]], tuple[Sequence[jax.Array] | None, jax.Array]]


def scoring(score: Any) -> Scoring:
    """Resolves the option ``score`` of a link.

    Args:
      score: "magnitude"; a function of params and gradients, dicts from path to array of the prunable leaves, to scores
        of these; or a tree of scores like the params. The largest scores stay.

    Raises:
      ValueError: for anything else. When the link is made or its masks change: for scores that lack a prunable leaf,
        have another shape there or are no floats, naming it.
    """
    if isinstance(score, str) and score == "magnitude":
        return Scoring(None, None, lambda layers: (None, jnp.int32(0)))
    if is_function(score):
        return Scoring(_gradients, None, lambda layers: _computed(score, layers))
    if isinstance(score, str) or not jax.tree.leaves(score):
        raise ValueError(
            f'score must be "magnitude", a function of params and gradients, or a tree of scores, got {score!r}'
        )
    return Scoring(
        lambda updates, own, extra_args: own,
        lambda params, masks: _fixed(score, params, masks),
        lambda layers: ([layer.signal for layer in layers], jnp.int32(0)),
    )


def _gradients(updates: Any, own: Any, extra_args: Mapping[str, Any]) -> Any:
    del own
    if extra_args.get("grad") is None:
        warn(
            "the link's score= is a function, and no gradient is handed in for it: it takes what the link gets, which "
            "behind an optimizer is its update. Use jaxsparse.chain in place of optax.chain, or pass grad= to update",
        )
        return updates
    return extra_args["grad"]


def _computed(score: Callable[[Any, Any], Any], layers: Sequence[Layer]) -> tuple[Sequence[jax.Array], jax.Array]:
    gradients = {layer.path: layer.signal for layer in layers}
    found = score({layer.path: layer.weight for layer in layers}, gradients)
    if not isinstance(found, Mapping):
        raise ValueError(f"score must return scores by path, like the params that it gets, got {type(found).__name__}")
    scores = [score_that_fits(found, layer.path, layer.weight, "score") for layer in layers]

    def nans(layers, scores):
        strange = [jnp.isnan(score) & ~jnp.isnan(layer.weight) & ~jnp.isnan(layer.signal)
                   for layer, score in zip(layers, scores, strict=True)]  # fmt: skip
        return jnp.stack(list(map(count_true, strange))) if strange else jnp.zeros(0, jnp.int32)

    return scores, jnp.sum(each(layers, nans, scores), dtype=jnp.int32)


def _fixed(score: Any, params: Any, masks: Any) -> Any:
    """The scores of the leaves with masks, copied, for the state may be donated, and placed as the params are."""
    given = scores_by_path(score, params, "score")
    leaves, treedef = jax.tree.flatten(params)
    own = []
    for path, leaf, mask in zip(leaf_paths(params), leaves, treedef.flatten_up_to(masks), strict=True):
        if is_masked_node(mask):
            own.append(mask)
            continue
        value = copied(score_that_fits(given, path, leaf, "score"))
        if isinstance(leaf, jax.core.Tracer) or isinstance(value, jax.core.Tracer):
            value = placed_like(value, leaf)
        elif not is_abstract(leaf) and sharding_of(leaf) is not None:
            value = jax.device_put(value, sharding_of(leaf))
        own.append(value)
    return treedef.unflatten(own)
