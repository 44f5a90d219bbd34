"""A walk through a program that stops at every product with a leaf to prune, and goes on with the leaf as it is then.

A walk is a generator of one batch. All batches walk in step: where all of them have come to the same matrix, it is
pruned by what arrives there in all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxsparse.post_training.made import Made, as_is, bound, constant, made_by, plain, sliced, stacked, whole
from jaxsparse.trace.layout import Followed
from jaxsparse.trace.moments import Moments
from jaxsparse.trace.products import PRODUCTS
from jaxsparse.trace.program import CALLS, Traced, live_eqns, opened, scan_counts
from jaxsparse.trace.recorder import Recorder
from jaxsparse.trace.views import View

__all__ = ["Entry", "Request", "Walk", "Weights", "in_step"]

ENTERED = (*CALLS, "custom_vjp_call")  # one jaxpr, on all operands


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf, or an entry of a leaf of stacked layers.

    Attributes:
      path: of the leaf.
      at: (axis, entry), for the axes that scans go over.
    """

    path: str
    at: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return self.path + "".join(f"[{i}]" for _, i in sorted(self.at))


@dataclasses.dataclass
class Weights:
    """The weights while they are pruned.

    Attributes:
      now: path -> the leaf as it is now.
      waiting: paths of the leaves that are still to be pruned, in whole or in part.
      done: what is pruned.
    """

    now: dict[str, Any]
    waiting: set[str]
    done: set[Entry] = dataclasses.field(default_factory=set)

    def due(self, entry: Entry) -> bool:
        """Whether this is still to be pruned."""
        return entry.path in self.waiting and entry not in self.done


@dataclasses.dataclass(frozen=True)
class Request:
    """A stop of a walk.

    Attributes:
      entries: what is to be pruned now, most often one matrix.
      moments: computes the moments of what arrives there; None: they are not those of one product, and have to be
        recorded in the whole program.
    """

    entries: tuple[Entry, ...]
    moments: Callable[[], Moments] | None = None


Stops = Generator[Request, None, list[Any]]


class Walk:
    """Walks through one program, with any number of batches.

    Args:
      traced: the program.
      uses: the products and lookups of its leaves.
      weights: what is pruned on the way.
      gram: whether moments are Gram matrices.
    """

    def __init__(self, traced: Traced, uses: Followed, weights: Weights, gram: bool):
        self.traced, self.weights, self.gram = traced, weights, gram
        products = {path: [use for use in uses.uses.get(path, []) if _is_product(use)] for path in weights.waiting}
        self.several = {path for path, of_leaf in products.items() if len(of_leaf) > 1}
        self.inside: dict[int, set[str]] = {}  # id of an equation -> the leaves with a product inside of it
        for path, of_leaf in products.items():
            for use in of_leaf:
                for eqn in use.where.outer:
                    self.inside.setdefault(id(eqn), set()).add(path)
        self._plans: dict[int, tuple[Any, list]] = {}
        self._arriving: dict[tuple, Callable | None] = {}

    def start(self, leaves: Iterable[Any]) -> Stops:
        """The walk of one batch.

        Args:
          leaves: the inputs of the program; those that are params are not read.
        """
        now = self.weights.now
        jaxpr, _ = opened(self.traced.closed)
        inputs = [
            leaf if path is None else whole(path, v.aval, functools.partial(now.__getitem__, path))
            for path, v, leaf in zip(self.traced.paths, jaxpr.invars, leaves, strict=True)
        ]
        return self._run(self.traced.closed, inputs)

    def _plan(self, jaxpr: Any) -> list[tuple[Any, list[Any], list[Any]]]:
        """The equations in use, each with the variables that nothing after it reads, and its results that are read."""
        if id(jaxpr) not in self._plans:
            needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
            plan = []
            for eqn in reversed(live_eqns(jaxpr)):
                kept = [v in needed for v in eqn.outvars]
                last = {v for v in eqn.invars if not isinstance(v, Literal)} - needed
                needed |= last
                plan.append((eqn, list(last), kept))
            self._plans[id(jaxpr)] = jaxpr, plan[::-1]  # the jaxpr too, so that its id stays its own
        return self._plans[id(jaxpr)][1]

    def _run(self, jaxpr: Any, args: list[Any]) -> Stops:
        jaxpr, consts = opened(jaxpr)
        env = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        del args
        for eqn, last, kept in self._plan(jaxpr):
            ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            for v in last:
                del env[v]
            outs = yield from self._step(eqn, ins)
            env |= {v: out for v, out, keep in zip(eqn.outvars, outs, kept, strict=True) if keep}
            del ins, outs
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def _due(self, value: Any) -> bool:
        return isinstance(value, Made) and value.path in self.weights.waiting

    def _step(self, eqn: Any, args: list[Any]) -> Stops:
        name = eqn.primitive.name
        due = {arg.path for arg in args if self._due(arg)}
        if due and name in ENTERED:
            return (yield from self._run(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), args))
        product = name in PRODUCTS
        if as_is(eqn, args) and not (product and any(isinstance(arg, Made) and not arg.named for arg in args)):
            return made_by(eqn, args)
        if due and product:
            yield from self._product(eqn, args)
        elif due & self.inside.get(id(eqn), set()):
            if name == "scan":
                return (yield from self._scan(eqn, args))
            yield from self._recorded(eqn, args)
        return bound(eqn, args)

    def _recorded(self, eqn: Any, args: list[Any]) -> Generator[Request, None, None]:
        """Stops before an equation, for all products inside with these operands."""
        inside = self.inside[id(eqn)]
        entries = [Entry(arg.path, arg.at) for arg in args if self._due(arg) and arg.path in inside]
        if entries := [entry for entry in dict.fromkeys(entries) if self.weights.due(entry)]:
            yield Request(tuple(entries))

    def _product(self, eqn: Any, args: list[Any]) -> Generator[Request, None, None]:
        """Stops before a product of a leaf with anything that is not made of params."""
        for side in (0, 1):
            w, x = args[side], args[1 - side]
            if not self._due(w) or (isinstance(x, Made) and x.named):
                continue
            entry = Entry(w.path, w.at)
            if not self.weights.due(entry):
                continue
            if w.path in self.several:
                yield Request((entry,))
            elif moments := self._moments(eqn, side, w.view):
                yield Request((entry,), functools.partial(_of_plain, moments, x))

    def _moments(self, eqn: Any, side: int, view: View) -> Callable[[Any], Moments] | None:
        """The moments of what meets a leaf in a product, as a function; None where they cannot be recorded."""
        x = eqn.invars[1 - side].aval
        shapes = [(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        key = (eqn.primitive.name, side, str(shapes), str(eqn.params), view.axes, view.scanned)
        if key not in self._arriving:

            def moments(x):
                recorder = Recorder([view.path], self.gram)
                recorder.rule(eqn, [x, view] if side else [view, x], None)
                return list(recorder.found.values())

            found = jax.eval_shape(moments, jax.ShapeDtypeStruct(x.shape, x.dtype))
            self._arriving[key] = jax.jit(lambda x: moments(x)[0]) if found else None
        return self._arriving[key]

    def _scan(self, eqn: Any, args: list[Any]) -> Stops:
        """Goes through stacked layers one by one; a leaf that all rounds share is pruned before them."""
        p = eqn.params
        n, m = scan_counts(p)
        yield from self._recorded(eqn, args[:m])
        stacks = [arg for arg in args[m:] if self._due(arg) and arg.path in self.inside[id(eqn)]]
        if parts := [arg for arg in stacks if None in sliced(arg, 0).view.axes]:  # a round gets a part of an axis
            yield from self._recorded(eqn, parts)
            stacks = [arg for arg in stacks if self._due(arg)]
        if not stacks:
            return bound(eqn, args)
        consts, carry, xs = args[:n], args[n:m], args[m:]
        del args
        rounds = []
        for i in reversed(range(p["length"])) if p["reverse"] else range(p["length"]):
            outs = yield from self._run(p["jaxpr"], [*consts, *carry, *(sliced(x, i) for x in xs)])
            carry = outs[: m - n]
            rounds.append(outs[m - n :])
        rounds = rounds[::-1] if p["reverse"] else rounds
        ys = zip(*rounds, strict=True)
        return [*carry, *(stacked(list(y), v.aval) for y, v in zip(ys, eqn.outvars[m - n :], strict=True))]


def _of_plain(moments: Callable[[Any], Moments], x: Any) -> Moments:
    return moments(plain(x))


def _is_product(use: Any) -> bool:
    return use.where.eqn.primitive.name in PRODUCTS


def in_step(walks: list[Stops], weights: Weights, prune: Callable[[tuple[Entry, ...], Moments | None], None]) -> None:
    """Walk with all batches at once, until nothing is left to prune.

    Args:
      walks: one for each batch.
      weights: what is pruned on the way.
      prune: prunes what walks ask for by the sum of the moments of all batches, or by what it records itself if that is
        None.
    """
    waits: list[Request | None] = [next(walk, None) for walk in walks]
    while weights.waiting and (asked := [request for request in waits if request is not None]):
        first = asked[0]
        total = None
        if len(asked) == len(waits) and all(r.entries == first.entries and r.moments is not None for r in asked):
            for request in asked:
                moments = request.moments()  # type: ignore[misc]
                total = moments if total is None else jax.tree.map(jnp.add, total, moments)
        prune(first.entries, total)
        del asked, first
        for i, walk in enumerate(walks):
            stop = waits[i]
            if stop is not None and not any(map(weights.due, stop.entries)):
                waits[i] = stop = None  # what arrived there is not held on to
                waits[i] = next(walk, None)
