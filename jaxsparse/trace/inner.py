"""Rules of the analysis for programs within programs: jit, remat, custom derivatives, cond, scan, while, shard_map."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxsparse.trace.conditions import ALWAYS
from jaxsparse.trace.program import opened, scan_counts, where
from jaxsparse.trace.values import Node, Scan, Val

if TYPE_CHECKING:
    from jaxsparse.trace.analysis import Analysis

__all__ = ["INNER"]

Inner = Callable[["Analysis", Any, list[Val], Node], list[Val]]
INNER: dict[str, Inner] = {}  # name of a primitive -> (analysis, eqn, values, node of the call) -> values


def _inner(*names: str) -> Callable[[Inner], Inner]:
    def register(rule):
        INNER.update(dict.fromkeys(names, rule))
        return rule

    return register


@_inner(
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "remat"
)
def call(a, eqn, args, node):
    """A function as it stands; a custom derivative is not looked at."""
    return a.child(node, eqn, 0, eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"], args)


@_inner("cond")
def cond(a, eqn, args, node):
    """All branches, whose outputs are the same."""
    outs = [a.child(node, eqn, i, branch, args[1:]) for i, branch in enumerate(eqn.params["branches"])]
    first = [dataclasses.replace(out, zero=list(out.zero), const=None, view=None) for out in outs[0]]
    for other in outs[1:]:
        a.carried(first, other, where(eqn))
    return first


@_inner("scan")
def scan(a, eqn, args, node):
    """A loop over slices along the first axis, which itself stays whole."""
    p = eqn.params
    n, m = scan_counts(p)
    xs = []
    for arg in args[m:]:
        a.spaces.freeze(arg.axes[0], where(eqn, "scanned over"))
        x = dataclasses.replace(arg, shape=arg.shape[1:], axes=arg.axes[1:], zero=arg.zero[1:], const=None)
        x.view = arg.view and (arg.view[0], arg.view[1][1:])
        xs.append(x)

    def body(carry):
        return a.child(node, eqn, 0, p["jaxpr"], [*args[:n], *carry, *xs])

    stacked = [x.view[0] for x in args[m:] if x.view and x.view[1][0] == (0,)]
    a.scope = (*a.scope, id(eqn))
    carry, ys = _loop(a, eqn, args[n:m], p["length"], True, body)
    shared = [ids for x in (*args[:n], *carry, *ys) for ids in x.axes]
    known = a.scans.get(id(eqn), Scan(p["length"], [], []))  # one eqn may be called several times
    a.scans[id(eqn)] = Scan(p["length"], known.leaves + stacked, known.shared + shared)
    a.scope = a.scope[:-1]
    return [*carry, *(_stacked(y, p["length"]) for y in ys)]


def _stacked(y, length):
    return dataclasses.replace(
        y, shape=(length, *y.shape), axes=[None, *y.axes], zero=[ALWAYS, *y.zero], const=None, view=None
    )


@_inner("while")
def while_loop(a, eqn, args, node):
    """A loop whose rounds are not known."""
    p = eqn.params
    n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

    def body(carry):
        a.child(node, eqn, 0, p["cond_jaxpr"], [*args[:n], *carry])
        return a.child(node, eqn, 1, p["body_jaxpr"], [*args[n:m], *carry])

    return _loop(a, eqn, args[m:], 1, False, body)[0]


def _loop(a, eqn, carry: Sequence[Val], times: float, bounded: bool, body):
    """The carry and the other results of a loop, walked until a round says nothing new of its carry."""
    carry = [dataclasses.replace(c, zero=list(c.zero), const=None, view=None) for c in carry]
    outer = a.times, a.bounded
    a.times, a.bounded = a.times * times, a.bounded and bounded
    while True:
        mark = a.mark()
        outs = body([dataclasses.replace(c, zero=list(c.zero)) for c in carry])
        if not a.carried(carry, outs[: len(carry)], where(eqn)):
            break
        a.forget(mark)
    a.times, a.bounded = outer
    return carry, outs[len(carry) :]


@_inner("shard_map")
def shard_map(a, eqn, args, node):
    """The program of one shard; axes that are sharded stay whole."""
    p = eqn.params
    jaxpr, _ = opened(p["jaxpr"])
    split = {name for spec in p["in_specs"] for names in spec for name in _names(names)}
    ins = [_with_whole(a, eqn, x, var, spec) for x, var, spec in zip(args, jaxpr.invars, p["in_specs"], strict=True)]
    outer, a.times = a.times, a.times * math.prod(p["mesh"].shape[name] for name in split)
    outs = a.child(node, eqn, 0, p["jaxpr"], ins)
    a.times = outer
    outs = [_with_whole(a, eqn, x, var, spec) for x, var, spec in zip(outs, eqn.outvars, p["out_specs"], strict=True)]
    return [dataclasses.replace(out, view=None) for out in outs]


def _with_whole(a, eqn, x, var, spec):
    """The value on the other side of a shard_map, where axes that are sharded have another size."""
    axes = list(x.axes)
    for i, names in enumerate(spec):
        if _names(names):
            a.spaces.freeze(x.axes[i], where(eqn, "sharded over devices"))
            axes[i] = None
    return dataclasses.replace(x, shape=tuple(var.aval.shape), axes=axes, zero=list(x.zero), const=None)


def _names(of_axis):
    """The names of devices over which an axis is sharded."""
    return of_axis if isinstance(of_axis, tuple) else () if of_axis is None else (of_axis,)
