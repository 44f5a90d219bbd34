"""Params and states of optimizers without the entries of closed channels."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.groups import Group, entries
from jaxsparse.trace.program import is_array
from jaxsparse.transforms.gated import GatedState
from jaxsparse.transforms.mask_link import MaskState
from jaxsparse.trees import leaf_paths, path_name

__all__ = ["Kept", "cut_params", "cut_state", "gone_channels", "recounted", "select"]

# (path, axis) -> which entries stay, (n,) bool; or all in a new order, for each layer of a stack, (layers, n) int
Kept = Mapping[tuple[str, int], np.ndarray]


def select(leaf: Any, stays: np.ndarray, axis: int) -> Any:
    """The entries of an array that stay along an axis, or all in a new order; of a shape, its shape."""
    if stays.ndim == 2:
        order = stays.reshape([n if i in (0, axis) else 1 for i, n in enumerate(leaf.shape)])
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.take_along_axis(leaf, order, axis)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = (*leaf.shape[:axis], int(stays.sum()), *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return leaf[(*(slice(None),) * axis, np.flatnonzero(stays))]


def cut_params(params: Any, kept: Kept) -> Any:
    """Params without the entries that go."""
    leaves, treedef = jax.tree.flatten(params)
    cut = [_cut(path, leaf, path, kept, leaf) for path, leaf in zip(leaf_paths(params), leaves, strict=True)]
    return treedef.unflatten(cut)


def gone_channels(
    groups: Iterable[Group], kept: Kept, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The channels of which nothing is left where their group removes or multiplies: name of a group -> (size,), bool.

    They are more than the closed ones of a group whose slices another one removes, and fewer if layers are stacked.
    """
    gone = {}
    for group in groups:
        size = sizes[group.name]
        gone[group.name] = np.zeros(size, bool)
        for which in (*group.removes, *group.multiplies):
            axes, channels = entries(which, shapes[which.path], size)
            left = np.ones(channels.shape, bool)
            for i, axis in enumerate(axes):
                if (which.path, axis) in kept:
                    left &= np.expand_dims(kept[which.path, axis], [j for j in range(len(axes)) if j != i])
            counted = channels >= 0
            gone[group.name] |= np.bincount(channels[counted], left[counted], minlength=size) == 0
    return gone


def cut_state(state: Any, params: Any, kept: Kept, gone: Mapping[str, np.ndarray]) -> Any:
    """A state of an optimizer for the params without the entries that go.

    Subtrees with the tree of the params are cut leaf by leaf, such as the momentum. Other leaves, such as those beside
    an ``optax.MaskedNode()``, are cut if their path ends with that of a leaf of the params; it may lack the first part
    of that, where the optimizer sees ``variables["params"]`` alone. Gates are cut by group. Masks
    are counted anew.

    Args:
      state: of any Optax optimizer, with or without a method of this library.
      params: the params that it belongs to, at their full shapes.
      kept: (path, axis) -> (n,), bool.
      gone: the channels that go, of the groups of the method in its order, for the states of gates.

    Raises:
      ValueError: for a leaf that belongs to a leaf of the params, but has another shape, as in Adafactor; and for the
        generator of gates of :func:`jaxsparse.dep_l0`.
    """
    return recounted(_cut_state(state, params, kept, gone), state)


def _cut_state(state: Any, params: Any, kept: Kept, gone: Mapping[str, np.ndarray]) -> Any:
    tree, names = jax.tree.structure(params), leaf_paths(params)
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))

    def like_params(node):
        special = isinstance(node, GatedState | MaskState)
        return special or (tree.num_leaves > 1 and jax.tree.structure(node) == tree)

    def inside(part):
        return _cut_state(part, params, kept, gone)

    def cut_by_name(ending, leaf):
        name = _of_ending(ending, names)
        return leaf if name is None else _cut(name, leaf, ending, kept, leaves[name])

    def one(path, node):
        where = path_name(path)
        if isinstance(node, GatedState):
            return _cut_gates(node, inside, cut_by_name, gone)
        if isinstance(node, MaskState):
            return type(node)(*map(inside, node))
        if is_array(node) or jax.tree_util.all_leaves([node]):
            return cut_by_name(where, node)
        parts = zip(names, jax.tree.leaves(node), strict=True)
        return tree.unflatten([_cut(name, part, f"{where}/{name}", kept, leaves[name]) for name, part in parts])

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=like_params)


def _of_ending(path: str, names: Sequence[str]) -> str | None:
    """The name with which a path ends, or the only one that does so without its first part; None if there is none."""
    whole = [name for name in names if not name or path == name or path.endswith("/" + name)]
    if whole:
        return max(whole, key=len)
    rests = [(name.partition("/")[2], name) for name in names]
    found = [(len(rest), name) for rest, name in rests if rest and (path == rest or path.endswith("/" + rest))]
    longest = [name for length, name in found if length == max(found)[0]]
    return longest[0] if len(longest) == 1 else None


def _cut(name: str, leaf: Any, where: str, kept: Kept, like: Any) -> Any:
    """A leaf that belongs to the leaf ``name`` of the params; its axes may have size 1, as those of gates have."""
    cuts = {axis: kept[name, axis] for axis in range(len(np.shape(like))) if (name, axis) in kept}
    if not cuts or not is_array(leaf) or np.prod(leaf.shape) == 1:
        return leaf
    if len(leaf.shape) != len(like.shape) or any(n not in (1, m) for n, m in zip(leaf.shape, like.shape, strict=True)):
        raise ValueError(
            f"the optimizer's {where} has shape {tuple(leaf.shape)}, which cannot be cut as {name}, of shape "
            f"{tuple(like.shape)}, is: start the optimizer anew, with tx.init(slim.params)"
        )
    for axis, stays in cuts.items():
        if leaf.shape[axis] == stays.shape[-1]:
            leaf = select(leaf, stays, axis)
    return leaf


def recounted(state: Any, before: Any = None) -> Any:
    """A state in which methods have the numbers of weights that their masks keep now, after some are gone.

    Args:
      state: of an optimizer.
      before: the state with all weights, if layers have lost some; None if they are gone as a whole.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        return state

    def counts(node):
        return hasattr(node, "recounted")

    def anew(node, before=None):
        return node.recounted(before) if counts(node) else node

    return jax.tree.map(anew, state, *([] if before is None else [before]), is_leaf=counts)


def _cut_gates(state: GatedState, cut: Any, cut_leaf: Any, gone: Mapping[str, np.ndarray]) -> GatedState:
    if jax.tree.leaves(state.generator):
        raise ValueError(
            f"{state.method}: a generator of gates has the sizes of the groups: train without it from here on, with "
            "the optimizer's state opt_state.inner_state"
        )
    full = {name: found for name in state.log_alpha if (found := _of_ending(name, [*gone])) is not None}
    if missing := [name for name in state.log_alpha if name not in full]:
        raise ValueError(f"{state.method}: the groups have no {missing[0]!r}, whose gates the optimizer's state has")
    names = sorted(full, key=lambda name: [*gone].index(full[name]))  # their order, which a dict may lose

    def by_name(vectors):
        return {name: _open(name, vector, gone[full[name]]) for name, vector in vectors.items()}

    def of_leaves(gates):  # several gates of a leaf are a tuple
        return {name: jax.tree.map(functools.partial(cut_leaf, name), of) for name, of in gates.items()}

    vectors = jax.tree.structure([0] * len(names))

    def by_place(node):
        if jax.tree.structure(node) != vectors:
            return node
        return [_open(name, vector, gone[full[name]]) for name, vector in zip(names, node, strict=True)]

    return state._replace(
        weights=cut(state.weights),
        inner_state=cut(state.inner_state),
        log_alpha=by_name(state.log_alpha),
        slopes=by_name(state.slopes),
        gates=of_leaves(state.gates),
        test_gates=of_leaves(state.test_gates),
        gate_state=jax.tree.map(by_place, state.gate_state, is_leaf=lambda node: jax.tree.structure(node) == vectors),
    )


def _open(name: str, vector: Any, gone: np.ndarray) -> Any:
    """The entries of a vector for the channels of a group that are left."""

    def one(leaf):
        if np.shape(leaf) not in ((), gone.shape):
            raise ValueError(
                f"the gates of group {name!r} have {np.shape(leaf)} where it has {gone.size} channels: give the "
                "groups of the method, in its order"
            )
        return select(leaf, ~gone, 0) if np.ndim(leaf) else leaf

    return jax.tree.map(one, vector)  # flax.nnx wraps the leaves of an optimizer state
