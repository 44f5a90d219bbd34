"""One walk over a jaxpr without computing: what values are made of, and which entries live and die together.

The masked model is the reference: "dead" entries of leaves are zeros. For every axis of every value it is known when
its dead entries are zeros too (``Val.zero``), for only then may they be missing in a sum. The rule of each primitive is
in :mod:`jaxsparse.trace.rules`, those of programs within programs are in :mod:`jaxsparse.trace.inner`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxsparse.trace import indexing, moving  # noqa: F401  (they add their rules)
from jaxsparse.trace.conditions import ALWAYS, NEVER, Condition, all_of, any_of, of_place
from jaxsparse.trace.inner import INNER
from jaxsparse.trace.products import multiply_adds_of
from jaxsparse.trace.program import Traced, Where, bind, live_eqns, opened, used_inputs, where, within
from jaxsparse.trace.rules import COLLECTIVE, ELEMENTWISE, IDENTITY, MADE, RULES
from jaxsparse.trace.spaces import Axis, Spaces
from jaxsparse.trace.values import Node, Scan, Site, Val, fixed
from jaxsparse.trees import is_key

__all__ = ["ELEMENTWISE", "HIGHER", "IDENTITY", "MADE", "Analysis", "Node", "Site", "Val"]

HIGHER = set(INNER)
SMALL = 65536  # entries of a constant whose value is followed


class Analysis:
    """A walk over a program, and all that it finds.

    Args:
      traced: the program.
      outputs: "freeze": outputs of the function keep all their entries; anything else: they do not matter.

    Attributes:
      spaces: which entries live and die together.
      leaf_axes: path of a leaf -> its axes.
      leaf_shapes: path of a leaf -> its shape.
      root: the :class:`Node` of the program, with the :class:`Val` of every variable.
      sites: the products, :class:`Site`, in the order of the program.
      reads: (path, axis) of leaves along which they are multiplied with activations and summed.
      needs: (axis, condition, scope): the axis is summed over, within some scans, which takes dead entries that are
        zeros.
      scans: id of an eqn -> the :class:`Scan` that it is.
      sums: (axis, Where): where an axis is summed by itself, as for a mean.
      paired: (axis, whether it is a batch axis) of products of activations with each other, as in attention.
      unknown: the places of primitives that were not understood and met entries that could have gone away.
      unused: the paths of the leaves that the function does not use.
    """

    def __init__(self, traced: Traced, outputs: str = "freeze"):
        self.spaces, self.root = Spaces(), Node()
        self.sites: list[Site] = []
        self.reads: set[tuple[str, int]] = set()
        self.needs: list[tuple[Axis, Condition, tuple[int, ...]]] = []
        self.scans: dict[int, Scan] = {}
        self.scope: tuple[int, ...] = ()
        self.sums: list[tuple[Axis, Where]] = []
        self.paired: list[tuple[Axis, bool]] = []
        self.unknown: list[Where] = []
        self.leaf_axes: dict[str, list[Axis]] = {}
        self.leaf_shapes: dict[str, tuple[int, ...]] = {}
        self.times, self.bounded = 1.0, True
        self._zeros: dict[tuple, bool] = {}
        jaxpr, consts = opened(traced.closed)
        uses = zip(traced.paths, used_inputs(jaxpr), strict=True)
        self.unused = [path for path, used in uses if path is not None and not used]
        ins = [self._input(v.aval, path) for v, path in zip(jaxpr.invars, traced.paths, strict=True)]
        leaves = {path: val for val, path in zip(ins, traced.paths, strict=True) if path is not None}
        states = [self._state_of(name, v.aval, leaves) for name, v in zip(traced.out_paths, jaxpr.outvars, strict=True)]
        if outputs == "freeze":
            where_out = [Output(name) for name in traced.out_paths]
        while True:  # what comes out as a state goes in at the next call
            mark = self.mark()
            outs = self.run(jaxpr, consts, [dataclasses.replace(val, zero=list(val.zero)) for val in ins], self.root)
            # (No kernel is a state. An output may bear its name and have its shape: features, of as many examples.)
            kernels = {path for site in self.sites for path in site.leaves}
            states = [None if s in kernels else s for s in states]
            pairs = [(leaves[s], out) for s, out in zip(states, outs, strict=True) if s is not None and s in out.leaves]
            if not any([self._alike(a, b, "a state that the function hands on") for a, b in pairs]):
                break
            self.forget(mark)
        for i, (state, out) in enumerate(zip(states, outs, strict=True)):
            for ids in out.axes if outputs == "freeze" and (state is None or state not in out.leaves) else ():
                self.spaces.freeze(ids, where_out[i])

    def _input(self, aval: Any, path: str | None) -> Val:
        if path is None:
            val = self.frozen(aval, "an argument of the function")
            val.data = True
            return val
        val, rank = self.new(aval), len(aval.shape)
        val.leaves, val.view = frozenset([path]), (path, tuple((i,) for i in range(rank)))
        val.zero = [of_place(path, i, rank) for i in range(rank)]
        self.leaf_axes[path], self.leaf_shapes[path] = val.axes, val.shape
        return val

    @staticmethod
    def _state_of(name: str, aval: Any, leaves: dict[str, Val]) -> str | None:
        """The leaf whose place an output takes: batch statistics and the like."""
        # (Params that are one array have no path to tell an output by, and places in lists say nothing.)
        named = [path for path in leaves if path and not path.rpartition("/")[2].isdecimal()]
        ends = [path for path in named if path == name or name.endswith("/" + path)]
        path = max(ends, key=len, default=None)
        return path if path is not None and leaves[path].shape == tuple(aval.shape) else None

    # values

    def new(self, aval: Any, zero: Condition = NEVER) -> Val:
        """A value all of whose entries may go away, each for itself."""
        axes = [self.spaces.fresh(n) if n > 1 else None for n in aval.shape]
        return Val(tuple(aval.shape), axes, [zero] * len(axes))

    def frozen(self, aval: Any, why: Any) -> Val:
        """A value none of whose entries can go away, for a reason."""
        val = self.new(aval, ALWAYS)
        for ids in val.axes:
            self.spaces.freeze(ids, why)
        return val

    def made(self, value: Any) -> Val:
        """A constant: made at full size, then cut. A small one is known from here on."""
        value = value if hasattr(value, "shape") else np.asarray(value)
        val = self.new(value)
        if not (isinstance(value, jax.core.Tracer) or is_key(value) or math.prod(value.shape) > SMALL):
            val.const = np.asarray(value)
            if not val.const.any():
                val.zero = [ALWAYS] * len(val.zero)
        return val

    # walking

    def run(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Val], node: Node) -> list[Val]:
        """Walk over one jaxpr; the values of its outputs."""
        jaxpr, own = opened(jaxpr)
        env = node.env = {}
        known = [c if isinstance(c, Val) else self.made(c) for c in consts or own]
        env.update(zip([*jaxpr.constvars, *jaxpr.invars], [*known, *ins], strict=True))

        def read(v):
            return self.made(v.val) if isinstance(v, Literal) else env[v]

        for eqn in live_eqns(jaxpr):
            args = [read(v) for v in eqn.invars]
            outs = self._step(eqn, args, node)
            if eqn.primitive.name not in HIGHER:
                leaves, data = frozenset().union(*(a.leaves for a in args)), any(a.data for a in args)
                for out in outs:
                    out.leaves, out.data = out.leaves or leaves, out.data or data
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def child(self, node: Node, eqn: Any, which: int, jaxpr: Any, ins: Sequence[Val]) -> list[Val]:
        """Walk over the jaxpr of an eqn, its number ``which``."""
        node.children[id(eqn), which] = inner = Node()
        with within(eqn):
            return self.run(jaxpr, (), ins, inner)

    def _step(self, eqn: Any, args: list[Val], node: Node) -> list[Val]:
        name = eqn.primitive.name
        if name in INNER:
            return INNER[name](self, eqn, args, node)
        if name in IDENTITY:
            outs = [dataclasses.replace(a, const=None) for a in args][: len(eqn.outvars)]
        elif name in ELEMENTWISE:
            outs = [self._elementwise(eqn, args)]
        elif name in MADE:
            return [self.new(v.aval) for v in eqn.outvars]
        elif name in RULES:
            found = RULES[name](self, eqn, args)
            outs = found if isinstance(found, list) else [found]
        else:
            outs = self.give_up(eqn, args)
        if args and all(a.const is not None for a in args) and not eqn.effects:
            for out, value in zip(outs, self._fold(eqn, args), strict=True):
                out.const = value
                if value is not None and not value.any():
                    out.zero = [ALWAYS] * len(out.zero)
        return outs

    def give_up(self, eqn: Any, args: Sequence[Val], note: str = "not understood") -> list[Val]:
        """Freeze all that an eqn touches, and remember where it stands."""
        if any(self.spaces.expand(ids) is not None for a in args for ids in a.axes):
            self.unknown.append(where(eqn, note))
        for a in args:
            for ids in a.axes:
                self.spaces.freeze(ids, where(eqn, note))
        return [self.frozen(v.aval, where(eqn, note)) for v in eqn.outvars]

    def _fold(self, eqn: Any, args: Sequence[Val]) -> list[Any]:
        """The outputs of an eqn whose operands are known; None for large ones, keys, and what needs other devices."""
        large = any(math.prod(v.aval.shape) > SMALL or is_key(v.aval) for v in eqn.outvars)
        if large or eqn.primitive.name in COLLECTIVE:
            return [None] * len(eqn.outvars)
        outs = computed(eqn, [a.const for a in args])
        return [np.asarray(out) for out in outs]

    # what several rules share

    def mark(self) -> tuple[int, ...]:
        """How much was found so far."""
        return tuple(map(len, self._found()))

    def forget(self, mark: tuple[int, ...]) -> None:
        """Forget what was found since, for a walk over the same program again."""
        for found, length in zip(self._found(), mark, strict=True):
            del found[length:]

    def _found(self) -> tuple[list[Any], ...]:
        return self.sites, self.needs, self.sums, self.paired, self.unknown

    def unify_all(self, axes: Sequence[Axis], why: Any) -> Axis:
        """Make axes the same; None if one of them is."""
        for other in axes[1:]:
            self.spaces.unify(axes[0], other, why)
        return axes[0] if axes and all(ids is not None for ids in axes) else None

    def carried(self, vals: Sequence[Val], others: Sequence[Val], why: Any) -> bool:
        """Make what goes into a round the same as what comes out; whether that says something new of the former."""
        changed = False
        for a, b in zip(vals, others, strict=True):
            changed |= self._alike(a, b, why) or (b.data and not a.data) or bool(b.leaves - a.leaves)
            a.data, a.leaves = a.data or b.data, a.leaves | b.leaves
        return changed

    def _alike(self, a: Val, b: Val, why: Any) -> bool:
        """Make the axes of a those of b, zeros only where both are; whether that says something new of a."""
        for i in range(len(a.shape)):
            self.spaces.unify(a.axes[i], b.axes[i], why)
        zero = [all_of(*pair) for pair in zip(a.zero, b.zero, strict=True)]
        changed, a.zero = zero != a.zero, zero
        return changed

    def summed(self, ids: Axis, zero: Condition, eqn: Any) -> bool:
        """An axis is summed over, whose dead entries are zeros under a condition; whether any can go away then."""
        if self.spaces.expand(ids) is None:
            return False
        if not zero:
            self.spaces.freeze(ids, where(eqn, "summed over though not zero"))
            return False
        self.needs.append((ids, zero, self.scope))
        return True

    def meet(self, eqn: Any, a: Val, i: int, b: Val, j: int) -> None:
        """Axis i of a and axis j of b are multiplied and summed over."""
        self.spaces.unify(a.axes[i], b.axes[j], where(eqn))
        self.summed(a.axes[i], any_of(a.zero[i], b.zero[j]), eqn)
        for x, k, other in ((a, i, b), (b, j, a)):
            names = x.view[1][k] if x.view and not x.data and other.data else None
            self.reads |= {(x.view[0], axis) for axis in names or ()}  # type: ignore[index]

    def product(self, eqn: Any, args: Sequence[Val], macs: float | None = None) -> None:
        """Count a product, of a number of multiply-adds a round."""
        weights = sorted(set().union(*(a.leaves for a in args if not a.data)))
        macs = (multiply_adds_of(eqn) if macs is None else macs) * self.times
        self.sites.append(Site(tuple(weights), macs, self.times, self.bounded, where(eqn)))

    def _elementwise(self, eqn: Any, args: Sequence[Val]) -> Val:
        out, shaped = eqn.outvars[0].aval, [a for a in args if a.shape]
        val = fixed(out)
        for i, n in enumerate(out.shape):  # an operand may have 1 where the others have n
            wide = [a.axes[i] for a in shaped if a.shape[i] == n]
            val.axes[i] = self.unify_all(wide, where(eqn)) if n > 1 else None
            val.zero[i] = ALWAYS if val.axes[i] is None else self._stays_zero(eqn, args, i)
        views = [a.view for a in shaped if a.view and a.shape == tuple(out.shape)]
        val.view = views[0] if views and not any(a.data for a in shaped) else None
        return val

    def _stays_zero(self, eqn: Any, args: Sequence[Val], axis: int) -> Condition:
        """When the dead entries of an elementwise function are zeros."""
        name, n = eqn.primitive.name, eqn.outvars[0].aval.shape[axis]
        of = [a.zero[axis] if a.shape and a.shape[axis] == n else NEVER for a in args]
        if name in ("mul", "and"):
            return any_of(*of)
        if name in ("div", "rem") and not of[1]:
            return of[0]
        if name == "select_n":
            return all_of(*of[1:])
        values = [0 if zero else a.const if not a.shape else None for zero, a in zip(of, args, strict=True)]
        if any(v is None for v in values):
            return NEVER
        key = (name, str(eqn.params), tuple(complex(v) for v in values if v is not None))
        if key not in self._zeros:
            values = [np.asarray(v, a.aval.dtype) for v, a in zip(values, eqn.invars, strict=True)]
            self._zeros[key] = bool(np.asarray(computed(eqn, values)[0]) == 0)
        return all_of(*(zero for zero in of if zero)) if self._zeros[key] else NEVER


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of the function, as a reason."""

    path: str

    def __str__(self) -> str:
        return f"output {self.path} of the function" if self.path else "the output of the function"


def computed(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of an eqn of known values."""
    with jax.ensure_compile_time_eval():
        return bind(eqn, values)
