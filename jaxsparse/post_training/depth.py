"""Structured pruning after training: whole blocks go by how little they change the residual stream."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxsparse.post_training.block_names import numbers_of
from jaxsparse.post_training.samples import each_batch, jitted
from jaxsparse.trace.analysis import Analysis
from jaxsparse.trace.evaluate import ITSELF, Evaluator
from jaxsparse.trace.program import Traced, live_eqns, opened, scan_counts, trace

__all__ = ["block_influence", "block_scores"]


def block_influence(stream_in: jax.Array, stream_out: jax.Array) -> jax.Array:
    r"""How much a block changes what goes through it, as ShortGPT and Minitron measure it.

    .. math:: \mathrm{BI} = 1 - \frac{1}{T} \sum_{t=1}^T \frac{x_t \cdot y_t}{\lVert x_t \rVert \lVert y_t \rVert}

    Args:
      stream_in: what goes into the block, (..., features), floats; T is the product of the other axes.
      stream_out: what comes out, of the same shape.

    Returns:
      (), float32, in [0, 2]; 0 if the block changes no direction.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> float(block_influence(x, jnp.array([[2.0, 0.0], [0.0, 3.0]])))
      0.5

    References:
      Men et al., *ShortGPT: Layers in Large Language Models are More Redundant Than You Expect*, 2024, eq. (1).
    """
    x, y = (jnp.asarray(z).astype(jnp.float32) for z in (stream_in, stream_out))
    if x.shape != y.shape or not x.ndim:
        raise ValueError(f"a block's stream must keep its shape (..., features), got {x.shape} in and {y.shape} out")
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return 1 - jnp.mean((x * y).sum(-1) / jnp.maximum(norms, 1e-30))


def block_scores(apply: Callable[..., Any], params: Any, batches: Iterable[Any], blocks: str) -> np.ndarray:
    """Score the blocks of any model by :func:`block_influence`; those with the lowest scores matter least.

    The residual stream is found in the program: in a ``scan`` over stacked layers it is what is carried from layer to
    layer; in layers that are written out it is the one array that passes all that was computed on from the last use of
    the params of a block to the first use of those of the next. Features are the axis that goes with axes of the
    params of blocks, wherever ``vmap`` has put it; where that says nothing, the last.

    Args:
      apply: ``apply(params, *args)``, any function that JAX can trace, in the mode for evaluation.
      params: its params.
      batches: calibration data, an iterable of the args after params: tuples, or single arrays.
      blocks: where the params of the blocks are: a path with ``*`` for the number of the block, such as ``"block_*"``
        or ``"layers/*"``, or the path of params of layers that a scan stacks, such as ``"blocks"``.

    Returns:
      (blocks,), float64: the mean over batches (Minitron sums over them, which ranks blocks alike), for
      :func:`drop_blocks`.

    Raises:
      ValueError: if no params are there, or if more than one array, or none, passes from block to block; then call
        :func:`block_influence` with the streams of your own code.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"blocks": jnp.stack([jnp.eye(2), jnp.zeros((2, 2)), jnp.eye(2)[::-1]]) / 4}
      >>> apply = lambda p, x: jax.lax.scan(lambda x, w: (x + x @ w, None), x, p["blocks"])[0].sum()
      >>> block_scores(apply, params, [jnp.array([[1.0, 0.0], [1.0, 2.0]])], "blocks").round(3).tolist()
      [0.0, 0.0, 0.019]

    References:
      Muralidharan et al., *Compact Language Models via Pruning and Knowledge Distillation*, 2024, section 2.2, whose
      code is NVIDIA's Model Optimizer, ``mcore_minitron.py`` at a2fbac7; Men et al., *ShortGPT*, 2024.
    """
    number, count = numbers_of(params, blocks)

    def scores(params: Any, *args: Any) -> jax.Array:
        return _scores(apply, params, args, number, count, blocks)

    found = each_batch(jitted(scores, params), params, batches)
    mean = np.mean([np.asarray(score, np.float64) for score in found], axis=0)
    if not np.isfinite(mean).all():
        raise ValueError(f"the stream through the blocks is not finite ({mean}): look for NaN in params and batches")
    return mean


class _Inlined(Evaluator):
    """The same program with calls, remat and custom derivatives in their places."""

    def opaque(self, eqn: Any, args: list[Any], context: Any) -> bool:
        """Look inside functions with custom derivatives: none are taken."""
        return False

    def do_remat2(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Inline what is rematerialised."""
        return self.run(eqn.params["jaxpr"], args, context)

    do_checkpoint = do_remat = do_remat2

    def do_scan(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Keep loops as they are."""
        return ITSELF

    do_while = do_cond = do_scan


class _Watched(_Inlined):
    """A program, and the values that its equations make of some variables."""

    def __init__(self, wanted: Sequence[Any]):
        self.wanted, self.found = set(wanted), dict[Any, Any]()

    def step(self, eqn: Any, args: list[Any], context: Any) -> list[Any]:
        """One equation, whose results are kept."""
        outs = super().step(eqn, args, context)
        self.found |= {v: out for v, out in zip(eqn.outvars, outs, strict=True) if v in self.wanted}
        return outs


def _scores(
    apply: Callable, params: Any, args: Sequence[Any], number: Mapping[str, int], count: int, blocks: str
) -> jax.Array:
    traced = trace(apply, params, *args)
    closed = jax.make_jaxpr(lambda *xs: _Inlined().run(traced.closed, xs))(*traced.leaves)
    traced, (flat, consts) = dataclasses.replace(traced, closed=closed), opened(closed)
    uses = _Uses(flat, traced.paths, number)
    if "*" not in blocks:
        return _in_scan(traced, uses, consts, number, count, blocks)
    streams = uses.streams(count, blocks)
    watched = _Watched(streams)
    watched.run(flat, traced.leaves, consts=consts)
    known = dict(zip(flat.invars, traced.leaves, strict=True)) | watched.found
    orders = _orders(traced, streams, number, blocks)
    values = [jnp.transpose(known[v], order) for v, order in zip(streams, orders, strict=True)]
    return jnp.stack([block_influence(x, y) for x, y in itertools.pairwise(values)])


def _orders(traced: Traced, streams: Sequence[Any], number: Mapping[str, int], blocks: str) -> list[list[int]]:
    """For each stream its axes in the order of those of the first, but features last.

    The axes that ``vmap`` adds may be anywhere, and elsewhere in another stream, so axes are told apart by what they
    are unified with in the program.
    """
    # Arguments are taken for leaves too: as arguments their axes would be frozen, and no longer be told apart.
    paths: list[str | None] = [path if path is not None else f"argument {i}" for i, path in enumerate(traced.paths)]
    analysis = Analysis(dataclasses.replace(traced, paths=paths), outputs="ignore")

    def nodes(ids: Any) -> list[int]:
        found = analysis.spaces.expand(ids)
        return [] if found is None else found.ravel().tolist()

    learned = {node for path in number for ids in analysis.leaf_axes.get(path, ()) for node in nodes(ids)} - {0}
    orders: list[list[int]] = []
    first: list[list[int]] = []  # the nodes of the axes of the first stream, in its order
    for v in streams:
        known = [nodes(ids) for ids in analysis.root.env[v].axes]
        last = len(known) - 1
        features = [i for i, own in enumerate(known) if learned & set(own)] or [last]
        if len(features) > 1 and last not in features:
            raise ValueError(
                f"blocks={blocks!r}: each of the axes {features} of the residual stream could be the features: call "
                "block_influence with the streams of your own code"
            )
        feature = last if last in features else features[0]
        left = [i for i in range(last + 1) if i != feature]
        for place, own in enumerate(first[:-1]):
            same = next((i for i in left[place:] if own and known[i] == own), left[place])
            left.remove(same)
            left.insert(place, same)
        orders.append([*left, feature])
        first = first or [known[i] for i in orders[0]]
    return orders


class _Uses:
    """Dependencies of the variables of a flat program, and the places where the params of blocks are used."""

    def __init__(self, jaxpr: Any, paths: Sequence[str | None], number: Mapping[str, int]):
        self.jaxpr, self.eqns = jaxpr, live_eqns(jaxpr)
        self.data = {v for v, path in zip(jaxpr.invars, paths, strict=True) if path is None}
        self.learned = {v for v, path in zip(jaxpr.invars, paths, strict=True) if path is not None}
        self.of = {v: {number.get(path)} for v, path in zip(jaxpr.invars, paths, strict=True) if path is not None}
        self.used: list[tuple[int, set]] = []  # (place, numbers of blocks, None for other params)
        for place, eqn in enumerate(self.eqns):
            ins = [v for v in eqn.invars if not isinstance(v, Literal)]
            data, learned = any(v in self.data for v in ins), any(v in self.learned for v in ins)
            of = set().union(*(self.of.get(v, set()) for v in ins if v not in self.data))
            if data and of:
                self.used.append((place, of))
            for v in eqn.outvars:
                self.data |= {v} if data else set()
                self.learned |= {v} if learned else set()
                self.of[v] = set() if data else of
        self.last: dict[Any, int] = {v: len(self.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
        for place, eqn in enumerate(self.eqns):
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    self.last[v] = max(self.last.get(v, -1), place)
        made = dict.fromkeys(jaxpr.invars, 0)
        made |= {v: place + 1 for place, eqn in enumerate(self.eqns) for v in eqn.outvars}
        used = {v: place for v, place in made.items() if v in self.data and v in self.last}
        self.made = {v: place for v, place in used.items() if v in self.learned}
        self.given = {v: place for v, place in used.items() if jnp.issubdtype(v.aval.dtype, jnp.floating)}

    def streams(self, count: int, blocks: str) -> list[Any]:
        """The one variable that goes into each block from what is before, and that which goes out of the last."""
        firsts = [min((place for place, of in self.used if i in of), default=-1) for i in range(count)]
        if -1 in firsts:
            raise ValueError(f"blocks={blocks!r}: the function does not use the params of block {firsts.index(-1)}")
        # Where nothing is learned before the blocks, the stream begins with an argument.
        made = self.made if any(place <= firsts[0] for place in self.made.values()) else self.given
        found = []
        for i, stop in enumerate([*firsts, len(self.eqns)]):
            start = 1 + max((place for place, of in self.used if place < stop and (i == 0 or i - 1 in of)), default=-1)
            alive = (
                [v for v, first in made.items() if first <= place <= self.last[v]] for place in range(start, stop + 1)
            )
            single = [one[0] for one in alive if len(one) == 1]
            if not single:
                where = f"out of block {i - 1}" if i else "into block 0"
                raise ValueError(
                    f"blocks={blocks!r}: not a single array goes {where}, so "
                    "there is no one residual stream: call block_influence with the streams of your own code"
                )
            found.append(single[0 if i else -1])
        return found


def _in_scan(
    traced: Traced, uses: _Uses, consts: Sequence[Any], number: Mapping[str, int], count: int, blocks: str
) -> jax.Array:
    """The scores of layers that a scan goes over."""
    found = []
    for eqn in uses.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == count:
            _, m = scan_counts(eqn.params)
            if any(0 in uses.of.get(v, ()) for v in eqn.invars[m:] if not isinstance(v, Literal)):
                found.append(eqn)
    if len(found) != 1:
        raise ValueError(f"blocks={blocks!r}: {len(found)} scans go over these layers, and it must be one")
    (eqn,) = found
    n, m = scan_counts(eqn.params)
    streams = [
        i for i, v in enumerate(eqn.outvars[: m - n]) if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.shape
    ]
    if len(streams) != 1:
        raise ValueError(
            f"blocks={blocks!r}: the scan carries {len(streams)} arrays of floats from layer to layer, and it must be "
            "one: call block_influence with the streams of your own code"
        )
    (order,), leaves = _orders(traced, [eqn.outvars[streams[0]]], number, blocks), traced.leaves
    watched = _Watched([v for v in eqn.invars if not isinstance(v, Literal)])
    watched.run(uses.jaxpr, leaves, consts=consts)
    known = dict(zip([*uses.jaxpr.constvars, *uses.jaxpr.invars], [*consts, *leaves], strict=True)) | watched.found
    args = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]

    def body(carry, xs):
        outs = Evaluator().run(eqn.params["jaxpr"], [*args[:n], *carry, *xs])
        return outs[: m - n], block_influence(*(jnp.transpose(x[streams[0]], order) for x in (carry, outs)))

    return lax.scan(body, args[n:m], args[m:], length=count, reverse=eqn.params["reverse"])[1]
