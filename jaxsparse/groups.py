"""Groups of channels: the slices of several leaves that one gate multiplies, or that are removed together.

Removing a channel of a convolution affects several leaves at once: a filter of its kernel, an entry of its bias and of
the batch normalisation that follows, an input slice of the next layer. A :class:`Group` lists them.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.tables import Table, Tabular
from jaxsparse.trees import by_path, is_masked_node, natural_order

__all__ = ["Group", "Remaining", "entries", "expected_counts", "group_sizes", "remaining"]


@dataclasses.dataclass(frozen=True)
class Group:
    """The channels at one point of a network, each with one gate.

    To multiply the output of a channel, *multiply* these slices:

    * with batch normalisation: its scale and its bias (before a ReLU this is the same as after it);
    * without batch normalisation: the filter, the last axis of the kernel, and its bias;
    * for the inputs of a dense layer: the first axis of its kernel.

    Never multiply a filter that batch normalisation follows, because normalisation would cancel the factor.

    Attributes:
      name: the name of the group, such as ``"conv1"``, unique among the groups.
      multiplies: leaf path -> the axis along which the gates multiply it. All these axes have the size of the group.
      removes: leaf path -> the axis from which closed channels are removed, and along which they are counted. Its
        length may be a multiple of the group's size, as after flattening images (height, width, channels), where
        channels vary fastest. For any other order use (axis, channels), with the channel of each entry. List leaves
        that are multiplied here too if they shrink.
      kernel: the path of the kernel whose weights a penalty counts: the one that makes the channels, or, if inputs are
        gated, the one that reads them. None: the kernel that is multiplied, or else the first that loses outputs.

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
    """

    name: str
    multiplies: Mapping[str, int]
    removes: Mapping[str, int | tuple[int, Sequence[int]]] = dataclasses.field(default_factory=dict)
    kernel: str | None = None


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
    leaves = by_path(params)
    partial = any(map(is_masked_node, jax.tree.leaves(params, is_leaf=is_masked_node)))
    names = [group.name for group in groups]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two groups have the name {', '.join(map(repr, twice))}")
    multiplied: dict[str, str] = {}
    sizes = []
    for group in groups:
        who = f"group {group.name!r}"
        if not group.multiplies:
            raise ValueError(f"{who} multiplies nothing: its gates would have no effect")
        lengths = {path: _length(leaves, path, axis, who) for path, axis in group.multiplies.items()}
        first, size = next(iter(lengths.items()))
        if not size:
            raise ValueError(f"{who} has no channels: {first} has shape {tuple(leaves[first].shape)}")
        for path, length in lengths.items():
            if path in multiplied:
                raise ValueError(f"{who} and group {multiplied[path]!r} overlap: both multiply {path}")
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
                raise ValueError(f"{who} multiplies {path} of dtype {leaves[path].dtype}: only floats have gates")
            if length != size:
                raise ValueError(f"{who}: {path} has {length} channels where it is multiplied, but {first} has {size}")
            multiplied[path] = group.name
        for path, axis in group.removes.items():
            if partial and path not in leaves:
                continue
            axis, channels = axis if isinstance(axis, tuple) else (axis, None)
            length = _length(leaves, path, axis, who)
            if channels is not None and (len(channels) != length or min(channels) < 0 or max(channels) >= size):
                raise ValueError(
                    f"{who}: axis {axis} of {path} has {length} entries, so it needs {length} channel numbers "
                    f"from 0 to {size - 1}, got {len(channels)} from {min(channels)} to {max(channels)}"
                )
            if channels is None and length % size:
                raise ValueError(
                    f"{who} has {size} channels, but axis {axis} of {path}, from which they are removed, has length "
                    f"{length}, which is not a multiple of {size}"
                )
        if group.kernel is not None:
            _length(leaves, group.kernel, -1, who)
        _refuse_filters_before_a_norm(group, leaves, who)
        sizes.append(size)
    return tuple(sizes)


def entries(group: Group, path: str, shape: Sequence[int], size: int) -> tuple[int, np.ndarray]:
    """The axis of a leaf from which a group removes channels, >= 0, and the channel of each entry along it."""
    removed = group.removes[path]
    axis, channels = removed if isinstance(removed, tuple) else (removed, None)
    axis %= len(shape)
    return axis, np.arange(shape[axis]) % size if channels is None else np.asarray(channels)


def expected_counts(
    groups: Sequence[Group], shapes: Mapping[str, Sequence[int]], open_channels: Mapping[str, ArrayLike]
) -> dict[str, jax.Array]:
    """Count the entries of every leaf that stay, or compute their expected number.

    Args:
      groups: the groups.
      shapes: the shapes of the leaves to count, by path.
      open_channels: for every group, by its name, the probability that each channel is open, or 0 and 1; (size,).

    Returns:
      path -> (), float32. Channels are assumed to be independent, so expected numbers are exact unless a group is on
      two axes of one leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> group = Group("hidden", {"fc2": 0}, {"fc1": -1, "fc2": 0})
      >>> counts = expected_counts([group], {"fc1": (5, 4), "fc2": (4, 3)}, {"hidden": jnp.array([1, 1, 0.5, 0])})
      >>> {path: float(number) for path, number in counts.items()}
      {'fc1': 12.5, 'fc2': 7.5}
    """
    chances = {name: jnp.asarray(value, jnp.float32) for name, value in open_channels.items()}
    return {path: jnp.asarray(kept, jnp.float32) for path, kept in _kept(groups, shapes, chances).items()}


def _kept(
    groups: Sequence[Group], shapes: Mapping[str, Sequence[int]], open_channels: Mapping[str, Any]
) -> dict[str, Any]:
    """As :func:`expected_counts`, but in the precision of ``open_channels``, arrays of NumPy or JAX."""
    along: dict[tuple[str, int], Any] = {}
    for group in groups:
        channels = open_channels[group.name]
        for path in group.removes:
            if path in shapes:
                axis, numbers = entries(group, path, shapes[path], channels.size)
                along[path, axis] = along.get((path, axis), 1) * channels[numbers]
    counts = {}
    for path, shape in shapes.items():
        others = math.prod(size for axis, size in enumerate(shape) if (path, axis) not in along)
        counts[path] = float(others) * math.prod(chances.sum() for (p, _), chances in along.items() if p == path)
    return counts


class LayerRemaining(NamedTuple):
    """One line of :class:`Remaining`: the params and MACs of a leaf, and how many of them are kept."""

    path: str
    params: int
    kept_params: float
    macs: int
    kept_macs: float


@dataclasses.dataclass(frozen=True, repr=False)
class Remaining(Tabular):
    """The result of :func:`remaining`; prints as a table, and as HTML in a notebook.

    Attributes:
      layers: one :class:`LayerRemaining` per leaf.
    """

    layers: tuple[LayerRemaining, ...]

    @property
    def params(self) -> float:
        """The share of the params that is kept."""
        return _share(self.layers, "kept_params", "params")

    @property
    def macs(self) -> float:
        """The share of the multiply-accumulate operations that is kept; NaN if none were counted."""
        return _share(self.layers, "kept_macs", "macs")

    def table(self) -> Table:
        """The cells of the table."""
        columns = [[getattr(row, name) for row in self.layers] for name in LayerRemaining._fields[1:]]
        lines = [["layer", "params", "kept", "", "MACs", "kept", ""]]
        total = LayerRemaining("all", *(sum(column) for column in columns))
        for path, params, kept, macs, kept_macs in [*self.layers, total]:
            numbers = [f"{params:,}", f"{kept:,.0f}", f"{kept / max(params, 1):.1%}"]
            numbers += [f"{macs:,}", f"{kept_macs:,.0f}", f"{kept_macs / macs:.1%}"] if macs else ["", "", ""]
            lines.append([path, *numbers])
        if not total.macs:
            lines = [line[:4] for line in lines]
        header, *rows, last = map(tuple, lines)
        return Table(header, tuple(rows), (last,))


def remaining(
    params: Any,
    groups: Sequence[Group],
    open_channels: Mapping[str, ArrayLike],
    positions: Mapping[str, int] | None = None,
) -> Remaining:
    """Count the params and MACs that are left when closed channels are removed, as a table.

    Args:
      params: the params or their shapes.
      groups: the groups.
      open_channels: for every group, by its name, the probability that each channel is open, or 0 and 1; (size,).
      positions: the number of output positions of an example at which each kernel is applied, by path: output height x
        width for a convolution, 1 for a dense layer; see :func:`jaxsparse.models.positions`. None counts only params.

    Returns:
      A :class:`Remaining`. Print it for a table.

    Raises:
      ValueError: for groups that do not fit the params, and for channels and positions that do not fit the groups.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
      >>> group = Group("hidden", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc2/kernel": 0})
      >>> print(remaining(params, [group], {"hidden": jnp.array([1, 0, 0, 1])}, {"fc1/kernel": 1, "fc2/kernel": 1}))
      layer       params  kept         MACs  kept
      ----------  ------  ----  -----  ----  ----  -----
      fc1/kernel      20    10  50.0%    20    10  50.0%
      fc2/kernel      12     6  50.0%    12     6  50.0%
      ----------  ------  ----  -----  ----  ----  -----
      all             32    16  50.0%    32    16  50.0%
    """
    for group, size in zip(groups, group_sizes(groups, params), strict=True):
        found = jnp.shape(open_channels.get(group.name))
        if found != (size,):
            raise ValueError(f"group {group.name!r} has {size} channels, but open_channels has shape {found} for it")
    shapes = {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}
    if unknown := sorted(set(positions or {}) - set(shapes)):
        raise ValueError(f"positions names {', '.join(unknown)}, which the params do not have")
    chances = {group.name: np.asarray(open_channels[group.name], np.float64) for group in groups}
    counts = _kept(groups, shapes, chances)  # float32 counts only to 2**24
    rows = []
    for path in sorted(shapes, key=natural_order):
        size, kept = math.prod(shapes[path]), float(counts[path])
        applied = (positions or {}).get(path, 0)
        rows.append(LayerRemaining(path, size, kept, applied * size, applied * kept))
    return Remaining(tuple(rows))


def _share(rows: Sequence[LayerRemaining], kept: str, whole: str) -> float:
    total = sum(getattr(row, whole) for row in rows)
    return sum(getattr(row, kept) for row in rows) / total if total else float("nan")


def _length(leaves: Mapping[str, Any], path: str, axis: int, who: str) -> int:
    if path not in leaves:
        near = difflib.get_close_matches(path, leaves, n=3, cutoff=0.4) or list(leaves)[:3]
        raise ValueError(f"{who} names {path!r}, which the params do not have; they have {', '.join(near)}, ...")
    shape = leaves[path].shape
    if isinstance(axis, bool) or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise ValueError(f"{who} names axis {axis!r} of {path}, whose shape is {tuple(shape)}")
    return shape[axis]


def _refuse_filters_before_a_norm(group: Group, leaves: Mapping[str, Any], who: str) -> None:
    filters = [p for p, axis in group.multiplies.items() if leaves[p].ndim > 1 and axis % leaves[p].ndim > 0]
    norms = [p for p in [*group.removes, *group.multiplies] if p.rpartition("/")[2] == "scale"]
    if filters and norms:
        raise ValueError(
            f"{who} multiplies the filters {filters[0]}, but their outputs are normalised ({norms[0]}), which "
            f"cancels the factor: multiply {norms[0]} and its bias instead"
        )
