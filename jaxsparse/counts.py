"""Params and multiply-adds that remain of a network when closed channels are removed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.groups import Group, entries, group_sizes, of_entries
from jaxsparse.tables import Table, Tabular
from jaxsparse.trees import by_path, natural_order

__all__ = ["LayerRemaining", "Remaining", "expected_counts", "remaining"]


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
      >>> from jaxsparse import Group
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
    along: dict[str, dict[tuple[int, ...], Any]] = {path: {} for path in shapes}
    for group in groups:
        channels = open_channels[group.name]
        for which in group.removes:
            if which.path in shapes:
                axes, numbers = entries(which, shapes[which.path], channels.size)
                of_leaf = along[which.path]
                of_leaf[axes] = of_leaf.get(axes, 1) * of_entries(channels, numbers)
    counts = {}
    for path, shape in shapes.items():
        seen = {axis for axes in along[path] for axis in axes}
        others = math.prod(size for axis, size in enumerate(shape) if axis not in seen)
        counts[path] = float(others) * math.prod(map(_sum_of_product, _apart(along[path])))
    return counts


def _apart(factors: dict[tuple[int, ...], Any]) -> list[dict[tuple[int, ...], Any]]:
    """Factors in sets that share no axis, so that their sums multiply."""
    sets: list[dict[tuple[int, ...], Any]] = []
    for axes, factor in factors.items():
        near = [found for found in sets if any(set(axes) & set(other) for other in found)]
        sets = [found for found in sets if found not in near]
        sets.append({key: value for found in near for key, value in found.items()} | {axes: factor})
    return sets


def _sum_of_product(factors: dict[tuple[int, ...], Any]) -> Any:
    """The sum over all axes of the product of arrays along some of them."""
    if len(factors) == 1:
        return next(iter(factors.values())).sum()
    operands = [part for axes, factor in factors.items() for part in (factor, list(axes))]
    if all(isinstance(factor, np.ndarray) for factor in factors.values()):
        return np.einsum(*operands, [])
    return jnp.einsum(*operands, [], precision="highest")


class LayerRemaining(NamedTuple):
    """One line of :class:`Remaining`: the params and MACs of a leaf, and how many of them are kept."""

    path: str
    params: int
    kept_params: float
    macs: float
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
            numbers += [f"{macs:,.0f}", f"{kept_macs:,.0f}", f"{kept_macs / macs:.1%}"] if macs else ["", "", ""]
            lines.append([path, *numbers])
        if not total.macs:
            lines = [line[:4] for line in lines]
        header, *rows, last = map(tuple, lines)
        return Table(header, tuple(rows), (last,))


def remaining(
    params: Any,
    groups: Sequence[Group],
    open_channels: Mapping[str, ArrayLike],
    positions: Mapping[str, float] | None = None,
) -> Remaining:
    """Count the params and MACs that are left when closed channels are removed, as a table.

    Args:
      params: the params or their shapes.
      groups: the groups.
      open_channels: for every group, by its name, the probability that each channel is open, or 0 and 1; (size,).
      positions: the number of output positions of an example at which each kernel is applied, by path: output height x
        width for a convolution, 1 for a dense layer; see :meth:`jaxsparse.trace.MultiplyAdds.positions`. None counts
        only params.

    Returns:
      A :class:`Remaining`. Print it for a table.

    Raises:
      ValueError: for groups that do not fit the params, and for channels and positions that do not fit the groups.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse import Group
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
