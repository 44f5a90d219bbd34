"""Layers: leaves with masks at a mask update, and their units as a rule sees them."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.reductions import count_true
from jaxsparse.structures import Structure, StructureLike, mask_structures, unit_scores
from jaxsparse.transforms.chain import Signal, signals_of
from jaxsparse.trees import is_masked_node, leaf_paths

__all__ = [
    "Column", "Layer", "Layers", "Rule", "Stack", "as_layers", "counts", "each", "joined", "layers_of", "on_units",
]  # fmt: skip

_REPEATED = 3  # layers of one kind, from which on they compile faster as a stack
_LARGE = 1 << 20  # weights of a layer, above which a copy costs more memory than compiling once is worth


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


class Stack(NamedTuple):
    """Layers that repeat one another, as one.

    Attributes:
      members: their numbers.
      layer: a layer whose arrays have an axis more, the first, and whose index is a vector.
      shapes: of the members, where the stack has their arrays as matrices of another shape; else None.
    """

    members: tuple[int, ...]
    layer: Layer
    shapes: tuple[tuple[int, ...], ...] | None


class Column(Sequence):
    """Arrays, one for each layer, in the order of the layers; those of layers that repeat one another as one stack.

    Attributes:
      members: for each part, the numbers of its layers: one, or those of a stack.
      parts: an array for each; stacks have an axis more, the first.
      shapes: for each part the shapes of its arrays, where a stack has them in another shape; else None.
    """

    def __init__(self, members: Iterable[Sequence[int]], parts: Iterable[jax.Array], shapes: Iterable[Any]):
        self.members, self.parts, self.shapes = [tuple(numbers) for numbers in members], list(parts), list(shapes)
        self._place = {i: (part, row) for part, numbers in enumerate(self.members) for row, i in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        part, row = self._place[range(len(self))[i]]
        array = self.parts[part] if len(self.members[part]) == 1 else self.parts[part][row]
        return array.reshape(self.shapes[part][row]) if self.shapes[part] else array

    def __iter__(self):
        arrays: list[Any] = [None] * len(self)
        longest = max(map(len, self.members), default=0)
        traced = longest > 1 and any(isinstance(part, jax.core.Tracer) for part in self.parts)
        rows = _unknown(longest) if traced else range(longest)
        for members, part, shapes in zip(self.members, self.parts, self.shapes, strict=True):
            for i, row, shape in zip(members, rows[: len(members)], shapes or [None] * len(members), strict=True):
                array = part if len(members) == 1 else jax.lax.dynamic_index_in_dim(part, row, keepdims=False)
                arrays[i] = array if shape is None else array.reshape(shape)
        return iter(arrays)

    def some(self, chosen: Sequence[int]) -> "Column":
        """The column of some layers, of the whole of every stack."""
        number = {i: place for place, i in enumerate(chosen)}
        parts = [part for part in zip(self.members, self.parts, self.shapes, strict=True) if part[0][0] in number]
        return Column([[number[i] for i in part[0]] for part in parts], *([part[k] for part in parts] for k in (1, 2)))


class Layers(list):
    """The layers of one mask update, a list of :class:`Layer`. Those that repeat one another are computed as a stack.

    A deep network has the same layer many times. Leaves of one size are stacked, which copies them and compiles once
    for all of them, as matrices of one shape if their structure does not ask where in its leaf a weight is. On a mesh
    only leaves of one shape are, whose paths differ in numbers alone: leaves that are sharded in different ways would
    have to move between devices. Not stacked are leaves of more than a million weights, nor any outside of jit, where
    nothing is compiled for all of them, nor on meshes with explicit axes.
    """

    def __init__(self, layers: Iterable[Layer], stacks: Sequence[Stack] | None = None, *, flat: bool = True):
        super().__init__(layers)
        self._flat = flat
        if stacks is not None:
            self.stacks = list(stacks)

    @functools.cached_property
    def stacks(self) -> list[Stack]:
        """The layers that repeat one another often enough, kind by kind."""
        kinds: dict[Hashable, list[int]] = {}
        flat: dict[Hashable, bool] = {}
        for i, layer in enumerate(self):
            kind, is_flat = _kind(layer, self._flat)
            if kind is not None:
                kinds.setdefault(kind, []).append(i)
                flat[kind] = is_flat
        repeated = {kind: members for kind, members in kinds.items() if len(members) >= _REPEATED}
        return [_stack(tuple(members), [self[i] for i in members], flat[kind]) for kind, members in repeated.items()]

    @functools.cached_property
    def single(self) -> list[int]:
        """The numbers of the layers outside of stacks."""
        return sorted({*range(len(self))} - {i for stack in self.stacks for i in stack.members})

    @functools.cached_property
    def shaped(self) -> "Layers":
        """The same layers, all in their own shapes, for a function that asks where in its leaf a weight is."""
        return self if all(stack.shapes is None for stack in self.stacks) else Layers(self, flat=False)

    def column(self, arrays: Sequence[jax.Array]) -> Column:
        """Arrays, one for each layer, in the form in which these layers are computed."""
        form = [*((stack.members, stack.shapes) for stack in self.stacks), *(((i,), None) for i in self.single)]
        if isinstance(arrays, Column):
            if form == list(zip(arrays.members, arrays.shapes, strict=True)):
                return arrays
            arrays = list(arrays)
        parts = [arrays[members[0]] if len(members) == 1
                 else jnp.stack([_rows(arrays[i]) if shapes else arrays[i] for i in members])
                 for members, shapes in form]  # fmt: skip
        return Column([members for members, _ in form], parts, [shapes for _, shapes in form])

    def with_masks(self, masks: Sequence[jax.Array]) -> "Layers":
        """The same layers with other masks."""
        column = self.column(masks)  # whose first parts are those of the stacks
        stacks = [stack._replace(layer=stack.layer._replace(mask=part))
                  for stack, part in zip(self.stacks, column.parts, strict=False)]  # fmt: skip
        layers = [layer._replace(mask=column[i]) for i, layer in enumerate(self)]
        return Layers(layers, stacks, flat=self._flat)

    def some(self, chosen: Sequence[int]) -> "Layers":
        """Some of the layers, the whole of every stack."""
        number = {i: place for place, i in enumerate(chosen)}
        stacks = [stack._replace(members=tuple(number[i] for i in stack.members)) for stack in self.stacks
                  if stack.members[0] in number]  # fmt: skip
        return Layers([self[i] for i in chosen], stacks, flat=self._flat)


def as_layers(layers: Sequence[Layer]) -> Layers:
    """Layers as those that repeat one another are found in."""
    return layers if isinstance(layers, Layers) else Layers(layers)


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
) -> Layers:
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
    sparse = with_signals(params, signal, masks, what)
    units = jax.tree.leaves(mask_structures(structure, params, masks, layout=layout, quiet=True))
    layouts = leaf_layouts(params, layout)
    layers = []
    for i, ((path, weight, given, mask), unit) in enumerate(zip(sparse, units, strict=True)):
        odd = unit.unit_size(weight.shape) == 1 and not layouts[path].is_plain(weight.ndim)
        layers.append(Layer(path, weight, given, mask, unit, layouts[path] if odd else None, i, key))
    return Layers(layers)


def with_signals(params: Any, signal: Any, masks: Any, what: str) -> list[tuple[str, Any, Signal | None, Any]]:
    """The leaves that have masks: path, weight, signal and mask. The arguments and errors of :func:`layers_of`."""
    leaves, treedef = jax.tree.flatten(params)
    named = zip(leaf_paths(params), leaves, signals_of(signal, params, what), treedef.flatten_up_to(masks), strict=True)
    sparse = [leaf for leaf in named if not is_masked_node(leaf[3])]
    for path, weight, given, _ in sparse:
        if signal is not None and given is None:
            hint = ": use an optimizer that stores one, or decay=" if what == "momentum" else (
                f": if it is not trained, leave it out by prunable=jaxsparse.all_but({path!r})")  # fmt: skip
            raise ValueError(f"there is no {what} of {path}{hint}")
        if given is not None and given.parts[0].shape != weight.shape:
            raise ValueError(f"{what} of {path}: expected shape {weight.shape}, got {given.parts[0].shape}")
    return sparse


def on_units(layers: Layers, rule: Rule, *columns: jax.Array) -> tuple[Column, jax.Array]:
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
    layers, found = as_layers(layers), []
    resting = jnp.zeros(len(layers), bool)
    together: dict[Hashable, list[int]] = {}
    for i, layer in enumerate(layers):
        of_size = layer.structure.unit_size(layer.mask.shape)
        together.setdefault(of_size if layer.structure.exchanges else None, []).append(i)
    for size, numbers in together.items():
        leaves, chosen = layers if len(together) == 1 else layers.some(numbers), np.asarray(numbers)
        units = leaves if size in (1, None) else _in_units(leaves)
        new, rest = rule(units, *(columns if len(together) == 1 else [column[chosen] for column in columns]))
        if size not in (1, None):
            new = each(leaves, lambda leaves, new: [leaf.structure.expand(units, leaf.mask)
                                                    for leaf, units in zip(leaves, new, strict=True)], new)  # fmt: skip
        found.append((numbers, leaves.column(new)))
        resting = rest if len(together) == 1 else resting.at[chosen].set(rest)
    return joined(found), resting


def each(layers: Sequence[Layer], function: Callable[..., Any], *columns: Any) -> Any:
    """Computes something of every layer by itself, compiled once for layers that repeat one another.

    ``function`` is vmapped over each stack of :class:`Layers`. All other layers are given to it together.

    Args:
      layers: the layers.
      function: from some of the layers, and their entries of the columns, to a result or a tuple of results. A result
        is an array of shape (layers,), or a list with an array for each layer.
      *columns: arrays of shape (layers,), or lists with an array for each layer.

    Returns:
      The results of ``function`` for all layers; a list comes as a :class:`Column`.
    """
    layers = as_layers(layers)
    if not layers.stacks:
        return function(list(layers), *(list(c) if isinstance(c, Column) else c for c in columns))
    columns = tuple(c if isinstance(c, (jax.Array, np.ndarray)) else layers.column(c) for c in columns)
    members: list[Sequence[int]] = []
    found = []
    for number, stack in enumerate(layers.stacks):
        members.append(stack.members)
        entries = [c.parts[number] if isinstance(c, Column) else c[np.asarray(stack.members)] for c in columns]
        found.append(_side_by_side(stack, function, entries, [isinstance(c, Column) for c in columns]))
    if layers.single:
        members += [(i,) for i in layers.single]
        entries = [[c[i] for i in layers.single] if isinstance(c, Column) else c[np.asarray(layers.single)]
                   for c in columns]  # fmt: skip
        result = function([layers[i] for i in layers.single], *entries)
        parts = result if isinstance(result, tuple) else (result,)
        found.append([([(x, None) for x in part] if isinstance(part, (list, Column)) else part) for part in parts])
    is_tuple, order = isinstance(found[0], tuple), np.argsort([i for numbers in members for i in numbers])
    results = tuple(_joined(result, members, order) for result in zip(*found, strict=True))
    return results if is_tuple else results[0]


def counts(layers: Sequence[Layer], masks: Sequence[jax.Array] | None = None) -> jax.Array:
    """The number of weights that the mask of each layer, or another mask for each, keeps: int32, (layers,)."""

    def counted(layers, masks=None):
        masks = [layer.mask for layer in layers] if masks is None else masks
        return jnp.stack(list(map(count_true, masks))) if masks else jnp.zeros(0, jnp.int32)

    return each(layers, counted, *([] if masks is None else [masks]))


def joined(columns: Iterable[tuple[Sequence[int], Column]]) -> Column:
    """The columns of some layers, given with their numbers, as one."""
    columns = list(columns)
    members = [[numbers[i] for i in part] for numbers, column in columns for part in column.members]
    parts = [part for _, column in columns for part in column.parts]
    return Column(members, parts, [shapes for _, column in columns for shapes in column.shapes])


def _kind(layer: Layer, flat: bool) -> tuple[Hashable, bool]:
    """A key that the layers of one stack share, None for a layer in no stack; and whether any shape will do."""
    arrays = [layer.weight, layer.mask, *(layer.given.parts if layer.given else ())]
    types = [jax.typeof(leaf) for leaf in arrays]
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in arrays) or any(any(of.sharding.spec) for of in types):
        return None, False  # (a loop that is vmapped refuses carries with explicit shardings)
    if layer.size > _LARGE:
        return None, False
    if flat and not layer.structure.positional and layer.size % 8 == 0 and all(of.sharding.mesh.empty for of in types):
        return (layer.size, layer.kind, *(of.dtype for of in types)), True
    on_mesh = any(jax.sharding.AxisType.Auto in (of.sharding.mesh.axis_types or ()) for of in types)
    path = re.sub(r"\d+", "#", layer.path) if on_mesh else None
    return (path, layer.structure, layer.layout, layer.kind, *types), False


def _stack(members: tuple[int, ...], layers: list[Layer], flat: bool) -> Stack:
    rows = [(layer.weight, layer.mask, layer.given.parts if layer.given else ()) for layer in layers]
    stack = jax.tree.map(lambda *leaves: jnp.stack([_rows(x) if flat else x for x in leaves]), *rows)
    layer = layers[0]._replace(index=jnp.asarray([layer.index for layer in layers]))
    if flat:
        layer = layer._replace(structure=dataclasses.replace(layer.structure, layout=None), layout=None)
    return Stack(members, _with(layer, *stack), tuple(layer.mask.shape for layer in layers) if flat else None)


def _rows(x: jax.Array) -> jax.Array:
    """An array as a matrix whose shape follows from its size."""
    return x.reshape(-1, math.gcd(x.size, 1024))


def _with(layer: Layer, weight: jax.Array, mask: jax.Array, parts: tuple[jax.Array, ...]) -> Layer:
    return layer._replace(weight=weight, mask=mask, given=layer.given and layer.given._replace(parts=parts))


def _side_by_side(stack: Stack, function: Callable[..., Any], columns: list[jax.Array], lists: list[bool]) -> Any:
    """The results of a function for the layers of a stack; lists as pairs of a stack and the shapes in it."""
    forms: list[tuple[bool, list[bool]]] = []  # what the function returns

    def of_one(arrays, index, entries):
        layer = _with(stack.layer, *arrays)._replace(index=index)
        given = [[entry] if is_list else entry[None] for entry, is_list in zip(entries, lists, strict=True)]
        result = function([layer], *given)
        parts = result if isinstance(result, tuple) else (result,)
        forms.append((isinstance(result, tuple), [isinstance(part, (list, Column)) for part in parts]))
        return [part[0] for part in parts]

    layer = stack.layer
    arrays = layer.weight, layer.mask, layer.given.parts if layer.given else ()
    results = jax.vmap(of_one)(arrays, layer.index, columns)
    is_tuple, are_lists = forms[0]
    flat = [stack.shapes if x.shape == layer.mask.shape else None for x in results]
    pairs = [[(x, shapes)] if is_list else x for x, shapes, is_list in zip(results, flat, are_lists, strict=True)]
    return tuple(pairs) if is_tuple else pairs


def _joined(parts: Sequence[Any], members: list[Sequence[int]], order: np.ndarray) -> Any:
    if isinstance(parts[0], list):
        pairs = [pair for part in parts for pair in part]
        return Column(members, *zip(*pairs, strict=True))
    vector = jnp.concatenate(parts)
    return vector if (order == np.arange(len(order))).all() else vector[order]


def _unknown(count: int) -> list[jax.Array]:
    """The numbers below ``count``, which XLA does not know, so that it compiles one slice for all of them."""
    start = [jnp.uint32(i) for i in range(count)]
    return jax.lax.while_loop(  # which never runs
        lambda numbers: numbers[0] > count, lambda numbers: [*numbers[1:], numbers[0]], start
    )


def _in_units(layers: Layers) -> Layers:
    def seen(layer):
        return layer._replace(structure=dataclasses.replace(layer.structure, score="mean"))

    def scored(layers):
        weights = [unit_scores(layer.structure, layer.weight) for layer in layers]
        masks = [layer.structure.units(layer.mask) for layer in layers]
        if layers[0].given is None:
            return weights, masks
        return weights, masks, [unit_scores(layer.structure, layer.signal) for layer in layers]

    layers = Layers(map(seen, layers), [stack._replace(layer=seen(stack.layer)) for stack in layers.stacks])
    weights, masks, *signals = (layers.column(arrays) for arrays in each(layers, scored))

    def in_units(layer, part):
        given = layer.given and Signal((part(signals[0]),), layer.kind)
        return layer._replace(weight=part(weights), mask=part(masks), given=given)

    return Layers(
        [in_units(layer, lambda column, i=i: column[i]) for i, layer in enumerate(layers)],
        [stack._replace(layer=in_units(stack.layer, lambda column, i=i: column.parts[i]))
         for i, stack in enumerate(layers.stacks)],
    )  # fmt: skip
