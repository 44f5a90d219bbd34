"""Which parts of a network a method may drop: which leaves, and what unit within a leaf.

A leaf is *prunable* or *dense*. What is kept or dropped as one inside a
prunable leaf is its *structure*: here a single weight.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "Prunable", "align", "by_path", "by_plain_path", "check_structure", "group_axes", "is_function", "is_masked_node",
    "leaf_paths", "natural_order", "path_name", "plain_path", "prunable_by_default",
    "prunable_leaves",
]  # fmt: skip

logger = logging.getLogger("jaxsparse")

# What wrappers of leaves are called (flax.nnx); the name of the leaf is the one before.
_WRAPPER_NAMES = {"value", "raw_value"}
_GROUPED = {"kernel": 2, "channel": 1}  # how many of the last axes tell the groups apart


@dataclasses.dataclass(frozen=True)
class Prunable:
    """Chooses the leaves that a method may prune by a predicate on path and leaf.

    Not a bare function, because :func:`optax.inject_hyperparams` takes every
    callable argument for a schedule.

    Attributes:
      predicate: called with the path of a leaf, such as ``"fc1/kernel"``, and the
        leaf; returns whether it may be pruned.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": {"kernel": jnp.ones((4, 3))}, "fc2": {"kernel": jnp.ones((3, 2))}}
      >>> prunable_leaves(params, Prunable(lambda path, leaf: not path.startswith("fc2")))
      {'fc1': {'kernel': True}, 'fc2': {'kernel': False}}
    """

    predicate: Callable[[str, Any], bool]


def is_masked_node(node: Any) -> bool:
    """Whether a node is the :class:`optax.MaskedNode` that stands for what a transformation does not see."""
    return isinstance(node, optax.MaskedNode)


def path_name(path: tuple) -> str:
    """The name of a leaf's path: ``"fc1/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: Any) -> list[str]:
    """The names of all leaves, in the order of ``jax.tree.leaves``."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def natural_order(path: str) -> list[Any]:
    """A sort key that puts conv2 before conv10: the numbers in a path count as numbers.

    Examples:
      >>> sorted(["conv10/kernel", "conv2/kernel"], key=natural_order)
      ['conv2/kernel', 'conv10/kernel']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def plain_path(path: str) -> str:
    """A path without the names that wrappers of leaves add: "kernel" where flax.nnx has "kernel/value".

    Examples:
      >>> plain_path("layers/0/kernel/value")
      'layers/0/kernel'
    """
    parts = path.split("/")
    while len(parts) > 1 and parts[-1] in _WRAPPER_NAMES:
        parts.pop()
    return "/".join(parts)


def by_plain_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their paths, as :func:`plain_path` has them."""
    return {plain_path(path): leaf for path, leaf in by_path(tree).items()}


def is_function(value: Any) -> bool:
    """Whether a value is a function rather than a tree: the modules of Equinox are callable trees."""
    return callable(value) and jax.tree_util.all_leaves([value])


def align(tree: Any, params: Any, what: str) -> list[Any]:
    """The values of ``tree`` that belong to the leaves of ``params``, matched by path.

    Inside ``optax.masked`` and ``optax.partition`` a transformation sees params of
    which parts are replaced by ``MaskedNode``, while what the user gave (masks, extra
    args) still has every leaf: what belongs to no leaf of ``params`` is left out there.

    Args:
      tree: a pytree with a leaf for every leaf of ``params``.
      params: the params as the transformation sees them.
      what: what ``tree`` is, for the error.

    Returns:
      One value a leaf of ``params``, in their order.

    Raises:
      ValueError: naming the leaves that ``tree`` lacks, or has beyond those of ``params``.
    """
    values = by_path(tree)
    wanted = leaf_paths(params)
    missing = [name for name in wanted if name not in values]
    if missing:
        raise ValueError(f"{what} must have the tree of the params, but has nothing for {_listed(missing)}")
    partial = not wanted or any(map(is_masked_node, jax.tree.leaves(params, is_leaf=is_masked_node)))
    extra = sorted(set(values) - set(wanted))
    if extra and not partial:
        raise ValueError(f"{what} must have the tree of the params, but has {_listed(extra)} beyond them")
    return [values[name] for name in wanted]


def prunable_leaves(params: Any, prunable: Any = None) -> Any:
    """Decides for every leaf whether a method may prune it, and logs what was chosen.

    Args:
      params: a pytree of arrays.
      prunable: ``None`` for every floating-point leaf with two or more dimensions
        whose name does not end in "bias", "scale" or "offset" (so the two-dimensional
        biases of attention layers, and of Haiku's normalisations, stay dense too); a pytree of bools like the params;
        or a :class:`Prunable`.

    Returns:
      A pytree of Python bools like ``params``.

    Raises:
      ValueError: if ``prunable`` chooses nothing, is neither of the above, or
        does not cover the params.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if prunable is None:
        chosen = [prunable_by_default(path, leaf) for path, leaf in leaves]
    elif isinstance(prunable, Prunable):
        chosen = [bool(prunable.predicate(path_name(path), leaf)) for path, leaf in leaves]
    elif is_function(prunable):
        raise ValueError("wrap the predicate of prunable=: jaxsparse.Prunable(lambda path, leaf: ...)")
    else:
        chosen = align(prunable, params, "prunable")
        for (path, _), value in zip(leaves, chosen, strict=True):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"prunable must hold a bool for every leaf, got {value!r} for {path_name(path)}")
        chosen = [bool(value) for value in chosen]
    for (path, leaf), choice in zip(leaves, chosen, strict=True):
        if choice and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"prunable chooses {path_name(path)} of dtype {leaf.dtype}: only floats have masks")
    if leaves and not any(chosen):
        raise ValueError(f"prunable matches none of the params, which are {_listed([path_name(p) for p, _ in leaves])}")
    if leaves:
        sparse = [path_name(path) for (path, _), choice in zip(leaves, chosen, strict=True) if choice]
        dense = [path_name(path) for (path, _), choice in zip(leaves, chosen, strict=True) if not choice]
        logger.info("prunable: %s; dense: %s", ", ".join(sparse), ", ".join(dense) or "nothing")
    return treedef.unflatten(chosen)


def check_structure(structure: str | Mapping[str, str], known: Sequence[str] = ("weight", *_GROUPED)) -> None:
    """Raises a ValueError for a structure, or one of a mapping's, that a method does not know."""
    for value in structure.values() if isinstance(structure, Mapping) else [structure]:
        if value not in known:
            raise ValueError(f"structure must be one of {list(known)}, got {value!r}")


def group_axes(structure: str | Mapping[str, str], params: Any, prunable: Any) -> Any:
    """The axes over which the weights of a prunable leaf live and die together.

    Convolution kernels are laid out as Flax has them, (spatial axes, inputs, outputs): a ``"kernel"`` is the slice of
    one input and one output, a ``"channel"`` all that leads to one output.

    Args:
      structure: ``"weight"`` (every weight by itself), ``"kernel"`` or ``"channel"`` for all leaves: of these, leaves
        of four dimensions are taken in groups, matrices by single weights. Or a mapping from path to structure
        for leaves of three dimensions or more; those that it does not name go by single weights.
      params: a pytree of arrays.
      prunable: a bool for every leaf, like ``params``; see :func:`prunable_leaves`.

    Returns:
      A tuple of axes for every prunable leaf, empty for single weights; ``optax.MaskedNode()`` for the others.

    Raises:
      ValueError: for an unknown structure or path, and for a leaf whose rank a structure does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 2, 8)), "fc": jnp.ones((8, 10))}
      >>> group_axes("kernel", params, prunable_leaves(params))
      {'conv': (0, 1), 'fc': ()}
    """
    check_structure(structure)
    by_leaf = isinstance(structure, Mapping)
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_paths(params)
    partial = any(map(is_masked_node, jax.tree.leaves(params, is_leaf=is_masked_node)))
    unknown = sorted(set(structure) - set(names)) if by_leaf and names and not partial else []
    if unknown:
        raise ValueError(f"structure names {_listed(unknown)}, but the params are {_listed(names)}")
    axes: list[Any] = []
    for name, leaf, chosen in zip(names, leaves, treedef.flatten_up_to(prunable), strict=True):
        unit = structure.get(name, "weight") if isinstance(structure, Mapping) else structure
        if not chosen:
            axes.append(optax.MaskedNode())
        elif unit == "weight" or (leaf.ndim == 2 and not by_leaf):
            axes.append(())
        elif leaf.ndim == 4 or (leaf.ndim > 2 and by_leaf):
            axes.append(tuple(range(leaf.ndim - _GROUPED[unit])))
        else:
            raise ValueError(
                f"structure {unit!r} does not fit {name} of shape {leaf.shape}: for all leaves at once it is for "
                'kernels of four dimensions and matrices; say it leaf by leaf, structure={"path": "channel"}, for '
                "those of three dimensions or more, or leave leaves out by prunable="
            )
    return treedef.unflatten(axes)


def prunable_by_default(path: tuple, leaf: Any) -> bool:
    """Whether :func:`prunable_leaves` chooses a leaf if not told otherwise; ``path`` as jax.tree_util has it."""
    names = [jax.tree_util.keystr((key,), simple=True).lower() for key in path]
    while names and names[-1] in _WRAPPER_NAMES:
        names.pop()
    name = names[-1] if names else ""
    return (
        leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and not name.endswith(("bias", "scale", "offset"))
    )


def _listed(names: list[str], at_most: int = 8) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
