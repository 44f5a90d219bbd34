"""Constant fan-in: layers in which every output that is not ablated has the same number of inputs.

A layer has a budget of weights, which its outputs share equally; each layer of a stack has its own. Arrays of budgets
have the rank of their leaf and length 1 along all axes but those of a stack. So have those that show its outputs, with
length 1 along inputs alone: what cuts a leaf along some axis can cut them too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.allocation import Allocation, Sparsity, layer_counts
from jaxsparse.layouts import Layout, warn_of_guesses
from jaxsparse.placement import mask_like, sharding_of
from jaxsparse.selection import count_true, random_scores, top_k_mask
from jaxsparse.trees import by_path, leaf_paths, matching, natural_order
from jaxsparse.user_warnings import warn

__all__ = [
    "check_masks", "counted", "fan_in_budgets", "last_layers", "layouts_with_outputs", "less", "outputs_of",
    "random_fan_in", "uneven",
]  # fmt: skip


def fan_in_budgets(
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    sparsity: Sparsity,
    allocation: Allocation,
    partial: bool,
) -> dict[str, jax.Array]:
    """The number of weights that each layer may keep: an array of int32, by path.

    Raises:
      ValueError: for a layer that may keep fewer weights than it has outputs, unless the sparsity is traced.
    """
    with jax.ensure_compile_time_eval():  # also where ``init`` is jitted
        kept = layer_counts(dict(leaves), sparsity, allocation, layouts=layouts, partial=partial)
        budgets = {}
        for i, (path, leaf) in enumerate(leaves.items()):
            shape = _shape_along(leaf.shape, layouts[path].stack)
            budgets[path] = jnp.full(shape, kept[i] // int(np.prod(shape)), jnp.int32)
        for path, n in budgets.items():
            _check_budget(path, n, leaves[path], layouts[path])
        # Of a traced sparsity, that one input of each output stays is better than an output without any.
        return {path: jnp.maximum(n, _outputs(leaves[path], layouts[path])) for path, n in budgets.items()}


def check_masks(masks: Any, layouts: Mapping[str, Layout]) -> None:
    """Raises a ValueError for masks without a constant fan-in, or with fewer weights than outputs; traced ones pass.

    Args:
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves.
      layouts: of the leaves with masks, by path.
    """
    leaves = by_path(masks)
    budgets = [np.ones(_shape_along(mask.shape, layouts[path].stack)) for path, mask in leaves.items()]
    outputs = [np.ones(_shape_along(mask.shape, _all_outputs(layouts[path]))) for path, mask in leaves.items()]
    treedef = jax.tree.structure(masks)
    for sentence in uneven(masks, treedef.unflatten(budgets), treedef.unflatten(outputs)):
        raise ValueError(f"masks: {sentence}")
    with jax.ensure_compile_time_eval():
        for path, mask in leaves.items():
            _check_budget(path, counted(jnp.asarray(mask), layouts[path]), mask, layouts[path])


def random_fan_in(
    leaves: Mapping[str, Any], layouts: Mapping[str, Layout], budgets: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
    """Masks that keep, for each output, a random choice of as many inputs as the budget allows for all of them."""
    masks = {}
    for i, (path, leaf) in enumerate(leaves.items()):
        at, scores = layouts[path], random_scores(jax.random.fold_in(key, i), leaf.shape, sharding_of(leaf))
        seen = at.to_matrices(scores)
        outputs = (*range(len(at.stack)), seen.ndim - 1)  # type: ignore[arg-type]
        fan_in = jnp.squeeze(at.to_matrices(budgets[path]) // seen.shape[-1], _others(outputs, seen.ndim))
        marked = top_k_mask(seen, fan_in, axis=outputs)
        masks[path] = mask_like(at.from_matrices(marked, scores), leaf)
    return masks


def counted(mask: jax.Array, at: Layout) -> jax.Array:
    """The budgets that a mask just meets."""
    return count_true(mask, _others(at.stack, mask.ndim))


def outputs_of(leaf: Any, at: Layout) -> jax.Array:
    """True for every output of a leaf, of the leaf's rank, with length 1 along its inputs."""
    return jnp.ones(_shape_along(leaf.shape, _all_outputs(at)), bool)


def less(own: Any, masks: Any, before: Any) -> Any:
    """Budgets of layers that have lost some of their weights: ``own``, with fewer in its field ``budgets``."""

    def of_layer(budget, mask, larger):
        axes = tuple(axis for axis, n in enumerate(budget.shape) if n == 1)
        kept, had = (jnp.sum(x, axis=axes, keepdims=True, dtype=budget.dtype) for x in (mask, larger))
        return budget - (had - kept)

    return own._replace(budgets=jax.tree.map(of_layer, own.budgets, masks, before))


def uneven(masks: Any, budgets: Any, outputs: Any) -> list[str]:
    """A sentence for each leaf with a layer whose outputs do not all keep equally many inputs, or none.

    Args:
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves; possibly with leading axes of replicas. Traced ones
        pass unseen.
      budgets: like ``masks``, of :func:`fan_in_budgets`; only the shapes count.
      outputs: like ``masks``, of :func:`outputs_of`; only the shapes count.
    """
    found = []
    rows = zip(leaf_paths(masks), *map(jax.tree.leaves, (masks, budgets, outputs)), strict=True)
    for path, mask, n, each in rows:
        if isinstance(mask, jax.core.Tracer) or not mask.size:
            continue
        kept = np.asarray(mask).sum(tuple(np.flatnonzero(np.equal(each.shape, 1))), keepdims=True)
        within = tuple(np.flatnonzero(np.equal(n.shape, 1)))
        most = kept.max(within, keepdims=True)
        fewest = np.where(kept, kept, most).min(within, keepdims=True)
        if (fewest < most).any():
            layer = np.argmax((fewest < most).reshape(-1))
            found.append(
                f"outputs of {path} keep {fewest.reshape(-1)[layer]} to {most.reshape(-1)[layer]} inputs, but all of a "
                "layer keep equally many, or none"
            )
    return found


def layouts_with_outputs(leaves: Mapping[str, Any], layouts: Mapping[str, Layout], who: str) -> dict[str, Layout]:
    """The layouts of leaves that all have inputs and outputs; warns of those that are a guess.

    Raises:
      ValueError: for a leaf that has none, such as a bias.
    """
    found = {path: layouts[path] for path in leaves}
    for path, at in found.items():
        if not at.is_matrix:
            raise ValueError(
                f"{who} gives every output its inputs, but {path} of shape {tuple(leaves[path].shape)} has none, or "
                "looks like a bias or gain: leave it out by prunable=, or say which axes are which, "
                f"layout={{{path!r}: jaxsparse.Layout(inputs, outputs)}}"
            )
    warn_of_guesses(found, who)
    return found


def last_layers(
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    patterns: str | Sequence[str] | None,
    partial: bool,
    tell: str = "",
) -> set[str]:
    """The paths of the leaves that are last layers, whose outputs are the network's own.

    Args:
      leaves, layouts: by path.
      patterns: of their paths (:func:`jaxsparse.trees.matching`). None guesses: the leaf with a number of outputs that
        no other has as inputs; of several such, or if there is none, the last by name.
      partial: there are more leaves than these: a pattern that matches none is no error.
      tell: warn of a guess, with these words before "the last layer"; "" to be silent, for a guess told before.

    Raises:
      ValueError: for a pattern that matches nothing.
    """
    if patterns is not None:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = matching(pattern, leaves)
            if not matched and not partial:
                raise ValueError(f"never_ablate: {pattern!r} matches none of {', '.join(leaves)}")
            found |= set(matched)
        return found
    widths = {path: layouts[path].matrix_shape(leaf.shape)[-2:] for path, leaf in leaves.items()}
    ends = [path for path, (_, outputs) in widths.items()
            if all(outputs != inputs for other, (inputs, _) in widths.items() if other != path)]  # fmt: skip
    last = sorted(ends or widths, key=natural_order)[-1:]
    if tell and last:
        why = "no other layer has as many inputs as it has outputs" if len(ends) == 1 else "it is the last by name"
        warn(
            f"{tell} the last layer, and takes {last[0]} for it, because {why}. If that is right, say "
            f"never_ablate={last[0]!r}; if not, the paths of the layers whose outputs all stay, or ()",
        )
    return set(last)


def _check_budget(path: str, n: jax.Array, leaf: Any, at: Layout) -> None:
    """Raises a ValueError for a layer with fewer weights than outputs; traced budgets pass."""
    outputs = _outputs(leaf, at)
    if isinstance(n, jax.core.Tracer) or int(n.min(initial=outputs)) >= outputs:
        return
    raise ValueError(
        f"{path} of shape {tuple(leaf.shape)} would keep {int(n.min())} weights for {outputs} outputs, so not one "
        "input for each: take a lower sparsity or another allocation, or leave it dense, "
        f"prunable=jaxsparse.all_but({path!r})"
    )


def _outputs(leaf: Any, at: Layout) -> int:
    return at.matrix_shape(leaf.shape)[-1]


def _all_outputs(at: Layout) -> tuple[int, ...]:
    """The axes of the outputs of all layers of a stack."""
    return (*at.stack, *at.outputs)  # type: ignore[misc]


def _shape_along(shape: Sequence[int], axes: Any) -> tuple[int, ...]:
    """A shape with length 1 along all axes but some."""
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def _others(axes: Any, rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in axes)
