"""Inputs, outputs and stack axes of every leaf, as the function itself uses them."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from jaxsparse.layouts import Layout
from jaxsparse.trace.moving import blocks
from jaxsparse.trace.products import dot_parts
from jaxsparse.trace.program import CALLS, Traced, Where, live_eqns, opened, scan_counts, trace, where, within
from jaxsparse.trace.rules import ELEMENTWISE, IDENTITY
from jaxsparse.trees import listed

__all__ = ["Followed", "Use", "followed", "layouts_of", "matrices"]

logger = logging.getLogger("jaxsparse")

Axes = frozenset[int]


class Seen(NamedTuple):
    """A value of the program: a leaf in another layout, or something else.

    Attributes:
      path: the path of the leaf, None for anything else.
      axes: for each axis of the value, the axes of the leaf that it runs along, in whole or in part.
      stack: the axes of the leaf that scans have taken apart.
      data: whether it depends on anything but params; of a leaf, whether data has chosen a part of it, as in e[token].
    """

    path: str | None = None
    axes: tuple[Axes, ...] = ()
    stack: Axes = frozenset()
    data: bool = False

    @classmethod
    def leaf(cls, path: str | None, shape: Sequence[int]) -> "Seen":
        """A leaf as it is."""
        return cls(path, tuple(Axes([i]) for i in range(len(shape))))

    def without(self, gone: Sequence[int]) -> "Seen":
        """A leaf of which some axes are taken one entry at a time."""
        kept = tuple(axes for i, axes in enumerate(self.axes) if i not in gone)
        return self._replace(axes=kept, stack=self.stack | _union(self.axes[i] for i in gone))


DATA = Seen(data=True)


@dataclasses.dataclass(frozen=True)
class Use:
    """A product of a leaf with activations."""

    inputs: Axes
    outputs: Axes
    stack: Axes
    where: Where
    number: int  # in the order of the program, of all leaves


class Followed(NamedTuple):
    """The uses of leaves in a program.

    Attributes:
      uses: path -> its products and lookups, in the order of the program.
      stacks: path -> the axes that scans take apart, of the leaves of scans.
    """

    uses: dict[str, list[Use]]
    stacks: dict[str, Axes]


def followed(traced: Traced) -> Followed:
    """Follow the leaves of params through a program to the products and lookups that they are in."""
    jaxpr, _ = opened(traced.closed)
    walk = _Walk()
    inputs = zip(traced.paths, jaxpr.invars, strict=True)
    walk.run(traced.closed, [DATA if path is None else Seen.leaf(path, v.aval.shape) for path, v in inputs])
    return Followed(walk.uses, walk.stacks)


def matrices(apply: Callable[..., Any], params: Any, *args: Any) -> dict[str, Layout]:
    """Find which axes of each leaf are inputs, outputs and stacked layers, by how a function multiplies it.

    The axes that a product sums over are the inputs, those of a batch of matrices and those that a scan runs over are
    the stack, the others the outputs; window axes of a convolution are named by none. A lookup (an embedding), of
    one token or of many, has its entries as inputs. Transposed kernels, fused heads and layers stacked on any axis come
    out right whatever the names of leaves, and so do leaves that are cast, scaled, sliced or reshaped first.

    Give it as ``layout=`` to methods, structures, allocations and tables. Leaves that are in no product (biases, gains,
    tables of positions), or that products use in different ways (an embedding that is also the last layer), are left
    out, and so to :func:`jaxsparse.layouts.leaf_layouts`; the log (INFO, "jaxsparse") names the latter. Of layers that
    are scanned, biases and gains are there too, as vectors.

    Args:
      apply: a function of params and further arguments.
      params: the params or their shapes.
      *args: the further arguments, or their shapes.

    Returns:
      path -> :class:`jaxsparse.Layout`, axes counted from the front.

    Raises:
      ValueError: if ``apply`` uses none of the params, or cannot be traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 5)), "heads": jnp.ones((2, 3, 4)), "b": jnp.zeros(3)}
      >>> def apply(p, x):
      ...     h = jnp.tanh(x @ p["w"].T + p["b"])
      ...     return jnp.einsum("i,hio->ho", h, p["heads"])
      >>> for path, layout in matrices(apply, params, jnp.ones(5)).items():
      ...     print(path, layout)
      heads Layout(inputs=(1,), outputs=(0, 2), stack=())
      w Layout(inputs=(1,), outputs=(0,), stack=())
    """
    traced = trace(apply, params, *args)
    return layouts_of(traced, followed(traced))


def layouts_of(traced: Traced, leaves: Followed) -> dict[str, Layout]:
    """As :func:`matrices`, of a function that is traced and followed."""
    jaxpr, _ = opened(traced.closed)
    shapes = {path: v.aval.shape for path, v in zip(traced.paths, jaxpr.invars, strict=True) if path is not None}
    found, left = {}, []
    for path, stack in leaves.stacks.items():
        rest = [axis for axis in range(len(shapes[path])) if axis not in stack]
        if path not in leaves.uses and len(rest) < 2:  # a bias or a gain for each layer
            found[path] = Layout((), tuple(rest), tuple(sorted(stack)))
    for path, uses in leaves.uses.items():
        layouts = {_layout(use, shapes[path]): use.where for use in uses}
        layout, *others = layouts
        if layout is not None and not others:
            found[path] = layout
        else:
            ways = [f"{layout or 'part of an axis as inputs'} in {place}" for layout, place in layouts.items()]
            left.append(f"{path} ({'; '.join(ways)})")
    if left:
        logger.info("matrices: the layout of these leaves is left to names and shapes: %s", listed(left))
    return {path: found[path] for path in shapes if path in found}


def _layout(use: Use, shape: Sequence[int]) -> Layout | None:
    """The layout of a leaf in a product; None if an axis is in two of its parts, or a part has none."""
    if use.inputs & use.outputs or (use.inputs | use.outputs) & use.stack or not (use.inputs and use.outputs):
        return None
    stack = [axis for axis in use.stack if shape[axis] > 1]  # the others are the window of a 1 x 1 convolution
    return Layout(tuple(sorted(use.inputs)), tuple(sorted(use.outputs)), tuple(sorted(stack)))


def _union(axes: Iterable[Axes]) -> Axes:
    return frozenset[int]().union(*axes)


# Changes of layout: what an equation makes of a leaf.


def _transpose(eqn: Any, leaf: Seen) -> Seen:
    return leaf._replace(axes=tuple(leaf.axes[i] for i in eqn.params["permutation"]))


def _squeeze(eqn: Any, leaf: Seen) -> Seen:
    return leaf.without(eqn.params["dimensions"])


def _broadcast(eqn: Any, leaf: Seen) -> Seen:
    to, rank = eqn.params["broadcast_dimensions"], len(eqn.params["shape"])
    return leaf._replace(axes=tuple(leaf.axes[to.index(i)] if i in to else Axes() for i in range(rank)))


def _reshape(eqn: Any, leaf: Seen) -> Seen:
    shape = eqn.outvars[0].aval.shape
    axes = [Axes()] * len(shape)
    for before, after in blocks(eqn.invars[0].aval.shape, shape):
        for i in after:
            axes[i] = _union(leaf.axes[j] for j in before)
    return leaf._replace(axes=tuple(axes))


CHANGES: dict[str, Callable[[Any, Seen], Seen]] = {
    "transpose": _transpose, "squeeze": _squeeze, "broadcast_in_dim": _broadcast, "reshape": _reshape,
    **dict.fromkeys(("slice", "rev", "pad", "split", "cumsum", "sort"), lambda eqn, leaf: leaf),
}  # fmt: skip


class _Walk:
    """Follows leaves through a program to the products they are in."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.stacks: dict[str, Axes] = {}  # of leaves that are scanned over

    def run(self, jaxpr: Any, args: Sequence[Seen]) -> list[Seen]:
        jaxpr, _ = opened(jaxpr)
        env = dict.fromkeys(jaxpr.constvars, Seen()) | dict(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Seen:
            return Seen() if isinstance(v, Literal) else env[v]

        for eqn in live_eqns(jaxpr):
            ins = [read(v) for v in eqn.invars]
            with within(eqn):
                outs = self.step(eqn, ins)
            data = any(seen.data for seen in ins)
            env.update(zip(eqn.outvars, outs or [Seen(data=data)] * len(eqn.outvars), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Seen]) -> list[Seen] | None:
        """The leaf after an equation; None if it is no leaf any more."""
        name = eqn.primitive.name
        if name in CALLS or name in ("custom_vjp_call", "shard_map"):
            return self.run(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"], ins)
        if (inside := getattr(self, f"on_{name}", None)) is not None:
            return inside(eqn, ins)
        if name in CHANGES and ins[0].path is not None:
            return [CHANGES[name](eqn, ins[0])] * len(eqn.outvars)
        if (name in ELEMENTWISE or name in IDENTITY) and not any(seen.data and seen.path is None for seen in ins):
            shape, data = eqn.outvars[0].aval.shape, any(seen.data for seen in ins)
            pairs = zip(eqn.invars, ins, strict=True)
            same = [seen for v, seen in pairs if seen.path is not None and v.aval.shape == shape]
            return [seen._replace(data=data) for seen in same[:1]] or None
        return None

    # Products.

    def use(self, leaf: Seen, inputs: Sequence[int], outputs: Sequence[int], batch: Sequence[int], eqn: Any) -> None:
        """Notes a product, by axes of the value."""
        parts = [_union(leaf.axes[i] for i in axes) for axes in (inputs, outputs, batch)]
        if leaf.data and not parts[1]:  # the row of a token: activations itself
            return
        number = sum(map(len, self.uses.values()))
        use = Use(parts[0], parts[1], parts[2] | leaf.stack, where(eqn), number)
        self.uses.setdefault(str(leaf.path), []).append(use)

    def on_dot_general(self, eqn: Any, ins: list[Seen]) -> None:
        for side in (0, 1):
            if ins[side].path is not None and ins[1 - side].data:
                batch, contracted, free = dot_parts(eqn, side)[0]
                self.use(ins[side], contracted, free, batch, eqn)

    def on_ragged_dot_general(self, eqn: Any, ins: list[Seen]) -> None:
        d = eqn.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = d.dot_dimension_numbers
        if ins[1].path is not None and ins[0].data and d.rhs_group_dimensions:
            stack = [*batch, *d.rhs_group_dimensions]
            free = [i for i in range(len(ins[1].axes)) if i not in stack and i not in contracted]
            self.use(ins[1], contracted, free, stack, eqn)

    def on_conv_general_dilated(self, eqn: Any, ins: list[Seen]) -> None:
        if ins[1].path is not None and ins[0].data:
            outputs, inputs = eqn.params["dimension_numbers"].rhs_spec[:2]
            self.use(ins[1], [inputs], [outputs], [], eqn)

    def one_place(self, leaf: Seen, entries: Sequence[int], eqn: Any) -> None:
        """Notes a lookup by data, if it is a row of a table; otherwise it is a matrix of a stack, as in w[expert]."""
        rest = [i for i in range(len(leaf.axes)) if i not in entries]
        if entries and len(rest) == 1:
            self.use(leaf, entries, rest, [], eqn)

    def on_dynamic_slice(self, eqn: Any, ins: list[Seen]) -> list[Seen] | None:
        leaf, at = ins[0], ins[1:]
        if leaf.path is None:
            return None
        self.one_place(leaf, [i for i, n in enumerate(eqn.params["slice_sizes"]) if n == 1 and at[i].data], eqn)
        return [leaf._replace(data=any(seen.data for seen in ins))]

    def on_gather(self, eqn: Any, ins: list[Seen]) -> list[Seen] | None:
        d, leaf = eqn.params["dimension_numbers"], ins[0]
        if leaf.path is None:
            return None
        gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
        if len(eqn.invars[1].aval.shape) == 1:  # one place, as in w[i]
            self.one_place(leaf, gone if ins[1].data else (), eqn)
            return [leaf.without(gone)._replace(data=leaf.data or ins[1].data)]
        entries = [i for i in d.start_index_map if eqn.params["slice_sizes"][i] == 1]
        if ins[1].data and set(gone) <= set(entries):
            self.use(leaf, entries, [i for i in range(len(leaf.axes)) if i not in entries], [], eqn)
        return None

    # Programs inside of programs. What goes round a loop may be made of activations from the second round on.

    def rounds(self, body: Any, consts: Sequence[Seen], carry: Sequence[Seen], xs: Sequence[Seen] = ()) -> None:
        """Goes into a loop. All that goes round it is taken for data, but for counters, which choose no tokens."""
        avals = [v.aval for v in opened(body)[0].invars[len(consts) :][: len(carry)]]
        data = [
            seen.data or bool(aval.shape) or not jnp.issubdtype(aval.dtype, jnp.integer)
            for seen, aval in zip(carry, avals, strict=True)
        ]
        before: list[bool] = []
        while data != before and not all(data):  # a number that activations have changed is no counter
            before = data
            outs = _Walk().run(body, [*consts, *(Seen(data=known) for known in data), *xs])
            data = [known or out.data for known, out in zip(data, outs[: len(data)], strict=True)]
        self.run(body, [*consts, *(Seen(data=known) for known in data), *xs])

    def on_scan(self, eqn: Any, ins: list[Seen]) -> None:
        n, m = scan_counts(eqn.params)
        xs = [seen if seen.path is None else seen.without([0]) for seen in ins[m:]]
        self.stacks |= {seen.path: seen.stack for seen in xs if seen.path is not None}
        self.rounds(eqn.params["jaxpr"], ins[:n], ins[n:m], xs)

    def on_while(self, eqn: Any, ins: list[Seen]) -> None:
        n = eqn.params["cond_nconsts"]
        m = n + eqn.params["body_nconsts"]
        self.rounds(eqn.params["body_jaxpr"], ins[n:m], ins[m:])

    def on_cond(self, eqn: Any, ins: list[Seen]) -> None:
        for branch in eqn.params["branches"]:
            self.run(branch, ins[1:])
