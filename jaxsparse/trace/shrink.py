"""Evaluation of a program on arrays from which dead entries are gone."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxsparse.trace.analysis import ELEMENTWISE, HIGHER, IDENTITY, MADE, Analysis, Node
from jaxsparse.trace.evaluate import ITSELF, Evaluator

__all__ = ["Shrunk", "living_nodes"]

Stays = list[Any]  # for each axis of a value which entries stay, (n,) bool, or None where all of them do


def living_nodes(analysis: Analysis, kept: Mapping[tuple[str, int], np.ndarray]) -> np.ndarray:
    """The nodes of the analysis that live, when these entries of leaves are kept.

    Args:
      analysis: of the unchanged function.
      kept: (path, axis) -> (n,), bool, for the axes that lose entries.

    Returns:
      (number of nodes,), bool: False for a node all of whose entries are gone.

    Raises:
      ValueError: for entries that the function needs, with the reasons.
    """
    spaces = analysis.spaces
    axes = {(path, i): spaces.expand(ids) for path, of in analysis.leaf_axes.items() for i, ids in enumerate(of)}
    gone, needed = np.zeros(spaces.size, bool), np.zeros(spaces.size, bool)
    for place, nodes in axes.items():
        if nodes is not None:
            stays = kept.get(place, np.ones(len(nodes), bool))
            gone[nodes[~stays]] = True
            needed[nodes[stays]] = True
    alive = needed | ~gone
    alive[0] = True
    for (path, axis), stays in kept.items():
        nodes = axes[path, axis]
        left = np.ones(len(stays), bool) if nodes is None else alive[nodes].all(1)
        if (left != stays).any():
            why = spaces.why(analysis.leaf_axes[path][axis]) if analysis.leaf_axes[path][axis] is not None else []
            raise ValueError(
                f"{int((left & ~stays).sum())} entries along axis {axis} of {path} cannot go: "
                + ("; ".join(why) or "the function needs them, or other axes that were kept share their channels")
            )
    return alive


class Shrunk(Evaluator):
    """Evaluates a jaxpr on arrays without the dead entries that an analysis of it finds along their axes.

    Args:
      analysis: of this jaxpr, at full shapes.
      alive: which of its nodes live.
    """

    def __init__(self, analysis: Analysis, alive: np.ndarray):
        self.a, self.alive = analysis, alive
        self._stays: dict[int, tuple[Any, Any]] = {}
        self._touched: dict[Node, bool] = {}

    def inner(self, context, eqn, which=0):
        """The call of a sub-jaxpr in the analysis."""
        return context.children[id(eqn), which]

    def start(self, jaxpr, consts, context):
        """The constants of a jaxpr, cut."""
        return [cut(c, self.of(v, context)) if np.ndim(c) else c for v, c in zip(jaxpr.constvars, consts, strict=True)]

    def stays(self, val) -> Stays:
        """Which entries of a value stay."""
        return [self._along(ids) for ids in val.axes]

    def of(self, atom, node: Node) -> Stays:
        """Which entries of an operand or a result stay."""
        known = not isinstance(atom, Literal) and atom in node.env
        return self.stays(node.env[atom]) if known else [None] * np.ndim(getattr(atom, "val", atom.aval))

    def touched(self, node: Node) -> bool:
        """Whether anything in a call of a jaxpr is cut."""
        if node not in self._touched:
            here = any(s is not None for val in node.env.values() for s in self.stays(val))
            self._touched[node] = here or any(map(self.touched, node.children.values()))
        return self._touched[node]

    def rule(self, eqn, args, context):
        """The results of a primitive at the smaller shapes."""
        name, calls = eqn.primitive.name, [c for (eqn_id, _), c in context.children.items() if eqn_id == id(eqn)]
        ins, outs = ([self.of(v, context) for v in vs] for vs in (eqn.invars, eqn.outvars))
        cut_here = any(s is not None for side in (*ins, *outs) for s in side)
        if not (cut_here or any(map(self.touched, calls))):
            return self.bind(eqn, args)  # the same program, with its own derivatives and compiled once
        if name in ("custom_jvp_call", "custom_vjp_call"):
            return self.custom(eqn, args, context, ins, outs)
        if name in HIGHER:
            return ITSELF
        if name in AS_IT_IS:
            return self.bind(eqn, args)
        found = RULES[name](eqn, args, ins, outs) if name in RULES else None
        if found is None:
            return self.at_full_size(eqn, args, ins, outs)
        return self.bind(eqn, args, **found) if isinstance(found, dict) else found

    def at_full_size(self, eqn, args, ins: Sequence[Stays], outs: Sequence[Stays]):
        """Any primitive: dead entries are zeros for a moment."""
        full = args if eqn.primitive.name in MADE else [grown(x, s) for x, s in zip(args, ins, strict=True)]
        return [cut(x, s) for x, s in zip(self.bind(eqn, full), outs, strict=True)]

    def custom(self, eqn, args, node, ins, outs):
        """A function with its own derivative, whose rule was traced at full shapes: the rule is cut like the rest."""
        forward = eqn.primitive.name == "custom_jvp_call"
        avals, results = ([v.aval for v in vs] for vs in (eqn.invars, eqn.outvars))
        if not all(map(_plain_float, (*avals, *results))):
            return self.at_full_size(eqn, args, ins, outs)
        vals = [self.a.made(v.val) if isinstance(v, Literal) else node.env[v] for v in eqn.invars]

        def full(*xs):
            return tuple(self.bind(eqn, xs))

        if forward:
            rule, along, wanted = lambda xs, ts: jax.jvp(full, xs, ts), vals, [*outs, *outs]
        else:
            rule, along, wanted = lambda xs, ts: jax.vjp(full, *xs)[1](ts), [node.env[v] for v in eqn.outvars], ins
        shapes = [tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in vs) for vs in (avals, results)]
        closed = jax.make_jaxpr(rule)(shapes[0], shapes[0 if forward else 1])
        derivative = self._part(closed, [*vals, *along], wanted)
        if derivative is None:
            return self.at_full_size(eqn, args, ins, outs)

        def inside(*xs):
            return tuple(self.run(eqn.params["call_jaxpr"], xs, self.inner(node, eqn)))

        if forward:
            small = jax.custom_jvp(inside)

            @small.defjvp
            def _(xs, ts):
                found = derivative([*xs, *ts])
                return tuple(found[: len(outs)]), tuple(found[len(outs) :])
        else:
            small = jax.custom_vjp(inside)
            small.defvjp(lambda *xs: (inside(*xs), xs), lambda xs, ts: tuple(derivative([*xs, *ts])))
        return list(small(*args))

    def _part(self, closed, vals, wanted: list[Stays]) -> Callable[[list[Any]], list[Any]] | None:
        """A program beside the analysed one, cut where its inputs are; None if its outputs would not be as wanted."""
        analysis = copy.copy(self.a)
        analysis.spaces = spaces = copy.copy(self.a.spaces)
        for place in (analysis, spaces):  # what is found here must not change what is known
            for name, value in vars(place).items():
                if isinstance(value, np.ndarray | dict | list | set):
                    setattr(place, name, value.copy())
        node = Node()
        results = analysis.run(closed, (), [copy.copy(val) for val in vals], node)
        gone = spaces.expand(self._roots[~self.alive[self._roots]][:, None])
        alive = np.ones(spaces.size, bool)
        if gone is not None:
            alive[gone] = False
            if ((gone > 0).sum(1) != 1).any():
                return None
        alive[0] = True
        if not np.array_equal(_lives(spaces.expand(self._roots[:, None]), alive), self.alive[self._roots]):
            return None
        part = Shrunk(analysis, alive)
        if not all(_equal(part.stays(val), stays) for val, stays in zip(results, wanted, strict=True)):
            return None
        return lambda arrays: part.run(closed, arrays, node)

    @functools.cached_property
    def _roots(self) -> np.ndarray:
        """The nodes of which all others are conjunctions; at least one of them is closed."""
        nodes = self.a.spaces.expand(np.arange(len(self.alive))[:, None])
        return np.zeros(0, np.int64) if nodes is None else np.unique(nodes[nodes > 0])

    def _along(self, ids):
        if ids is None:
            return None
        if id(ids) not in self._stays:
            stays = _lives(self.a.spaces.expand(ids), self.alive)
            self._stays[id(ids)] = ids, None if np.all(stays) else stays
        return self._stays[id(ids)][1]


def _plain_float(aval: Any) -> bool:
    """Whether an array has floats that do not vary over the devices of a shard_map: shapes alone do not say that."""
    varying = getattr(getattr(aval, "manual_axis_type", None), "varying", None)
    return jnp.issubdtype(aval.dtype, jnp.floating) and not varying


def _lives(nodes, alive: np.ndarray):
    """Which entries of an axis stay; True for all of one that cannot go."""
    return True if nodes is None else alive[nodes].all(1)


# Arrays


def taken(x: Any, positions: np.ndarray, axis: int) -> Any:
    """Entries along an axis, in ascending order."""
    steps = np.diff(positions)
    if len(positions) and (steps == 1).all():
        return lax.slice_in_dim(x, int(positions[0]), int(positions[-1]) + 1, axis=axis)
    return jnp.take(x, positions, axis, indices_are_sorted=True, unique_indices=True, mode="clip")


def cut(x: Any, stays: Stays) -> Any:
    """An array without its dead entries."""
    for axis, s in enumerate(stays):
        x = x if s is None else taken(x, np.flatnonzero(s), axis)
    return x


def grown(x: Any, stays: Stays) -> Any:
    """An array at its full size, its dead entries zeros."""
    for axis, s in enumerate(stays):
        if s is not None:
            shape = [len(s) if i == axis else n for i, n in enumerate(x.shape)]
            x = jnp.zeros(shape, x.dtype).at[(*(slice(None),) * axis, np.flatnonzero(s))].set(x)
    return x


def _size(n: int, stays) -> int:
    return n if stays is None else int(stays.sum())


def _shape(eqn, outs) -> tuple[int, ...]:
    return tuple(map(_size, eqn.outvars[0].aval.shape, outs[0]))


def _equal(a: Stays, b: Stays) -> bool:
    return all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


# Primitives with shapes among their parameters: (eqn, operands, what stays of operands, what stays of results) -> the
# parameters that change, the results, or None for a detour at full size.


def _broadcast_in_dim(eqn, args, ins, outs):
    return {"shape": _shape(eqn, outs)}


def _reshape(eqn, args, ins, outs):
    return {"new_sizes": _shape(eqn, outs)}


def _dynamic_slice(eqn, args, ins, outs):
    return {"slice_sizes": _shape(eqn, outs)}


def _slice(eqn, args, ins, outs):
    p, x = eqn.params, args[0]
    steps = p["strides"] or (1,) * x.ndim
    for axis, (s, *pick) in enumerate(zip(ins[0], p["start_indices"], p["limit_indices"], steps, strict=True)):
        s = np.ones(eqn.invars[0].aval.shape[axis], bool) if s is None else s
        picked = np.arange(*pick)
        positions = (np.cumsum(s) - 1)[picked[s[picked]]]
        x = x if len(positions) == x.shape[axis] else taken(x, positions, axis)
    return [x]


def _split(eqn, args, ins, outs):
    axis = eqn.params["axis"]
    return {"sizes": tuple(_size(int(n), o[axis]) for n, o in zip(eqn.params["sizes"], outs, strict=True))}


def _pad(eqn, args, ins, outs):
    config = []
    for (low, high, inside), s in zip(eqn.params["padding_config"], outs[0], strict=True):
        ends = (low, high) if s is None else (int(s[:low].sum()), int(s[len(s) - high :].sum()))
        config.append((*ends, inside))
    return {"padding_config": tuple(config)}


def _conv_general_dilated(eqn, args, ins, outs):
    number = eqn.params["feature_group_count"]
    filters = ins[1][eqn.params["dimension_numbers"].rhs_spec[0]]
    return {"feature_group_count": number if filters is None else int(filters.reshape(number, -1).any(1).sum())}


def _gather(eqn, args, ins, outs):
    indexed, sizes, shape = (
        eqn.params["dimension_numbers"].start_index_map,
        list(eqn.params["slice_sizes"]),
        args[0].shape,
    )
    for axis, s in enumerate(ins[0]):
        if s is not None and axis in indexed:
            return None
        sizes[axis] = sizes[axis] if s is None else shape[axis]
    return {"slice_sizes": tuple(sizes)}


RULES = {
    "broadcast_in_dim": _broadcast_in_dim,
    "conv_general_dilated": _conv_general_dilated,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
}
# These take their sizes from their operands.
AS_IT_IS = ELEMENTWISE | IDENTITY | {
    "argmax", "argmin", "bitcast_convert_type", "concatenate", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum",
    "dot_general", "dynamic_update_slice", "fft", "ragged_dot_general", "reduce_and", "reduce_max", "reduce_min",
    "reduce_or", "reduce_prod", "reduce_sum", "reduce_window_max", "reduce_window_min", "reduce_window_sum",
    "reduce_xor", "rev", "scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter-min",
    "scatter-max", "scatter-sub", "sort", "squeeze", "top_k", "transpose",
}  # fmt: skip
