"""Groups of channels: the slices of several leaves that one gate multiplies, or that are removed together.

Removing a channel of a convolution affects several leaves at once: a filter of its kernel, an entry of its bias and of
the batch normalisation that follows, an input slice of the next layer. A :class:`Group` lists them.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.trees import as_array, by_path, is_masked_node

__all__ = ["Group", "Slice", "entries", "group_sizes"]


class Slice(NamedTuple):
    """The entries of one leaf along an axis, with the channel to which each belongs.

    Attributes:
      path: the path of the leaf.
      axis: the axis, or several in rising order: of a leaf with stacked layers (layers, inputs, outputs), (0, 2) has
        channels of its own for every layer.
      channels: the channel of each entry along the axis, -1 for an entry of no channel of this group. For several axes,
        of all their combinations, of which the last axis varies fastest. None: 0, 1, ..., size - 1, again and again.
    """

    path: str
    axis: int | tuple[int, ...]
    channels: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        channels = self.channels
        if channels is not None and len(channels) > 8:
            shown = f"({', '.join(map(str, channels[:3]))}, ..., {channels[-1]})"
        else:
            shown = repr(channels)
        return f"Slice({self.path!r}, {self.axis!r}{'' if channels is None else f', {shown}'})"


Slices: TypeAlias = tuple[Slice, ...]
SlicesLike: TypeAlias = Mapping[str, int | tuple[int, Sequence[int]]] | Sequence[Slice | tuple]


@dataclasses.dataclass(frozen=True, init=False)
class Group:
    """The channels at one point of a network, each with one gate.

    :func:`jaxsparse.trace.channel_groups` derives the groups of any model. To write one by hand, *multiply* these
    slices to multiply the output of a channel:

    * with batch normalisation: its scale and its bias (before a ReLU this is the same as after it);
    * without batch normalisation: the filter, the last axis of the kernel, and its bias;
    * for the inputs of a dense layer: the first axis of its kernel.

    Never multiply a filter that batch normalisation follows, because normalisation would cancel the factor.

    Attributes:
      name: the name of the group, such as ``"conv1"``, unique among the groups.
      multiplies: what the gates multiply: leaf path -> axis, or :class:`Slice` objects, which may also name several
        axes of one leaf and the channel of each entry. Kept as a tuple of them.
      removes: that from which closed channels are removed, and along which they are counted, in the same form. An axis
        may be a multiple of the group's size, as after flattening images (height, width, channels), where channels
        vary fastest. For any other order use path -> (axis, channels), with the channel of each entry. List leaves
        that are multiplied here too if they shrink.
      kernel: the path of the kernel whose weights a penalty counts: the one that makes the channels, or, if inputs are
        gated, the one that reads them. None: the kernel that is multiplied, or else the first that loses outputs.
      size: the number of channels. None: the length of the first axis that is multiplied.
      closed_by: choices of slices: a channel whose slices of any one choice are zero counts for nothing. None: all that
        is multiplied.
      sums: the places of the program where the channels are summed, as for a mean, which is over their full number.
      exact: whether a walk through the program has shown that ``closed_by`` holds.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {
      ...     "conv": {"kernel": jnp.ones((3, 3, 1, 8))},
      ...     "norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
      ...     "fc": {"kernel": jnp.ones((4 * 4 * 8, 10)), "bias": jnp.zeros(10)},
      ... }
      >>> group = Group(
      ...     "conv",
      ...     multiplies={"norm/scale": 0, "norm/bias": 0},
      ...     removes={"conv/kernel": -1, "norm/scale": 0, "norm/bias": 0, "fc/kernel": 0},
      ... )
      >>> group_sizes([group], params)
      (8,)
      >>> heads = Group("heads", [Slice("out", 0, (0, 0, 1, 1, -1))])  # the last row has no gate
      >>> group_sizes([heads], {"out": jnp.ones((5, 3))})
      (2,)
    """

    name: str
    multiplies: Slices
    removes: Slices
    kernel: str | None
    size: int | None
    closed_by: tuple[Slices, ...]
    sums: tuple[str, ...]
    exact: bool

    def __init__(
        self,
        name: str,
        multiplies: SlicesLike,
        removes: SlicesLike = (),
        kernel: str | None = None,
        size: int | None = None,
        closed_by: Sequence[SlicesLike] | None = None,
        sums: Sequence[str] = (),
        exact: bool = False,
    ):
        who = f"group {name!r}"
        gated = _slices(multiplies, f"{who}: multiplies")
        choices = (gated,) if closed_by is None else tuple(_slices(one, f"{who}: closed_by") for one in closed_by)
        fields = (name, gated, _slices(removes, f"{who}: removes"), kernel, size, choices, tuple(sums), exact)
        for field, value in zip(dataclasses.fields(self), fields, strict=True):
            object.__setattr__(self, field.name, value)


def _slices(given: SlicesLike, who: str) -> Slices:
    """Slices of a mapping or a sequence of them."""
    if isinstance(given, Mapping):
        given = [(path, *axis) if isinstance(axis, tuple) else (path, axis) for path, axis in given.items()]
    found = []
    for one in given:
        if not isinstance(one, tuple) or not 2 <= len(one) <= 3 or not isinstance(one[0], str):
            raise ValueError(f"{who} must map paths to axes, or be jaxsparse.groups.Slice objects, got {one!r}")
        path, axis, channels = Slice(*one)
        if channels is not None:
            channels = tuple(np.asarray(channels, np.int64).ravel().tolist())
        found.append(Slice(path, tuple(axis) if isinstance(axis, list | tuple) else axis, channels))
    return tuple(found)


def group_sizes(groups: Sequence[Group], params: Any) -> tuple[int, ...]:
    """Check that groups fit the params, and count the channels of each.

    Args:
      groups: the groups.
      params: the params or their shapes. If parts of them are hidden by ``optax.MaskedNode()``, ``removes`` may name
        hidden leaves, but ``multiplies`` may not.

    Raises:
      ValueError: naming the group and the leaf, for unknown paths, axes that a leaf does not have, sizes that do not
        agree, a leaf that two groups multiply, two groups of the same name, and a filter that is multiplied although
        batch normalisation follows.
    """
    if isinstance(groups, Group):
        raise ValueError(f"groups must be a sequence of jaxsparse.Group, got a single one, {groups.name!r}: [group]")
    groups = tuple(groups)
    if not groups or not all(isinstance(group, Group) for group in groups):
        raise ValueError(f"groups must be one or more jaxsparse.Group, got {groups!r}")
    leaves = {  # functions may be among them, as in Equinox modules
        path: as_array(path, leaf) if isinstance(leaf, bool | int | float | complex) else leaf
        for path, leaf in by_path(params).items()
    }
    partial = any(map(is_masked_node, jax.tree.leaves(params, is_leaf=is_masked_node)))
    names = [group.name for group in groups]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two groups have the name {', '.join(map(repr, twice))}")
    multiplied: dict[tuple, list[tuple[str, np.ndarray]]] = {}
    sizes = []
    for group in groups:
        who = f"group {group.name!r}"
        if not group.multiplies:
            raise ValueError(f"{who} multiplies nothing: its gates would have no effect")
        size = _size(group, leaves, who)
        for which in group.multiplies:
            if not jnp.issubdtype(leaves[which.path].dtype, jnp.floating):
                raise ValueError(
                    f"{who} multiplies {which.path} of dtype {leaves[which.path].dtype}: only floats have gates"
                )
            axes, channels = entries(which, leaves[which.path].shape, size)
            for other, theirs in multiplied.setdefault((which.path, axes), []):
                if _overlap(channels, theirs):
                    raise ValueError(f"{who} and group {other!r} overlap: both multiply {which.path}")
            multiplied[which.path, axes].append((group.name, channels))
        for which in group.removes:
            if not partial or which.path in leaves:
                _check_channels(which, leaves, size, who, ", from which they are removed,")
        if group.kernel is not None:
            _lengths(leaves, Slice(group.kernel, -1), who)
        if not group.exact:
            _refuse_filters_before_a_norm(group, leaves, who)
        sizes.append(size)
    return tuple(sizes)


def _size(group: Group, leaves: Mapping[str, Any], who: str) -> int:
    """The number of channels of a group, whose multiplied slices agree on it."""
    first, *others = group.multiplies
    length = math.prod(_lengths(leaves, first, who))
    size = group.size or (length if first.channels is None else max(first.channels, default=-1) + 1)
    if not size:
        raise ValueError(f"{who} has no channels: {first.path} has shape {tuple(leaves[first.path].shape)}")
    for which in others:
        length = math.prod(_lengths(leaves, which, who))
        if which.channels is None and (length % size or not length):
            raise ValueError(
                f"{who}: {which.path} has {length} channels where it is multiplied, but {first.path} has {size}"
            )
    for which in group.multiplies:
        _check_channels(which, leaves, size, who, " where it is multiplied")
    return size


def _check_channels(which: Slice, leaves: Mapping[str, Any], size: int, who: str, where: str) -> None:
    """Refuse channel numbers that do not fit the leaf or the size of the group."""
    length, channels = math.prod(_lengths(leaves, which, who)), which.channels
    if channels is not None:
        least, largest = min(channels, default=0), max(channels, default=0)
        if len(channels) != length or least < -1 or largest >= size:
            raise ValueError(
                f"{who}: axis {which.axis} of {which.path} has {length} entries, so it needs {length} channel numbers "
                f"from 0 to {size - 1}, got {len(channels)} from {least} to {largest} (-1: no channel)"
            )
    if channels is None and length % size:
        raise ValueError(
            f"{who} has {size} channels, but axis {which.axis} of {which.path}{where} has length {length}, which is "
            f"not a multiple of {size}"
        )


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two groups have the same channels where both have any: heads and their inner dimensions do not."""
    both = (a >= 0) & (b >= 0)
    return bool(both.any()) and bool((first_places(a[both]) == first_places(b[both])).all())


def first_places(numbers: np.ndarray) -> np.ndarray:
    """For each entry the place where its number comes first: the same for numbers that are only renamed."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def entries(which: Slice, shape: Sequence[int], size: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The axes of a :class:`Slice` and the channel of each of their entries.

    Args:
      which: the slice.
      shape: the shape of its leaf.
      size: the number of channels of its group.

    Returns:
      (axes, channels): the axes, >= 0, mostly one; the channels, int, an axis for each of them; -1 for none.

    Examples:
      >>> entries(Slice("fc/kernel", -2), (6, 5), 3)
      ((0,), array([0, 1, 2, 0, 1, 2]))
    """
    axes = tuple(axis % len(shape) for axis in (which.axis if isinstance(which.axis, tuple) else (which.axis,)))
    lengths = [shape[axis] for axis in axes]
    channels = np.arange(math.prod(lengths)) % size if which.channels is None else np.asarray(which.channels)
    return axes, channels.reshape(lengths)


def of_entries(channels: Any, numbers: np.ndarray) -> Any:
    """Values of channels, for each entry, and 1 for entries of no channel; arrays of NumPy or JAX."""
    if (numbers >= 0).all():
        return channels[numbers]
    xp: Any = np if isinstance(channels, np.ndarray) else jnp
    return xp.append(channels, xp.ones(1, channels.dtype))[numbers]


def _lengths(leaves: Mapping[str, Any], which: Slice, who: str) -> list[int]:
    """The lengths of the axes of a slice, which must be there."""
    path, axis, _ = which
    if path not in leaves:
        near = difflib.get_close_matches(path, leaves, n=3, cutoff=0.4) or list(leaves)[:3]
        raise ValueError(f"{who} names {path!r}, which the params do not have; they have {', '.join(near)}, ...")
    shape, axes = leaves[path].shape, axis if isinstance(axis, tuple) else (axis,)
    for one in axes:
        if isinstance(one, bool) or not isinstance(one, int) or not -len(shape) <= one < len(shape):
            raise ValueError(f"{who} names axis {one!r} of {path}, whose shape is {tuple(shape)}")
    places = [one % len(shape) for one in axes]
    if not axes or places != sorted(set(places)):
        raise ValueError(f"{who} names axes {axes} of {path}: several axes must be in rising order")
    return [shape[one] for one in places]


def _refuse_filters_before_a_norm(group: Group, leaves: Mapping[str, Any], who: str) -> None:
    filters = [
        path
        for path, axis, _ in group.multiplies
        if leaves[path].ndim > 1 and isinstance(axis, int) and axis % leaves[path].ndim > 0
    ]
    norms = [path for path, *_ in [*group.removes, *group.multiplies] if path.rpartition("/")[2] == "scale"]
    if filters and norms:
        raise ValueError(
            f"{who} multiplies the filters {filters[0]}, but their outputs are normalised ({norms[0]}), which "
            f"cancels the factor: multiply {norms[0]} and its bias instead"
        )
