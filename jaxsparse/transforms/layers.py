"""Layers: leaves with masks at a mask update, and their units as a rule sees them."""

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.structures import Structure, StructureLike, mask_structures, unit_scores
from jaxsparse.transforms.chain import Signal, signals_of
from jaxsparse.trees import is_masked_node, leaf_paths

__all__ = ["Layer", "Rule", "each", "layers_of", "on_units", "stacks"]

_REPEATED = 3  # layers of one kind, from which on they compile faster as a stack


class Layer(NamedTuple):
    """A leaf with a mask, at a mask update: of single weights, or (see :func:`on_units`) of units.

    Attributes:
      path: the leaf's.
      weight: floats: the weights. Of units, the mean absolute value of each.
      given: the gradient or momentum, pruned weights included; None if a method has none. See :attr:`signal`.
      mask: bool of the same shape: what is kept so far.
      structure: what the leaf is made of; see :mod:`jaxsparse.structures`.
      layout: where the outputs are, of single weights that have them elsewhere than on the last axis; else None.
      index: the number of the layer among those with a mask.
      key: PRNG key of the mask update, one for all layers; None for a method that makes no random choice.
    """

    path: str
    weight: jax.Array
    given: Signal | None
    mask: jax.Array
    structure: Structure
    layout: Layout | None
    index: Any  # not int: the field hides tuple.index
    key: jax.Array | None

    @property
    def signal(self) -> Any:
        """The gradient or momentum, floats of the weight's shape; None if a method has none."""
        return None if self.given is None else self.given.value()

    @property
    def kind(self) -> Hashable:
        """The kind of optimizer that the signal is a momentum of; momenta of one kind have one scale."""
        return None if self.given is None else self.given.kind

    @property
    def size(self) -> int:
        """The number of weights (or units)."""
        return self.mask.size


# From layers, and arrays with an entry for each of them, to their new masks and which of them rest: bool, (layers,).
Rule = Callable[..., tuple[Sequence[jax.Array], jax.Array]]


def layers_of(
    params: Any,
    signal: Any,
    masks: Any,
    *,
    structure: StructureLike = "weight",
    layout: LayoutLike = None,
    key: jax.Array | None = None,
    what: str = "momentum",
) -> list[Layer]:
    """The leaves that have masks, in the order of ``jax.tree.leaves``.

    Args:
      params: the params.
      signal: a tree like ``params``, a function that makes one, or None.
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves.
      structure, layout: as methods take them.
      key: PRNG key for random choices.
      what: what to call the signal in errors.

    Raises:
      ValueError: for a signal that lacks one of these leaves or has another shape there.
    """
    leaves, treedef = jax.tree.flatten(params)
    named = zip(leaf_paths(params), leaves, signals_of(signal, params, what), treedef.flatten_up_to(masks), strict=True)
    sparse = [leaf for leaf in named if not is_masked_node(leaf[3])]
    units = jax.tree.leaves(mask_structures(structure, params, masks, layout=layout, quiet=True))
    layouts = leaf_layouts(params, layout)
    layers = []
    for i, ((path, weight, given, mask), unit) in enumerate(zip(sparse, units, strict=True)):
        if signal is not None and given is None:
            raise ValueError(f"there is no {what} of {path}: use an optimizer that stores one, or decay=")
        if given is not None and given.parts[0].shape != weight.shape:
            raise ValueError(f"{what} of {path}: expected shape {weight.shape}, got {given.parts[0].shape}")
        odd = unit.unit_size(weight.shape) == 1 and not layouts[path].is_plain(weight.ndim)
        layers.append(Layer(path, weight, given, mask, unit, layouts[path] if odd else None, i, key))
    return layers


def on_units(layers: Sequence[Layer], rule: Rule, *columns: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Applies a rule to units in place of weights, together to the layers that can exchange units: those of one size.

    Units have the mean of their weights' absolute values, and of their signals'. (Signed ones would cancel. Layers
    compare their means, whatever score their units have elsewhere.) Layers that keep n of every m exchange nothing and
    are given to the rule by themselves: ``layers[0].structure.exchanges`` says so.

    Args:
      layers: of single weights, of :func:`layers_of`.
      rule: sees layers whose arrays have an entry for each unit, and their entries of the columns.
      *columns: arrays of shape (layers,).

    Returns:
      The new masks of the layers, of single weights, and which layers rest, bool, (layers,).
    """
    masks: list[Any] = [None] * len(layers)
    resting = jnp.zeros(len(layers), bool)
    together: dict[Hashable, list[int]] = {}
    for i, layer in enumerate(layers):
        of_size = layer.structure.unit_size(layer.mask.shape)
        together.setdefault(of_size if layer.structure.exchanges else None, []).append(i)
    for size, members in together.items():
        leaves, chosen = [layers[i] for i in members], np.asarray(members)
        units = leaves if size in (1, None) else _in_units(leaves)
        new, rest = rule(units, *(column[chosen] for column in columns))
        if size not in (1, None):
            new = each(leaves, lambda leaves, new: [leaf.structure.expand(units, leaf.mask)
                                                    for leaf, units in zip(leaves, new, strict=True)], new)  # fmt: skip
        for i, mask in zip(members, new, strict=True):
            masks[i] = mask
        resting = resting.at[chosen].set(rest)
    return masks, resting


def each(layers: Sequence[Layer], function: Callable[..., Any], *columns: Any) -> Any:
    """Computes something of every layer by itself, compiled once for layers that repeat one another.

    A deep network has the same layer many times: leaves of one shape whose paths differ in numbers alone. Those are
    stacked, which copies them, kind by kind, and ``function`` is vmapped over the stack. All others are given to it
    together, as they are.

    Args:
      layers: the layers.
      function: from some of the layers, and their entries of the columns, to a result or a tuple of results. A result
        is an array of shape (layers,), or a list with an array for each layer.
      *columns: arrays of shape (layers,), or lists with an array for each layer.

    Returns:
      The results of ``function`` for all layers.
    """
    repeated = stacks(layers)
    single = sorted({*range(len(layers))} - {i for members in repeated for i in members})
    found = []
    for members in repeated:
        found.append((members, _side_by_side([layers[i] for i in members], function, _entries(columns, members))))
    if single or not layers:
        found.append((single, function([layers[i] for i in single], *_entries(columns, single))))
    if len(found) == 1:
        return found[0][1]
    order = np.argsort([i for members, _ in found for i in members])
    parts = [part if isinstance(part, tuple) else (part,) for _, part in found]
    results = tuple(_joined(result, order) for result in zip(*parts, strict=True))
    return results if isinstance(found[0][1], tuple) else results[0]


def stacks(layers: Sequence[Layer]) -> list[list[int]]:
    """The numbers of the layers that repeat one another often enough to be stacked, kind by kind.

    Layers of one kind have the same shapes and types, and paths that differ in numbers alone: by their shapes only,
    leaves that are sharded in different ways would have to move between devices.
    None outside of jit, where nothing is compiled for all of them, nor on meshes with explicit axes.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, layer in enumerate(layers):
        arrays = [layer.weight, layer.mask, *(layer.given.parts if layer.given else ())]
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in arrays)
        # A loop that is vmapped refuses carries with explicit shardings.
        if traced and not any(any(jax.typeof(leaf).sharding.spec) for leaf in arrays):
            path = re.sub(r"\d+", "#", layer.path)
            kind = path, layer.structure, layer.layout, layer.kind, *map(jax.typeof, arrays)
            kinds.setdefault(kind, []).append(i)
    return [members for members in kinds.values() if len(members) >= _REPEATED]


def _side_by_side(layers: list[Layer], function: Callable[..., Any], columns: list[Any]) -> Any:
    """The results of a function for layers that repeat one another."""
    rows = [
        (layer.weight, layer.mask, layer.given.parts if layer.given else (),
         [column[i] for column in columns if isinstance(column, list)])
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    forms: list[tuple[bool, list[bool]]] = []  # what the function returns

    def of_one(row, index, entries):
        weight, mask, parts, arrays = row
        given = layers[0].given and layers[0].given._replace(parts=parts)
        layer = layers[0]._replace(weight=weight, mask=mask, given=given, index=index)
        array, entry = iter(arrays), iter(entries)
        result = function([layer], *([next(array)] if isinstance(c, list) else next(entry)[None] for c in columns))
        parts = result if isinstance(result, tuple) else (result,)
        forms.append((isinstance(result, tuple), [isinstance(part, list) for part in parts]))
        return [part[0] for part in parts]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    numbers = jnp.asarray([layer.index for layer in layers])
    vectors = [column for column in columns if not isinstance(column, list)]
    results = jax.vmap(of_one)(stacked, numbers, vectors)
    is_tuple, lists = forms[0]
    results = [list(result) if is_list else result for result, is_list in zip(results, lists, strict=True)]
    return tuple(results) if is_tuple else results[0]


def _entries(columns: Sequence[Any], members: list[int]) -> list[Any]:
    """The entries of some layers in every column."""
    return [[column[i] for i in members] if isinstance(column, list) else column[np.asarray(members, int)]
            for column in columns]  # fmt: skip


def _joined(parts: Sequence[Any], order: np.ndarray) -> Any:
    if isinstance(parts[0], list):
        flat = [entry for part in parts for entry in part]
        return [flat[i] for i in order]
    return jnp.concatenate(parts)[order]


def _in_units(layers: list[Layer]) -> list[Layer]:
    layers = [layer._replace(structure=dataclasses.replace(layer.structure, score="mean")) for layer in layers]

    def scored(layers):
        weights = [unit_scores(layer.structure, layer.weight) for layer in layers]
        masks = [layer.structure.units(layer.mask) for layer in layers]
        if layers[0].given is None:
            return weights, masks
        return weights, masks, [unit_scores(layer.structure, layer.signal) for layer in layers]

    weights, masks, *signals = each(layers, scored)
    units = [layer._replace(weight=w, mask=mask) for layer, w, mask in zip(layers, weights, masks, strict=True)]
    if not signals:
        return units
    return [unit._replace(given=Signal((signal,), unit.kind)) for unit, signal in zip(units, signals[0], strict=True)]
