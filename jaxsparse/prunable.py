"""The choice of leaves that a method may prune: by default matrices and convolutions, or as ``prunable=`` says."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import LayoutLike, leaf_layouts
from jaxsparse.trees import align, as_array, by_path, is_function, is_partial, leaf_paths, listed, matching
from jaxsparse.user_warnings import warn

__all__ = ["AllBut", "Prunable", "all_but", "default_choice", "prunable_leaves"]

logger = logging.getLogger("jaxsparse")


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


@dataclasses.dataclass(frozen=True)
class AllBut:
    """The default choice of leaves except for some, made by :func:`all_but`.

    Attributes:
      patterns: of the leaves that are left out.
    """

    patterns: tuple[str, ...]


def all_but(*patterns: str) -> AllBut:
    """The default choice of leaves (:func:`prunable_leaves`) except for the given ones, for ``prunable=``.

    Args:
      *patterns: paths of leaves, or of what leaves lie in ("conv1" stands for "conv1/kernel" too), or globs such as
        "*/attn/*", see :func:`jaxsparse.trees.matching`. One that matches nothing is an error.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "fc2": {"kernel": jnp.ones((3, 2))}}
      >>> prunable_leaves(params, all_but("fc2"))
      {'fc1': {'bias': False, 'kernel': True}, 'fc2': {'kernel': False}}
    """
    return AllBut(tuple(pattern.strip("/") for pattern in patterns))


def prunable_leaves(params: Any, prunable: Any = None, *, layout: LayoutLike = None) -> Any:
    """Decides for every leaf whether a method may prune it, and logs what was chosen.

    Args:
      params: a pytree of arrays.
      prunable: one of

        * ``None``: every floating-point leaf that is a matrix or a convolution, as
          :func:`jaxsparse.layouts.leaf_layouts` finds: biases and the gains of normalisations stay dense, those of
          attention and of stacked layers too, which have several axes;
        * a glob such as ``"*/attn/*"`` or a list of them: what is chosen by default among the leaves that match
          (:func:`jaxsparse.trees.matching`); a whole path chooses that leaf, whatever it is;
        * :func:`all_but` of such patterns;
        * a pytree of bools like the params, or a :class:`Prunable`.
      layout: what leaves are, where the rules do not find it: pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A pytree of Python bools like ``params``.

    Raises:
      ValueError: if ``prunable`` chooses nothing, is none of the above, has a pattern that matches nothing, or does not
        cover the params.

    Warns:
      UserWarning: if a predicate chooses leaves that look like biases or gains, or the default choice leaves some out
        that may be matrices, naming them.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"attn": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "mlp": {"kernel": jnp.ones((4, 4))}}
      >>> prunable_leaves(params, "attn/*")
      {'attn': {'bias': False, 'kernel': True}, 'mlp': {'kernel': False}}
    """
    leaves = {path: as_array(path, leaf) for path, leaf in by_path(params).items()}
    patterns = (prunable,) if isinstance(prunable, str) else prunable
    if prunable is None:
        chosen = default_choice(params, layout)
    elif isinstance(prunable, AllBut):
        left_out = _all_matches("all_but", prunable.patterns, leaves, is_partial(params))
        chosen = {path: choice and path not in left_out for path, choice in default_choice(params, layout).items()}
    elif isinstance(patterns, list | tuple) and patterns and all(isinstance(pattern, str) for pattern in patterns):
        chosen = _by_patterns(patterns, leaves, default_choice(params, layout), is_partial(params))
    elif isinstance(prunable, Prunable):
        chosen = {path: bool(prunable.predicate(path, leaf)) for path, leaf in leaves.items()}
        odd = [path for path, choice in chosen.items() if choice and np.ndim(leaves[path]) > 1]
        layouts = leaf_layouts(params, layout) if odd else {}
        odd = [path for path in odd if not layouts[path].is_matrix]
        if odd:
            warn(
                f"prunable chooses {listed(odd)}, which look like biases or gains of normalisations. Leave them out of "
                'the predicate, or say that they are matrices by layout={"path": jaxsparse.Layout(inputs, outputs)}',
            )
    elif is_function(prunable):
        raise ValueError("wrap the predicate of prunable=: jaxsparse.Prunable(lambda path, leaf: ...)")
    else:
        chosen = dict(zip(leaves, align(prunable, params, "prunable"), strict=True))
        for path, value in chosen.items():
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"prunable must hold a bool for every leaf, got {value!r} for {path}")
    for path, leaf in leaves.items():
        if chosen[path] and not _is_float(leaf):
            raise ValueError(f"prunable chooses {path} of dtype {jnp.result_type(leaf)}: only floats have masks")
    if leaves and not any(chosen.values()):
        raise ValueError(f"prunable matches none of the params, which are {listed(list(leaves))}")
    if leaves:
        sparse, dense = ([path for path in leaves if bool(chosen[path]) is which] for which in (True, False))
        logger.info("prunable: %s; dense: %s", ", ".join(sparse), ", ".join(dense) or "nothing")
    return jax.tree.structure(params).unflatten([bool(chosen[path]) for path in leaf_paths(params)])


def default_choice(params: Any, layout: LayoutLike = None) -> dict[str, bool]:
    """The default choice of :func:`prunable_leaves`, by path: floating-point leaves that are matrices."""
    layouts = leaf_layouts(params, layout)
    floats = {path: layouts[path] for path, leaf in by_path(params).items() if _is_float(leaf)}
    if doubts := [f"{path} ({at.guess})" for path, at in floats.items() if at.guess and not at.is_matrix]:
        warn(
            f"these leaves stay dense, which is a guess: {', '.join(doubts)}. Those that are matrices can be told by "
            'layout={"path or pattern": jaxsparse.Layout(inputs=..., outputs=..., stack=...)}',
        )
    return {path: path in floats and at.is_matrix for path, at in layouts.items()}


def _by_patterns(
    patterns: Sequence[str], leaves: dict[str, Any], default: dict[str, bool], partial: bool
) -> dict[str, bool]:
    matched = _all_matches("prunable", patterns, leaves, partial)
    for pattern in patterns:
        found = matching(pattern, leaves)
        if found and pattern not in leaves and not any(default[path] for path in found):
            raise ValueError(
                f"prunable: {pattern!r} matches only {listed(found)}, dense by default (no floats, or they look like "
                "biases or gains). A whole path, without *, chooses a leaf whatever it is"
            )
    return {path: path in patterns or (path in matched and default[path]) for path in leaves}


def _all_matches(what: str, patterns: Sequence[str], leaves: dict[str, Any], partial: bool) -> set[str]:
    """The paths that any of the patterns matches."""
    found: set[str] = set()
    for pattern in patterns:
        matched = matching(pattern, leaves)
        if leaves and not matched and not partial:
            raise ValueError(f"{what}: {pattern!r} matches none of the params, which are {listed(list(leaves))}")
        found |= set(matched)
    return found


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
