"""Which entries of which axes live and die together: a union-find whose classes may be conjunctions of others.

Every entry of an axis has *nodes* and lives as long as all of them do. Two axes that are added are the same from then
on: their entries share nodes. An entry mostly has one node; an axis that merges several, such as heads x head_dim, has
a column of nodes for each. When a reshape splits an axis, its nodes become conjunctions of the nodes of the new axes.

An axis is an array of nodes, (entries, columns), int, or None if none of its entries can go away.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxsparse.groups import first_places

__all__ = ["Axis", "Spaces"]

Axis = np.ndarray | None


class Spaces:
    """Nodes, what is known of them, and the reasons why some of them live forever.

    Reasons are any hashable objects; they become text in :meth:`why`. Node 0 lives forever, for no reason.

    Examples:
      >>> spaces = Spaces()
      >>> units, flat = spaces.fresh(4), spaces.fresh(4)
      >>> spaces.unify(units, flat, "added")
      >>> heads, inner = spaces.split(flat, [2, 2], "reshaped")
      >>> spaces.expand(units).shape  # an entry of the units lives as long as its head and its place in it
      (4, 2)
      >>> spaces.freeze(heads[:1], "an output")
      >>> spaces.expand(units).tolist() == spaces.merge([heads, inner], [2, 2]).tolist()
      True
      >>> spaces.why(units)
      ['an output']
    """

    def __init__(self) -> None:
        self.size = 1
        self.defined: dict[int, tuple[int, ...]] = {}  # root -> the nodes whose conjunction it is
        self.reasons: dict[Hashable, int] = {}  # why -> the node of all that stays for this reason
        self._names: dict[int, Hashable] = {}  # and back
        self.parent = np.zeros(1024, np.int64)
        self.is_defined = np.zeros(1024, bool)
        self.immortal = np.zeros(1024, bool)
        self.immortal[0] = True

    def fresh(self, n: int) -> np.ndarray:
        """An axis of n entries that have nothing to do with any others."""
        while self.size + n > len(self.parent):
            for name in ("parent", "is_defined", "immortal"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        ids = np.arange(self.size, self.size + n)
        self.parent[ids] = ids
        self.size += n
        return ids[:, None]

    def find(self, nodes: ArrayLike) -> np.ndarray:
        """The representatives of nodes."""
        ids = np.asarray(nodes)
        while True:
            up = self.parent[ids]
            if (up == ids).all():
                return ids
            self.parent[ids] = self.parent[up]
            ids = up

    def expand(self, ids: Axis) -> Axis:
        """The axis in representatives that are no conjunctions; 0 for what lives forever, None if every entry does."""
        if ids is None:
            return None
        ids = self.find(ids)
        while self.is_defined[ids].any():
            columns = []
            for column in ids.T:
                hit = self.is_defined[column]
                if not hit.any():
                    columns.append(column)
                    continue
                parts = [self.defined[c] if h else (c,) for c, h in zip(column.tolist(), hit, strict=True)]
                width = max(map(len, parts))
                columns += list(np.array([[*p, *[0] * (width - len(p))] for p in parts]).T)
            ids = self.find(np.stack(columns, 1))
        ids = np.where(self.immortal[ids], 0, ids)
        keep = [
            i
            for i in range(ids.shape[1])
            if ids[:, i].any() and not any((ids[:, i] == ids[:, j]).all() for j in range(i))
        ]
        return ids[:, keep] if keep else None

    def freeze(self, ids: Axis, why: Hashable) -> None:
        """Keep all entries of an axis for good, and with them all their nodes."""
        ids = self.expand(ids)
        if ids is not None:
            roots = np.unique(ids)
            self.parent[roots[roots > 0]] = self._node_of(why)

    def why(self, ids: Axis) -> list[str]:
        """The reasons why entries stay, as far as there are any, in alphabetical order."""
        todo = set() if ids is None else set(np.unique(self.find(ids)).tolist())
        found, seen = set(), set()  # type: set[str], set[int]
        while todo:
            node = todo.pop()
            seen.add(node)
            if node in self._names:
                found.add(str(self._names[node]))
            if node in self.defined:
                todo |= set(self.find(self.defined[node]).tolist()) - seen
        return sorted(found)

    def unify(self, a: Axis, b: Axis, why: Hashable) -> None:
        """Make two axes of the same length the same: an entry of one lives exactly as long as that of the other."""
        if a is None or b is None:
            self.freeze(b if a is None else a, why)
            return
        first, second = self.expand(a), self.expand(b)
        if first is None or second is None:
            self.freeze(b if first is None else a, self._reason(a if first is None else b, why))
            return
        if first.shape[1] == second.shape[1] == 1:
            self._union(first[:, 0], second[:, 0], why)
            return
        left, right = list(first.T), list(second.T)
        for column in list(left):  # columns that vary alike belong together
            other = next((c for c in right if (first_places(c) == first_places(column)).all()), None)
            if other is not None:
                self._union(column, other, why)
                left = [c for c in left if c is not column]
                right = [c for c in right if c is not other]
        if len(left) == len(right) == 1:
            self._union(left[0], right[0], why)
        elif len(left) == 1 and right:
            self._define(left[0], right, why)
        elif len(right) == 1 and left:
            self._define(right[0], left, why)
        else:
            for column in [*left, *right]:
                self.freeze(column[:, None], why)

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """The axis of all combinations of entries of some axes, the last one varying fastest."""
        columns = []
        for i, ids in enumerate(map(self.expand, axes)):
            if ids is not None:
                inner, outer = math.prod(sizes[i + 1 :]), math.prod(sizes[:i])
                columns += [np.tile(np.repeat(column, inner), outer) for column in ids.T]
        return np.stack(columns, 1) if columns else None

    def split(self, ids: Axis, sizes: Sequence[int], why: Hashable) -> list[Axis]:
        """The axes whose combinations an axis has, the last one varying fastest."""
        found: list[list[np.ndarray]] = [[] for _ in sizes]
        ids = self.expand(ids)
        for column in [] if ids is None else ids.T:
            grid = column.reshape(sizes)
            varies = [i for i in range(len(sizes)) if (grid != np.take(grid, [0], i)).any()]
            if not varies:
                self.freeze(column[:1, None], why)
            elif len(varies) == 1:
                found[varies[0]].append(np.moveaxis(grid, varies[0], 0).reshape(sizes[varies[0]], -1)[:, 0])
            else:
                new = [self.fresh(sizes[i])[:, 0] for i in varies]
                places = np.unravel_index(np.arange(len(column)), sizes)
                self._define(column, [f[places[i]] for f, i in zip(new, varies, strict=True)], why)
                for f, i in zip(new, varies, strict=True):
                    found[i].append(f)
        return [np.stack(columns, 1) if columns else None for columns in found]

    def _node_of(self, why: Hashable) -> int:
        if why not in self.reasons:
            self.reasons[why] = node = int(self.fresh(1)[0, 0])
            self.immortal[node] = True
            self._names[node] = why
        return self.reasons[why]

    def _reason(self, ids: np.ndarray, otherwise: Hashable) -> Hashable:
        """A reason why an axis lives forever."""
        return next((self._names[n] for n in np.unique(self.find(ids)).tolist() if n in self._names), otherwise)

    def _union(self, a: np.ndarray, b: np.ndarray, why: Hashable) -> None:
        """Make nodes the same, pair by pair. None of them is a conjunction."""
        while True:
            a, b = self.find(a), self.find(b)
            a_stays, b_stays = self.immortal[a], self.immortal[b]
            if (a_stays ^ b_stays).any():
                self.freeze(np.where(a_stays, b, a)[a_stays ^ b_stays][:, None], why)
                continue
            differ = (a != b) & ~a_stays
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def _define(self, column: np.ndarray, columns: Sequence[np.ndarray], why: Hashable) -> None:
        """Make each node of a column the conjunction of those at its place in others."""
        for node, *parts in zip(column.tolist(), *(c.tolist() for c in columns), strict=True):
            node = int(self.find(node))
            old = self.defined.get(node, ())
            if len(old) == len(parts):
                for one, other in zip(old, parts, strict=True):
                    self._tie([one], [other], why)
            else:
                self._tie([node], parts, why)

    def _tie(self, left: Sequence[int], right: Sequence[int], why: Hashable) -> None:
        """Make one conjunction of nodes the same as another."""
        ours, theirs = self._atoms(left), self._atoms(right)
        ours, theirs = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
        if len(ours) == len(theirs) == 1:
            self._union(np.array(ours), np.array(theirs), why)
        elif 1 in (len(ours), len(theirs)) and ours and theirs:
            (node,), parts = (ours, theirs) if len(ours) == 1 else (theirs, ours)
            self.defined[node] = tuple(parts)
            self.is_defined[node] = True
        elif ours or theirs:
            self.freeze(np.array([[n] for n in (*ours, *theirs)]), why)

    def _atoms(self, nodes: Sequence[int]) -> list[int]:
        """The nodes, none of them a conjunction and none that lives forever, whose conjunction some nodes are."""
        found = []
        for node in nodes:
            root = int(self.find(node))
            if root in self.defined:
                found += self._atoms(self.defined[root])
            elif not self.immortal[root]:
                found.append(root)
        return list(dict.fromkeys(found))
