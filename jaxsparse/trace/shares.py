"""Moments of what arrives at leaves on the devices of a mesh."""

import dataclasses

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jaxsparse.trace.moments import Moments, Statistic
from jaxsparse.trace.views import View, lost, whole_axes

__all__ = ["Share", "local_leaf"]


class Share:
    """How leaves and data are divided among the devices of a ``shard_map``.

    Keys are those of :class:`jaxsparse.trace.recorder.Recorder`.
    """

    def __init__(self, args, in_specs, checked, gram, statistic=None):
        self.checked, self.gram, self.statistic = checked, gram, statistic
        self.of_leaf: dict = {}  # (path, axis of the leaf) -> axes of the mesh
        self.of_data: set = set()
        for arg, spec in zip(args, in_specs, strict=True):
            for i, name in enumerate(spec):
                names = () if name is None else name if isinstance(name, tuple) else (name,)
                if not isinstance(arg, View) or arg.path is None:
                    self.of_data |= set(names)
                elif names and (axis := whole_axes([arg.axes[i]])):
                    self.of_leaf[arg.path, axis[0]] = names

    def _names(self, key, axes):
        return [self.of_leaf.get((key[0], axis)) for axis in axes]

    def can_join(self, key):
        """Whether the parts of the inputs follow one another, and no products between them are missing."""
        first, *others = self._names(key, key[2]) or [None]
        return not any(others) and not (self.gram and first)

    def specs(self, key):
        """How the moments of a leaf are divided."""
        lead, columns = self._names(key, key[3]), self._names(key, key[2][:1])
        rows, each = PartitionSpec(*lead), PartitionSpec(*lead, *columns)
        if self.statistic:
            return Statistic(rows, each, key[2], key[3])  # type: ignore[arg-type]
        return Moments(rows, each, each, key[2], key[3])  # type: ignore[arg-type]

    def summed(self, key, moments):
        """The sums over the devices that have other rows."""
        own = {name for names in self._names(key, (*key[2], *key[3])) for name in names or ()}
        varying = jax.typeof(jax.tree.leaves(moments)[-1]).mat.varying if self.checked else self.of_data
        axes = tuple(sorted(varying - own))
        if not axes:
            return moments
        rows = moments.rows  # summed up too, since a branch may be taken on some devices alone
        if same := tuple(axis for axis in axes if self.checked and axis not in jax.typeof(rows).mat.varying):
            rows = lax.pcast(rows, same, to="varying")
        return lax.psum(dataclasses.replace(moments, rows=rows), axes)


def local_leaf(leaf: View) -> View:
    """A leaf as a device sees it, whose axes are whole ones, of the sizes that are there."""
    named = []
    for axis, n in zip(leaf.axes, leaf.value.shape, strict=True):
        whole = whole_axes([axis])
        if whole is None or len(whole) > 1:
            return lost(leaf.path, leaf.value)
        named.append(tuple((i, 1, n, n) for i in whole))
    return dataclasses.replace(leaf, axes=tuple(named))
