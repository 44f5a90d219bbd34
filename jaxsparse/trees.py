"""Paths of leaves, patterns that select leaves by path, and trees matched to the params.

Every leaf has one name, its path: ``"fc1/kernel"``, ``"layers/0/weight"``. What users give by leaf (``prunable=``,
``layout=``, ``sparsity=``, ``structure=``) names leaves by these paths or by globs such as ``"*/attn/*"``.
"""

import difflib
import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "WRAPPED",
    "align",
    "as_array",
    "by_path",
    "by_pattern",
    "is_function",
    "is_key",
    "is_masked_node",
    "is_partial",
    "leaf_paths",
    "listed",
    "matching",
    "natural_order",
    "path_name",
    "score_that_fits",
    "scores_by_path",
]

logger = logging.getLogger("jaxsparse")

# The attributes by which the variables of flax.nnx hold their array; a key of a dict of that name is a real name.
WRAPPED = {jax.tree_util.GetAttrKey("value"), jax.tree_util.GetAttrKey("raw_value")}


def is_masked_node(node: Any) -> bool:
    """Whether a node is an :class:`optax.MaskedNode`, the placeholder of a leaf hidden from a transformation."""
    return isinstance(node, optax.MaskedNode)


def is_key(x: Any) -> bool:
    """Whether it is an array of typed PRNG keys."""
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)


def is_partial(params: Any) -> bool:
    """Whether some or all params are hidden from a transformation (``optax.masked``, ``optax.partition``)."""
    nodes = jax.tree.leaves(params, is_leaf=is_masked_node)
    return not nodes or any(map(is_masked_node, nodes))


def is_function(value: Any) -> bool:
    """Whether a value is a function rather than a tree: the modules of Equinox are callable trees."""
    return callable(value) and jax.tree_util.all_leaves([value])


def path_name(path: tuple) -> str:
    """The name of a leaf's path: ``"fc1/kernel"``.

    The variables of flax.nnx add nothing to it. (So in other modules that are pytrees an array in an attribute called
    ``value`` bears the name of its module.)

    Examples:
      >>> from jax.tree_util import DictKey, GetAttrKey
      >>> path_name((DictKey("fc1"), DictKey("kernel"), GetAttrKey("value")))
      'fc1/kernel'
      >>> path_name((DictKey("attention"), DictKey("value")))
      'attention/value'
    """
    while len(path) > 1 and path[-1] in WRAPPED:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def as_array(path: str, leaf: Any) -> Any:
    """Converts a Python number to an array without dimensions, as JAX does; returns other leaves as they are.

    Args:
      path: the name of the leaf, for the error.
      leaf: an array, its shape, or a number.

    Raises:
      ValueError: for anything else, such as a function.
    """
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf
    if not isinstance(leaf, bool | int | float | complex):
        raise ValueError(
            f"the params must be arrays, but {path} is {leaf!r}. Of an Equinox module, whose functions are leaves too, "
            "give its arrays: eqx.filter(model, eqx.is_inexact_array)"
        )
    return np.asarray(leaf)


def leaf_paths(tree: Any) -> list[str]:
    """The names of all leaves, in the order of ``jax.tree.leaves``."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def natural_order(path: str) -> list[Any]:
    """A sort key that puts conv2 before conv10: the numbers in a path count as numbers.

    Examples:
      >>> sorted(["conv10/kernel", "conv2/kernel"], key=natural_order)
      ['conv2/kernel', 'conv10/kernel']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


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
        raise ValueError(f"{what} must have the tree of the params, but has nothing for {listed(missing)}")
    extra = sorted(set(values) - set(wanted))
    if extra and not is_partial(params):
        raise ValueError(f"{what} must have the tree of the params, but has {listed(extra)} beyond them")
    return [values[name] for name in wanted]


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches, as a glob in which ``*`` stands for any part of a path.

    The path of what leaves lie in stands for all of them: "conv1" for "conv1/kernel" too.

    Examples:
      >>> matching("*/attn/*", ["block0/attn/query/kernel", "block0/mlp/kernel", "attn/kernel"])
      ['block0/attn/query/kernel']
      >>> matching("*attn/*", ["block0/attn/query/kernel", "block0/mlp/kernel", "attn/kernel"])
      ['block0/attn/query/kernel', 'attn/kernel']
    """
    pattern = pattern.rstrip("/")
    inside = f"{pattern}/"
    return [
        path
        for path in paths
        if path == pattern or path.startswith(inside) or fnmatch.fnmatchcase(path, pattern)
        or fnmatch.fnmatchcase(path, f"{inside}*")
    ]  # fmt: skip


def by_pattern(
    given: Mapping[str, Any] | Sequence[tuple[str, Any]], paths: Sequence[str], what: str, *, partial: bool = False
) -> dict[str, Any]:
    """Resolves values given by pattern: each path gets the value of the first pattern that matches it.

    Args:
      given: pattern -> value, see :func:`matching`, in order; a mapping or pairs.
      paths: the names of the leaves that may be selected.
      what: the option, for errors and the log.
      partial: the paths are not all that there are: a pattern that selects nothing is no error.

    Returns:
      path -> value, for the paths that a pattern matches. What each pattern selected is logged.

    Raises:
      ValueError: for a pattern that selects nothing, because it matches no path or because patterns before it took all
        that it matches.

    Examples:
      >>> by_pattern({"fc3/*": 0.5, "*/kernel": 0.9}, ["fc1/kernel", "fc2/kernel", "fc3/kernel"], "sparsity")
      {'fc1/kernel': 0.9, 'fc2/kernel': 0.9, 'fc3/kernel': 0.5}
    """
    found: dict[str, tuple[str, Any]] = {}
    for pattern, value in given.items() if isinstance(given, Mapping) else given:
        matched = matching(pattern, paths)
        selected = [path for path in matched if path not in found]
        if not selected and not partial and not (matched and pattern == "*"):  # which may catch what is left, if any
            if matched:
                first = found[matched[0]][0]
                raise ValueError(
                    f"{what}: {pattern!r} selects nothing, since {first!r} before it took {listed(matched)}: the first "
                    "match wins, so put the narrower pattern first"
                )
            near = difflib.get_close_matches(pattern, paths, n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise ValueError(f"{what}: {pattern!r} matches none of {listed(paths)}{hint}")
        found |= {path: (pattern, value) for path in selected}
        if selected and selected != [pattern]:
            logger.info("%s: %r selects %s", what, pattern, ", ".join(selected))
    return {path: found[path][1] for path in paths if path in found}


def listed(names: Sequence[str], at_most: int = 8) -> str:
    """Names in one line; of a long list only the first few.

    Examples:
      >>> listed(["a", "b", "c"], at_most=2)
      'a, b and 1 more'
    """
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def scores_by_path(scores: Any, params: Any, what: str = "scores") -> dict[str, Any]:
    """Scores by the path of their leaf; a ValueError that names what they have beyond the params."""
    given, wanted = by_path(scores), set(leaf_paths(params))
    extra = sorted(set(given) - wanted)
    if extra and not is_partial(params):
        raise ValueError(f"{what} must have the tree of the params, but has {listed(extra)} beyond them")
    return given


def score_that_fits(given: Mapping[str, Any], path: str, leaf: Any, what: str = "scores") -> jax.Array:
    """The scores of one leaf; a ValueError that names it if they are not there, of another shape, or no floats."""
    value, shape = given.get(path), jnp.shape(leaf)
    if value is None or jnp.shape(value) != shape:
        got = "none" if value is None else f"shape {jnp.shape(value)}"
        raise ValueError(f"{what} of {path}: expected shape {shape}, got {got}")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{what} of {path}: expected floats, got {value.dtype}")
    return value
