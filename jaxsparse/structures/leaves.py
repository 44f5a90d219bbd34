"""The structure of every leaf: resolved from options, and checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts, warn_of_guesses
from jaxsparse.structures.base import Structure
from jaxsparse.structures.n_m import n_of_m
from jaxsparse.structures.units import channel, kernel, weight
from jaxsparse.trees import by_pattern, is_masked_node, is_partial, leaf_paths
from jaxsparse.user_warnings import warn

__all__ = ["StructureLike", "check_structure", "check_units", "leaf_structures", "made_of", "mask_structures"]

StructureLike: TypeAlias = str | Structure | Mapping[str, str | Structure]
_BY_NAME: dict[str, type[Structure]] = {"weight": weight, "kernel": kernel, "channel": channel}
_NAMES = ("weight", "kernel", "channel", "block", "n_of_m")


def check_structure(structure: StructureLike, known: Sequence[str] = _NAMES) -> None:
    """Raises a ValueError for values (or those of a mapping) that are no structure, or none for this method.

    Args:
      structure: "weight", "kernel", "channel", a :class:`Structure`, or a mapping from path to these.
      known: the names of those that the method takes.
    """
    for value in structure.values() if isinstance(structure, Mapping) else [structure]:
        name = type(value).__name__ if isinstance(value, Structure) else value if isinstance(value, str) else None
        if name not in known or (isinstance(value, str) and value not in _BY_NAME):
            calls = " or made by jaxsparse.block, jaxsparse.n_of_m" if "block" in known else ""
            raise ValueError(f"structure must be one of {[k for k in known if k in _BY_NAME]}{calls}, got {value!r}")


def leaf_structures(
    structure: StructureLike, params: Any, prunable: Any, *, layout: LayoutLike = None, quiet: bool = False
) -> Any:
    """The structure of every prunable leaf.

    Args:
      structure: one for all leaves, or a mapping from patterns of paths (:func:`jaxsparse.trees.matching`) to
        structures, of which the first match wins; leaves that it does not name go by single weights. The strings stand
        for ``weight()``, ``kernel()`` and ``channel()``.
      params: a pytree of arrays.
      prunable: a bool for every leaf, like ``params``; see :func:`jaxsparse.prunable.prunable_leaves`.
      layout: which axes of leaves are inputs and outputs, where the rules of :func:`jaxsparse.layouts.leaf_layouts` do
        not find it.
      quiet: do not warn of the leaves that go by single weights because they do not fit, or whose layout is a guess.

    Returns:
      A :class:`Structure` for every prunable leaf, which fits it; ``optax.MaskedNode()`` for the others.

    Raises:
      ValueError: for an unknown structure, a pattern that matches no prunable leaf, and for leaves that do not fit one
        with ``ragged="error"``.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 2, 8)), "fc": jnp.ones((8, 10))}
      >>> leaf_structures("kernel", params, {"conv": True, "fc": True})
      {'conv': kernel(), 'fc': weight()}
    """
    check_structure(structure)
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_paths(params)
    flags = dict(zip(names, treedef.flatten_up_to(prunable), strict=True))
    by_leaf = isinstance(structure, Mapping)
    chosen = [name for name in names if flags[name]]
    if isinstance(structure, Mapping):
        given_to = by_pattern(structure, chosen, "structure", partial=is_partial(params))
    else:
        given_to = dict.fromkeys(chosen, structure)
    if all(given == "weight" or isinstance(given, weight) for given in given_to.values()):
        if layout:
            leaf_layouts(params, layout)  # raises for what does not fit
        return treedef.unflatten([weight() if flags[name] else optax.MaskedNode() for name in names])
    layouts = leaf_layouts(params, layout)
    found: list[Any] = []
    matrices: list[str] = []  # left to single weights by a structure of convolutions
    misfits: dict[Any, list[str]] = {}  # what was given -> the leaves that it does not fit
    guesses: dict[str, Layout] = {}
    for name, leaf in zip(names, leaves, strict=True):
        given: Any = given_to.get(name, "weight")
        if not flags[name] or given == "weight" or isinstance(given, weight):
            found.append(weight() if flags[name] else optax.MaskedNode())
            continue
        at = layouts[name]
        unit = dataclasses.replace(made_of(given), layout=None if at.is_plain(len(leaf.shape)) else at)
        of_convolutions = isinstance(unit, kernel | channel) and not by_leaf
        known, places = at.is_matrix and not at.guess, at.places(len(leaf.shape))
        if unit.fits(leaf.shape) and (not of_convolutions or (known and places)):
            found.append(unit)
            if not (isinstance(unit, n_of_m) and isinstance(unit.axis, int)):
                guesses[name] = at
        else:
            found.append(weight())
            which = matrices if of_convolutions and known and not places else misfits.setdefault(given, [])
            which.append(f"{name} of shape {tuple(leaf.shape)}" + _seen(unit, leaf))
    told = [f"structure {given!r} does not fit {', '.join(which)}" for given, which in misfits.items()]
    if any(made_of(given).ragged == "error" for given in misfits):
        raise ValueError(
            "; ".join(told) + '. Say it leaf by leaf, structure={"path": ...}, say which axes are inputs and outputs, '
            'layout={"path": jaxsparse.Layout(...)}, leave leaves out by prunable=, or let those that do not fit go by '
            'single weights, ragged="warn"'
        )
    if matrices and not misfits and all(isinstance(unit, weight) or is_masked_node(unit) for unit in found):
        told = [f"structure {structure!r} is for convolutions unless it names a leaf, and there are only "
                + ", ".join(matrices)]  # fmt: skip
    if told and not quiet:
        warn("; ".join(told) + ": they go by single weights")
    if not quiet:
        warn_of_guesses(guesses, f"structure {structure!r}")
    return treedef.unflatten(found)


def mask_structures(
    structure: StructureLike, params: Any, masks: Any, *, layout: LayoutLike = None, quiet: bool = False
) -> Any:
    """As :func:`leaf_structures`, for the leaves that have a mask in ``masks``, a state's."""
    treedef = jax.tree.structure(params)
    sparse = [not is_masked_node(mask) for mask in treedef.flatten_up_to(masks)]
    return leaf_structures(structure, params, treedef.unflatten(sparse), layout=layout, quiet=quiet)


def check_units(masks: Any, structures: Any, what: str = "masks") -> None:
    """Raises a ValueError that names the leaves whose masks keep parts of units, or not n of every m.

    Args:
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves. Traced ones pass unseen.
      structures: like ``masks``, of :func:`leaf_structures`.
      what: what to call them in the error.
    """
    flat = zip(leaf_paths(masks), jax.tree.leaves(masks), jax.tree.leaves(structures), strict=True)
    bad = []
    with jax.ensure_compile_time_eval():  # also where ``init`` is jitted
        for name, mask, unit in flat:
            if isinstance(mask, jax.core.Tracer) or isinstance(unit, weight):
                continue
            if not bool(unit.holds(jnp.asarray(mask))):
                bad.append(f"{name} of shape {mask.shape} (structure {unit})")
    if bad:
        raise ValueError(f"{what} must keep whole units, and n of every m, but do not in {', '.join(bad)}")


def require_signs(structure: StructureLike, why: str) -> None:
    """Raises a ValueError for a structure whose units, of several weights, have no sign; ``why`` is its beginning."""
    check_structure(structure)
    for unit in structure.values() if isinstance(structure, Mapping) else [structure]:
        if not made_of(unit).has_sign:
            raise ValueError(f"{why}, and units have no sign: got {unit!r}")


def made_of(given: str | Structure) -> Structure:
    """The structure of a name."""
    return _BY_NAME[given]() if isinstance(given, str) else given


def _seen(unit: Structure, leaf: Any) -> str:
    return "" if unit.layout is None else f", seen as matrices {unit.layout.matrix_shape(leaf.shape)}"
