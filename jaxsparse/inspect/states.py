"""Accessors of optimizer states: masks, gates, weights to evaluate, and checks.

They search any optimizer state, however deeply nested, and merge the masks and gates of several sparse links (sparsity
transforms). The optimizer state is the first argument, the params the second.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import LayoutLike, empty_layers, leaf_layouts
from jaxsparse.masks import apply_masks, validate_masks
from jaxsparse.prunable import prunable_leaves
from jaxsparse.transforms.checks import hint_of_parts
from jaxsparse.transforms.protocols import HasGates, HasLatents, HasNotes, link_states
from jaxsparse.trees import by_path, is_masked_node, natural_order, path_name
from jaxsparse.user_warnings import warn

__all__ = [
    "SparsityError",
    "check",
    "closed_channels",
    "eval_params",
    "explored",
    "get_log_alpha",
    "get_masks",
    "open_channels",
    "sparsify",
]


class SparsityError(ValueError):
    """A broken invariant of a sparse optimizer state, found by :func:`check`."""


def get_masks(opt_state: Any, params: Any = None) -> Any:
    """Get the masks that an optimizer state holds.

    Args:
      opt_state: any optimizer state with one or more sparse links in it. Of a vmapped or replicated state, pass one
        replica.
      params: the params, to get exactly their tree. Without them, a subtree that is hidden from the links (inside
        ``optax.masked``, or ``optax.partition`` with a coarse label tree) is one scalar True, and the masks of a
        ``flax.nnx.Optimizer`` are wrapped in its variables.

    Returns:
      A pytree like the params: bool arrays with the leaves' shapes, the scalar True for dense leaves. With gates
      (:func:`jaxsparse.l0`) they show which gates were open in the last step, which is random while gates are sampled:
      to count the gates that are open in evaluation, use :func:`open_channels` and :func:`jaxsparse.remaining`.

    Raises:
      ValueError: if there is no sparse link in the state, two of them mask the same leaf, or masks do not fit the
        params.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
      >>> tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.5, 100))
      >>> masks = get_masks(tx.init(params))
      >>> jax.tree.map(lambda m: float(jnp.mean(m)), masks)
      {'bias': 1.0, 'kernel': 0.5}
    """
    if params is not None:
        return jax.tree.structure(params).unflatten(_masks_of_leaves(opt_state, params))
    masks = functools.reduce(_merge, [link.sparse_masks() for link in _links(opt_state)])
    return jax.tree.map(lambda m: jnp.ones((), bool) if is_masked_node(m) else m, masks, is_leaf=is_masked_node)


def explored(opt_state: Any) -> Any:
    """Get the weights that were ever kept, of links with ``track=True`` such as :func:`jaxsparse.rigl`.

    Their fraction, :func:`jaxsparse.density` of this tree, is the in-time over-parameterization rate :math:`R_s` of Liu
    et al., 2021 (https://arxiv.org/abs/2102.02887).

    Args:
      opt_state: the optimizer state.

    Returns:
      A pytree like :func:`get_masks`, without the params' tree.

    Raises:
      ValueError: if no link in the state keeps track.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.rigl(0.75, 100, stop_at=1000, track=True))
      >>> float(jaxsparse.density(explored(tx.init({"kernel": jnp.ones((4, 5))}))))
      0.25
    """
    found = [link.renewal.explored for link in link_states(opt_state) if jax.tree.leaves(getattr(link, "renewal", ()))]
    found = [tree for tree in found if jax.tree.leaves(tree)]
    if not found:
        raise ValueError("no link in this optimizer state keeps track of what was ever kept: give it track=True")
    merged = functools.reduce(_merge, found)
    return jax.tree.map(lambda m: jnp.ones((), bool) if is_masked_node(m) else m, merged, is_leaf=is_masked_node)


def sparsify(opt_state: Any, params: Any) -> Any:
    """Apply the masks of an optimizer state to params: call it once, before the first step.

    Args:
      opt_state: the optimizer state that ``tx.init(params)`` returned.
      params: the params.

    Returns:
      The params with exact zeros where the masks are False.

    Raises:
      ValueError: if there is no sparse link in the state.
    """
    return apply_masks(params, get_masks(opt_state, params))


def eval_params(opt_state: Any, params: Any) -> Any:
    """The params to evaluate and to ship.

    For methods that only hold masks these are the masked params; for gates (:func:`jaxsparse.l0`), the weights times
    the gates' values in evaluation.

    Args:
      opt_state: the optimizer state.
      params: the params after a training step.

    Raises:
      ValueError: if there is no sparse link in the state.
    """
    better: dict[str, Any] = {}
    for link in _links(opt_state, params):
        if isinstance(link, HasLatents):
            better |= by_path(link.eval_weights())
    params = sparsify(opt_state, params)
    leaves = [better.get(path, leaf) for path, leaf in by_path(params).items()]
    return jax.tree.structure(params).unflatten(leaves)


def get_log_alpha(opt_state: Any) -> dict[str, jax.Array]:
    """Get the locations log alpha of the gates in an optimizer state, by the name of their group.

    ``hard_concrete_mean`` turns them into the gates to evaluate with, ``prob_open`` into the probabilities that gates
    are open.

    Args:
      opt_state: the optimizer state.

    Returns:
      name of the group -> (size,), float32.

    Raises:
      ValueError: if there are no gates in the state.
    """
    return {name: log_alpha for link in _gated_links(opt_state) for name, log_alpha in link.log_alpha.items()}


def open_channels(opt_state: Any) -> dict[str, jax.Array]:
    """Get the channels whose gates are open in evaluation, by the name of their group.

    :func:`jaxsparse.remaining` takes them, to count the params and MACs without the closed channels.

    Args:
      opt_state: the optimizer state.

    Returns:
      name of the group -> (size,), bool.

    Raises:
      ValueError: if there are no gates in the state.
    """
    return {name: which for link in _gated_links(opt_state) for name, which in link.open_channels().items()}


def check(opt_state: Any, params: Any = None) -> None:
    """Raise an error if an invariant is broken; call it outside of jit, occasionally during training.

    Invariants are that masks keep as many weights as their budget says, that no score from which masks were chosen is
    NaN, and, if ``params`` are given, that pruned weights are zero (an outer wrapper that moves the params can break
    this).

    States that are legal but seldom intended cause a warning: layers (or groups of channels) of which nothing is left,
    and layers that take no part in mask updates because they are frozen.

    Args:
      opt_state: the optimizer state. Replicated and vmapped ones are checked in every replica.
      params: the params, to check that pruned weights are zero.

    Raises:
      SparsityError: naming every broken invariant.
      ValueError: if there is no sparse link in the state, or it is traced.
    """
    _refuse_traced((opt_state, params), "check")
    links = _links(opt_state, params)
    if problems := [problem for link in links for problem in link.problems(params)]:
        raise SparsityError("; ".join(problems))
    for link in links:
        notes = link.notes() if isinstance(link, HasNotes) else []
        for note in notes + _emptied(link, params):
            warn(note)


def closed_channels(params: Any, *, prunable: Any = None, layout: LayoutLike = None) -> dict[str, np.ndarray]:
    """Find the dead output channels of each layer, those whose weights are all zero.

    Args:
      params: the params.
      prunable: the leaves to search, see :func:`jaxsparse.prunable.prunable_leaves`; default: kernels.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes leave it open
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      path of the leaf -> its closed outputs in increasing order, int, (closed,). For a stack of layers, pairs of layer
      and output, (closed, 2).

    Raises:
      ValueError: as :func:`jaxsparse.prunable.prunable_leaves`.

    Examples:
      >>> import jax.numpy as jnp
      >>> closed_channels({"conv": jnp.ones((3, 3, 2, 4)).at[..., 1].set(0.0), "bias": jnp.zeros(4)})
      {'conv': array([1])}
    """
    chosen, layouts = by_path(prunable_leaves(params, prunable, layout=layout)), leaf_layouts(params, layout)
    closed = {}
    for path, leaf in by_path(params).items():
        if chosen[path]:
            where = np.argwhere(~layouts[path].any_by_output(np.asarray(leaf != 0)))
            closed[path] = where if layouts[path].stack else where[:, -1]
    return closed


def links_or_none(opt_state: Any, params: Any) -> list[Any]:
    """The sparse links of an optimizer state; a ValueError if they are in what should be the params."""
    links = link_states(opt_state)
    if not links and link_states(params):
        raise ValueError(
            "the params and the optimizer state are swapped: there are sparse links in the params. The "
            "optimizer state comes first, as in jaxsparse.sparsify(opt_state, params)"
        )
    return links


def _links(opt_state: Any, params: Any = None) -> list[Any]:
    links = links_or_none(opt_state, params)
    if not links:
        raise ValueError(
            "there is no sparse link in this optimizer state: put one, such as jaxsparse.sparse_momentum, last in "
            f"the chain. Got {type(opt_state).__name__}"
        )
    return links


def _emptied(link: Any, params: Any) -> list[str]:
    """Warnings that name the layers, or groups of channels, of which nothing is left in any replica."""
    if isinstance(link, HasGates):  # masks of gates are random while training
        kept, of = link.open_channels(), "open channels of group "
    else:
        kept, of = by_path(link.sparse_masks()), "weights of "
    counts = jax.tree.leaves(link.count) if "count" in getattr(link, "_fields", ()) else []
    replica_axes = max(map(jnp.ndim, counts), default=0)
    found = []
    for name, mask in kept.items():
        left = np.asarray(jnp.any(mask, axis=tuple(range(replica_axes, jnp.ndim(mask)))))
        if jnp.size(mask) and not left.all():
            found.append(
                f"0 of {jnp.size(mask) // left.size} {of}{name} are left, so nothing passes through. Methods with a "
                "budget keep some with at_least=1; otherwise exclude the layer with prunable=, or prune less"
            )
    if params is not None and not replica_axes and not isinstance(link, HasGates):
        found += filter(None, [empty_layers(kept, leaf_layouts(params))])
    return found


def _refuse_traced(tree: Any, who: str) -> None:
    """Raise a ValueError if any leaf is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{who} needs concrete values, which do not exist inside jit, vmap, grad or scan: call it outside, on the "
            "results of the transformed function"
        )


def _gated_links(opt_state: Any) -> list[Any]:
    links = [link for link in link_states(opt_state) if isinstance(link, HasGates)]
    if not links:
        raise ValueError("there are no gates in this optimizer state: wrap the optimizer in jaxsparse.l0 or dep_l0")
    return links


def _masks_of_leaves(opt_state: Any, params: Any) -> list[jax.Array]:
    """The mask of every leaf of the params, matched by path; the scalar True for dense leaves."""
    found: dict[str, Any] = {}
    known: set[str] = set()  # paths of leaves, and of placeholders for a dense leaf or a subtree
    for link in _links(opt_state, params):
        paths, _ = jax.tree_util.tree_flatten_with_path(link.sparse_masks(), is_leaf=is_masked_node)
        masks = {path_name(path): mask for path, mask in paths if not is_masked_node(mask)}
        known |= {path_name(path) for path, _ in paths}
        if twice := sorted(set(found) & set(masks)):
            raise ValueError(f"two sparse links mask the same leaf: {', '.join(twice)}")
        found |= masks
    leaves = by_path(params)
    if unknown := sorted(set(found) - set(leaves)):
        hint = hint_of_parts(unknown[0], leaves)
        raise ValueError(f"the optimizer state has masks of leaves that the params lack: {', '.join(unknown)}{hint}")
    if new := sorted(path for path in leaves if not known & set(_prefixes(path))):
        raise ValueError(
            f"the optimizer state lacks these leaves of the params: {', '.join(new)}. It belongs to another model: "
            "make one with tx.init(params)"
        )
    for name, mask in found.items():
        if np.shape(mask) != np.shape(leaves[name]):
            raise ValueError(
                f"the mask of {name} in the optimizer state has shape {np.shape(mask)}, but the params have "
                f"{np.shape(leaves[name])}; pass one replica of a vmapped or replicated state"
            )
    return [found.get(name, jnp.ones((), bool)) for name in leaves]


def _prefixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["", *("/".join(parts[:n]) for n in range(1, len(parts) + 1))]


def masks_for(opt_state_or_masks: Any, params: Any) -> Any:
    """Masks that fit the params, from masks or an optimizer state."""
    _refuse_traced((opt_state_or_masks, params), "a table or picture")
    if _all_bool(params) and not _all_bool(opt_state_or_masks):
        raise ValueError("the params and the masks are swapped: masks come first")
    dtypes = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(opt_state_or_masks)]
    other_tree = jax.tree.structure(opt_state_or_masks) != jax.tree.structure(params)
    if link_states(opt_state_or_masks) or link_states(params) or (other_tree and set(dtypes) - {np.dtype(bool), None}):
        return get_masks(opt_state_or_masks, params)  # or an error, if the state has no sparse link
    validate_masks(opt_state_or_masks, params)
    return opt_state_or_masks


def sparse_masks(masks: Any, function: str) -> dict[str, np.ndarray]:
    """The masks of the sparse leaves, by path, in natural order; the argument may be an optimizer state."""
    if link_states(masks):
        masks = get_masks(masks)
    found = {path: np.asarray(mask) for path, mask in by_path(masks).items() if np.ndim(mask) > 0}
    for path, mask in found.items():
        if mask.dtype != bool:
            raise ValueError(f"{function}: expected masks, or an optimizer state, got {mask.dtype} for {path}")
    if not found:
        raise ValueError(f"{function}: no leaf has a mask, all are dense")
    return {path: found[path] for path in sorted(found, key=natural_order)}


def _all_bool(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and {getattr(leaf, "dtype", type(leaf)) for leaf in leaves} <= {bool, np.dtype(bool)}


def _merge(a: Any, b: Any) -> Any:
    """The union of two trees, in which MaskedNode is a placeholder for a leaf or subtree that the other may have."""
    if is_masked_node(a) or is_masked_node(b):
        return b if is_masked_node(a) else a
    parts, treedef = jax.tree.flatten(a, is_leaf=lambda node: node is not a)
    if treedef == jax.tree.structure(0):
        raise ValueError(f"two sparse links mask the same leaf, of shape {jnp.shape(a)}")
    others = jax.tree.flatten(b, is_leaf=lambda node: node is not b)[0]
    return treedef.unflatten([_merge(x, y) for x, y in zip(parts, others, strict=True)])
