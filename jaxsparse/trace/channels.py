"""Channel groups of any function."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.groups import Group, Slice, entries
from jaxsparse.layouts import Layout
from jaxsparse.structures import channel
from jaxsparse.tables import Table, Tabular
from jaxsparse.trace.analysis import Analysis
from jaxsparse.trace.conditions import ALWAYS, Condition, all_of, cost, only
from jaxsparse.trace.program import trace
from jaxsparse.trace.values import Scan
from jaxsparse.trees import listed, natural_order

__all__ = ["ChannelGroups", "channel_groups"]

Column = tuple[str, int, int]  # a leaf, an axis, and a column of its nodes
MOST_LINES = 5  # of a group in the table
ALL_AT_ONCE, UNUSED = "all of its entries could only go at once", "the function does not use it"


@dataclasses.dataclass(frozen=True, repr=False)
class ChannelGroups(Tabular, Sequence[Group]):
    """The channel groups of a function of params; prints as a table, and as HTML in a notebook.

    A sequence of groups, which may stand wherever these are asked for, such as in :func:`jaxsparse.l0`;
    ``groups["fc1/kernel"]`` is the one of that name.

    Attributes:
      groups: the groups, :class:`jaxsparse.Group`, in the order in which the function uses them.
      frozen: (path, axis) -> why no entry of this axis can go away: the reasons, with the lines of the program.
      unknown: the primitives that were not understood and met channels, with the lines of the program.
      layers: name of a group -> the number of layers that a scan stacks, where no channel matters to another layer.
      shapes: path of a leaf -> its shape.
      reads: name of a group -> (path, axis) of the leaves that its channels arrive at, to be multiplied and summed.
      kinds: name of a group -> "heads" or "units", of those that are one of the two. Heads are computed side by side
        in a product of activations with each other, as in attention; with grouped key and value heads the group is
        that of key and value heads, with all the query heads that share them. Units are read by a single leaf and
        by no product of activations, such as the hidden units of an MLP.
    """

    groups: tuple[Group, ...]
    frozen: dict[tuple[str, int], tuple[str, ...]]
    unknown: tuple[str, ...]
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    reads: dict[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.groups[key]
        found = {group.name: group for group in self.groups}
        if key not in found:
            raise KeyError(f"there is no group {key!r}, only {listed(list(found))}")
        return found[key]

    def __len__(self) -> int:
        return len(self.groups)

    def per_layer(self) -> "ChannelGroups":
        """The same groups, with channels of its own for every layer under a scan, where layers do not share them.

        Gates may then close other channels in every layer. Layers under one scan have equal widths, so only channels
        that all layers have closed can be removed.

        Returns:
          Groups of number of layers x channels, whose slices have two axes; those of other groups as they are.
        """
        groups = [_of_layers(g, self.layers[g.name], self.shapes) if g.name in self.layers else g for g in self.groups]
        return dataclasses.replace(self, groups=tuple(groups), layers={})

    def within(self, prefix: str) -> "ChannelGroups":
        """The groups in a part of the params, such as ``"params"`` of Flax's variables, with paths from there.

        This is for an optimizer, which sees only that part. Gates multiply slices there that are enough by themselves;
        groups that have none are left out.

        Args:
          prefix: the path of the part.

        Returns:
          The groups, with the slices outside of the part left out.

        Raises:
          ValueError: if no leaf is below the prefix.
        """
        start = prefix.rstrip("/") + "/"
        if not any(path.startswith(start) for path in self.shapes):
            raise ValueError(f"no leaf is below {prefix!r}, the function has {listed(list(self.shapes))}")

        def kept(slices: Sequence[Slice]) -> tuple[Slice, ...]:
            return tuple(s._replace(path=s.path.removeprefix(start)) for s in slices if s.path.startswith(start))

        groups = []
        for group in self.groups:
            choices = [kept(choice) for choice in group.closed_by if len(kept(choice)) == len(choice)]
            if choices:
                (kernel,) = kept([Slice(group.kernel or "", 0)]) or (None,)
                name, removes = group.name.removeprefix(start), kept(group.removes)
                path = kernel and kernel.path
                groups.append(Group(name, choices[0], removes, path, group.size, choices, group.sums, group.exact))
        return ChannelGroups(
            tuple(groups),
            {(path.removeprefix(start), i): why for (path, i), why in self.frozen.items() if path.startswith(start)},
            self.unknown,
            {name.removeprefix(start): n for name, n in self.layers.items()},
            {path.removeprefix(start): shape for path, shape in self.shapes.items() if path.startswith(start)},
            {
                name.removeprefix(start): tuple((p.removeprefix(start), i) for p, i in of if p.startswith(start))
                for name, of in self.reads.items()
            },
            {name.removeprefix(start): kind for name, kind in self.kinds.items()},
        )

    def structures(self) -> dict[str, channel]:
        """The granularity by which pruning closes channels: all weights of one leaf that belong to a channel.

        Returns:
          path of a leaf -> a structure for methods that take one, such as ``rda(..., structure=groups.structures())``:
          for groups that one kernel closes by itself, mostly the kernel that reads the channels. Of two groups that a
          kernel closes, the first has it.
        """
        found: dict[str, channel] = {}
        for group in self.groups:
            for choice in group.closed_by:
                path, axis, channels = choice[0]
                rank = len(self.shapes[path])
                if len(choice) == 1 and channels is None and isinstance(axis, int) and rank > 1:
                    if self.shapes[path][axis] == group.size:
                        other = next(i for i in reversed(range(rank)) if i != axis)
                        found.setdefault(path, channel(layout=Layout(inputs=other, outputs=axis)))
                    break
        return found

    def table(self) -> Table:
        """The cells of the table."""
        rows = []
        for group in self.groups:
            slices = (_few(list(map(_shown, which))) for which in (group.removes, group.multiplies))
            notes = [f"summed: {listed(group.sums, 1)}"] if group.sums else []
            lines = list(itertools.zip_longest(*slices, notes, fillvalue=""))
            rows += [(group.name, f"{group.size:,}", *lines[0]), *(("", "", *line) for line in lines[1:])]
        reasons: dict[tuple[str, ...], list[str]] = {}
        for (path, axis), why in self.frozen.items():
            reasons.setdefault(why, []).append(f"{path}:{axis}")
        stays = []
        for why, names in reasons.items():
            first, *more = _few(names)
            stays += [("stays", "", first, "", listed(why, 2)), *(("", "", name, "", "") for name in more)]
        header = ("group", "channels", "removes", "a gate multiplies", "notes")
        return Table(header, tuple(rows), tuple(stays), left=(0, 2, 3, 4))


def _few(names: list[str]) -> list[str]:
    """The first names, a line each, and how many more there are."""
    return names if len(names) <= MOST_LINES else [*names[: MOST_LINES - 1], f"and {len(names) - MOST_LINES + 1} more"]


def _shown(which: Slice) -> str:
    part = which.channels is not None and -1 in which.channels
    return f"{which.path}:{which.axis}{' (part)' if part else ''}"


def channel_groups(apply: Any, params: Any, *args: Any) -> ChannelGroups:
    """Derive the channel groups of any function of params, by one walk over its program.

    Entries of axes of leaves that can only go away together are a channel; channels at the same places of the same
    leaves are a group. It is exact to remove a channel whose slices of one choice of :attr:`jaxsparse.Group.closed_by`
    are zero: the outputs stay what they are. Nothing that the function puts out gets smaller, except for a state, such
    as batch statistics, that takes the place of a leaf of the same path and shape.

    Args:
      apply: a function of params and further arguments, of any framework, that returns any pytree.
      params: its params, or their shapes as of ``jax.eval_shape``. Leaves that an optimizer does not see, such as batch
        statistics, belong here too; see :meth:`ChannelGroups.within`.
      *args: its other arguments, or their shapes.

    Returns:
      The :class:`ChannelGroups`. Print them for a table, with all that cannot go away, and why.

    Raises:
      ValueError: if the function cannot be traced or uses none of the params, with the line of the program.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": jnp.ones((5, 4)), "fc2": jnp.ones((4, 3))}
      >>> groups = channel_groups(lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"], params, jnp.ones((2, 5)))
      >>> group = groups["fc1"]
      >>> group.size, [tuple(s) for s in group.removes]
      (4, [('fc1', 1, None), ('fc2', 0, None)])
      >>> [[s.path for s in choice] for choice in group.closed_by]  # the slices of either one at zero are enough
      [['fc2'], ['fc1']]
      >>> groups.frozen["fc2", 1]
      ('the output of the function',)
    """
    a = Analysis(trace(apply, params, *args))
    members, frozen = _members(a)
    families = _families(members)
    _know_more(a, families)
    groups: list[Group] = []
    layers, counts, kinds = {}, {}, {}  # type: dict[str, int], dict[str, int], dict[str, str]
    reads: dict[str, tuple[tuple[str, int], ...]] = {}
    for family in sorted(families, key=lambda f: f.first):
        if len(family.roots) > 1:
            group = _group(a, family, members)
            counts[group.name] = counts.get(group.name, 0) + 1
            if counts[group.name] > 1:
                group = dataclasses.replace(group, name=f"{group.name}#{counts[group.name]}")
            groups.append(group)
            reads[group.name] = tuple(sorted(family.places & a.reads))
            if kind := "heads" if family.heads else "units" if family.is_units(a.reads) else "":
                kinds[group.name] = kind
            if scan := _own_scan(a, family):
                layers[group.name] = scan.length
    seen = {(s.path, s.axis) for group in groups for s in group.removes}
    alone = {place for family in families for place in family.places} - seen
    frozen |= {place: (ALL_AT_ONCE,) for place in sorted(alone)}
    unknown = tuple(map(str, dict.fromkeys(a.unknown)))
    return ChannelGroups(tuple(groups), frozen, unknown, layers, dict(a.leaf_shapes), reads, kinds)


@dataclasses.dataclass
class _Family:
    """Nodes that are at the same places of the same leaves: the channels of one group."""

    columns: tuple[Column, ...]
    roots: list[int]
    condition: Condition = ALWAYS  # when a channel counts for nothing
    first: int = 0  # the number of the sum in the program that first needs it
    scopes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)  # the scans in which it is summed
    shared_in: set[int] = dataclasses.field(default_factory=set)  # the scans whose layers share it
    sums: set[str] = dataclasses.field(default_factory=set)
    paired: bool = False  # whether activations meet activations along it
    heads: bool = False  # whether they do so side by side, and no family that goes with it is larger

    def is_units(self, reads: set[tuple[str, int]]) -> bool:
        """Whether a single leaf reads the channels, and nothing else."""
        return not self.paired and len({path for path, _ in self.places & reads}) == 1

    @property
    def places(self) -> frozenset[tuple[str, int]]:
        return frozenset((path, axis) for path, axis, _ in self.columns)


def _members(a: Analysis) -> tuple[dict[int, dict[Column, np.ndarray]], dict[tuple[str, int], tuple[str, ...]]]:
    """The entries of leaves that each node keeps alive, and why the axes of the others stay."""
    members: dict[int, dict[Column, np.ndarray]] = {}
    frozen = {}
    for path, axes in a.leaf_axes.items():
        for axis, ids in enumerate(axes):
            live = None if path in a.unused else a.spaces.expand(ids)
            if ids is not None and (live is None or not live.all(0).any()):
                frozen[path, axis] = (UNUSED,) if path in a.unused else tuple(a.spaces.why(ids))
            for number, column in enumerate([] if live is None else live.T):
                order = np.argsort(column, kind="stable")
                roots, starts = np.unique(column[order], return_index=True)
                ends = [*starts[1:].tolist(), len(order)]
                for root, start, end in zip(roots.tolist(), starts.tolist(), ends, strict=True):
                    if root:
                        members.setdefault(root, {})[path, axis, number] = order[start:end]
    return members, frozen


def _families(members: dict[int, dict[Column, np.ndarray]]) -> list[_Family]:
    """The nodes by what they keep alive, in the order of their entries."""
    found: dict[tuple, list[tuple[int, int]]] = {}
    for root, places in members.items():
        signature = tuple(sorted((column, len(at)) for column, at in places.items()))
        found.setdefault(signature, []).append((min(int(at[0]) for at in places.values()), root))
    return [
        _Family(tuple(column for column, _ in signature), [root for _, root in sorted(roots)])
        for signature, roots in found.items()
    ]


def _know_more(a: Analysis, families: list[_Family]) -> None:
    """Adds to each family how the program uses its channels."""
    family_of = np.full(a.spaces.size, -1)
    for number, family in enumerate(families):
        family.first = len(a.needs)
        family_of[family.roots] = number

    def on(ids):
        live = a.spaces.expand(ids)
        found = [] if live is None else np.unique(family_of[live]).tolist()
        return [families[number] for number in found if number >= 0]

    for number, (ids, condition, scope) in enumerate(a.needs):
        for family in on(ids):
            family.condition = all_of(family.condition, only(condition, family.places))
            family.first = min(family.first, number)
            family.scopes.add(scope[:1])
    for ids, why in a.sums:
        for family in on(ids):
            family.sums.add(str(why))
    for ids, beside in a.paired:
        along = on(ids)
        for family in along:
            family.paired = True
        if beside and along:  # of places among the query heads that share others, and these, it is these
            max(along, key=lambda f: len(f.columns)).heads = True
    for key, scan in a.scans.items():
        for ids in scan.shared:
            for family in on(ids):
                family.shared_in.add(key)


def _group(a: Analysis, family: _Family, members: dict[int, dict[Column, np.ndarray]]) -> Group:
    removes: dict[tuple[str, int], list[np.ndarray]] = {}
    for column in family.columns:
        path, axis, _ = column
        channels = np.full(a.leaf_shapes[path][axis], -1)
        for number, root in enumerate(family.roots):
            channels[members[root][column]] = number
        removes.setdefault((path, axis), []).append(channels)
    size = len(family.roots)
    slices = {place: tuple(_slice(*place, c, size) for c in found) for place, found in removes.items()}
    choices = sorted(family.condition, key=lambda c: (not {place[:2] for place in c} <= a.reads, cost(c)))
    closed_by = [tuple(s for place in sorted(choice) for s in slices[place[:2]]) for choice in choices]
    everything = tuple(s for of_place in slices.values() for s in of_place)
    closed_by = [choice or everything for choice in closed_by]
    makers = [path for path, axis in slices if (path, axis) not in a.reads]
    kernel = min(makers or [s.path for s in everything], key=lambda p: (-len(a.leaf_shapes[p]), natural_order(p)))
    return Group(kernel, closed_by[0], everything, kernel, size, closed_by, sorted(family.sums), exact=True)


def _slice(path: str, axis: int, channels: np.ndarray, size: int) -> Slice:
    plain = np.array_equal(channels, np.arange(len(channels)) % size)
    return Slice(path, axis, None if plain else tuple(channels.tolist()))


def _own_scan(a: Analysis, family: _Family) -> Scan | None:
    """The scan whose layers do not share the channels of a family."""
    if len(family.scopes) != 1 or not (scope := next(iter(family.scopes))) or scope[0] not in a.scans:
        return None
    scan, paths = a.scans[scope[0]], {path for path, _ in family.places}
    elsewhere = {path for key, other in a.scans.items() if key != scope[0] for path in other.leaves}
    inside = all(axis > 0 for _, axis in family.places) and paths <= set(scan.leaves) - elsewhere
    return scan if inside and scope[0] not in family.shared_in else None


def _of_layers(group: Group, length: int, shapes: dict[str, tuple[int, ...]]) -> Group:
    """The group with channels for each of the layers that are stacked along the first axis of its leaves."""
    size = group.size or 1

    def stacked(which: Slice) -> Slice:
        _, channels = entries(which, shapes[which.path], size)
        many = np.where(channels < 0, -1, channels + size * np.arange(length)[:, None])
        plain = np.array_equal(many.ravel(), np.arange(many.size))
        return Slice(which.path, (0, int(which.axis)), None if plain else tuple(many.ravel().tolist()))  # type: ignore[arg-type]

    choices = [tuple(map(stacked, choice)) for choice in group.closed_by]
    removes = tuple(map(stacked, group.removes))
    return Group(group.name, choices[0], removes, group.kernel, size * length, choices, group.sums, group.exact)
