"""Multiply-adds of any function: how often each weight is used, dense and under masks, and the bytes that move."""

import dataclasses
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxsparse.tables import Table, Tabular
from jaxsparse.trace.analysis import Analysis, Site
from jaxsparse.trace.products import PRODUCTS
from jaxsparse.trace.program import Where, is_array, live_eqns, opened, trace, where, within
from jaxsparse.trees import by_path, listed, natural_order
from jaxsparse.user_warnings import warn

__all__ = ["LeafProducts", "MultiplyAdds", "multiply_adds"]

# Products whose multiply-adds are not known here, beside kernels of the user's own.
_OTHER_PRODUCTS = {
    "pallas_call", "ffi_call", "ragged_dot", "ragged_dot_general", "scaled_matmul", "cholesky", "triangular_solve",
    "lu", "qr", "svd", "eigh", "fft",
}  # fmt: skip


class LeafProducts(NamedTuple):
    """The products of a leaf with activations.

    Attributes:
      macs: multiply-adds.
      uses: how often each weight of the leaf is used: ``macs`` over the number of weights.
      bytes: the size of all operands and results of the products, which is what moves if nothing stays in a cache.
    """

    macs: int
    uses: int | float
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class MultiplyAdds(Tabular):
    """The result of :func:`multiply_adds`; prints as a table, in colour with ``rich.print``, as HTML in a notebook.

    Attributes:
      leaves: path -> :class:`LeafProducts`, of every leaf that is multiplied by activations. A product of several
        leaves (a kernel with its gain, a low-rank update) counts for the largest.
      sites: every product of the program: the leaves that one side is made of (none: a product of activations), its
        multiply-adds, how often it is computed, and where.
      activations: the multiply-adds of products of activations with each other, such as those of attention.
      activation_bytes: what those read and write.
      bounded: whether the numbers are exact. Of a while loop whose number of rounds is not known one round is counted,
        and of a ``cond`` every branch.
      uncounted: the places of products that are not counted, such as those in kernels of the user's own.
      shapes: path -> shape, of all leaves of params that are arrays.
    """

    leaves: Mapping[str, LeafProducts]
    sites: tuple[Site, ...]
    activations: int
    activation_bytes: int
    bounded: bool
    uncounted: tuple[Where, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return sum(leaf.macs for leaf in self.leaves.values()) + self.activations

    def positions(self, batch: int) -> dict[str, int | float]:
        """The number of positions of an example at which each leaf is applied, for tables such as ``summary``.

        Args:
          batch: the number of examples in the arguments that were counted for.

        Returns:
          path -> how often each weight is used per example: output height x width for a convolution, 1 for a dense
          layer on a vector, the length for one on a sequence. An int wherever the uses divide by ``batch``.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        return {path: _ratio(leaf.uses, batch) for path, leaf in self.leaves.items()}

    def under(self, masks: Any) -> dict[str, int | float]:
        """The multiply-adds of the weights that masks keep.

        It is exact where all weights of a leaf are used equally often, as in all layers that use the whole leaf.

        Args:
          masks: bool arrays like the params; a leaf with the scalar True, or without a mask, is dense.

        Returns:
          path -> multiply-adds, for the leaves of ``leaves``. Products of activations are as many as before.

        Raises:
          ValueError: for masks of leaves that the params lack, or of another shape.
        """
        given = by_path(masks)  # True may also stand for what is no array, such as a function
        kept = {path: np.asarray(mask) for path, mask in given.items() if is_array(mask) or mask is False}
        if unknown := sorted(set(kept) - set(self.shapes)):
            raise ValueError(f"masks have {listed(unknown)}, which the params lack; they have {listed([*self.shapes])}")
        for path, mask in kept.items():
            if not mask.ndim and not mask:
                raise ValueError(f"the mask of {path} is the scalar False: a scalar can only be True, for a dense leaf")
            if mask.ndim and mask.shape != self.shapes[path]:
                raise ValueError(f"the mask of {path} must have shape {self.shapes[path]}, got {mask.shape}")
        counts = {path: int(np.count_nonzero(mask)) for path, mask in kept.items() if mask.ndim}
        return {p: leaf.uses * counts[p] if p in counts else leaf.macs for p, leaf in self.leaves.items()}

    def table(self) -> Table:
        """The cells of the table."""

        def cells(name: str, weights: str, uses: str, macs: int, moved: int) -> tuple[str, ...]:
            share = f"{macs / self.total:.1%}" if self.total else ""
            return name, weights, uses, f"{macs:,.0f}", share, f"{moved:,.0f}"

        rows = [
            cells(path or "the params", f"{math.prod(self.shapes[path]):,}", f"{leaf.uses:,.6g}", leaf.macs, leaf.bytes)
            for path, leaf in self.leaves.items()
        ]
        if self.activations:
            rows.append(cells("activations", "", "", self.activations, self.activation_bytes))
        moved = sum(leaf.bytes for leaf in self.leaves.values()) + self.activation_bytes
        weights = sum(math.prod(self.shapes[path]) for path in self.leaves)
        name = f"all{'' if self.bounded else ', of one round of loops and all branches'}"
        name += f", without {len(self.uncounted)} uncounted" if self.uncounted else ""
        last = cells(name, f"{weights:,}", "", self.total, moved)
        return Table(("leaf", "weights", "uses", "multiply-adds", "share", "bytes moved"), tuple(rows), (last,))


def multiply_adds(apply: Callable[..., Any], params: Any, *args: Any) -> MultiplyAdds:
    """Count the multiply-adds of a function of params, for each leaf, whatever the model is made of.

    Counted are matrix products and convolutions wherever they stand in the program: a layer that is called several
    times counts each time, one in a scan every round, one under ``vmap`` every example. Nothing is computed. Lookups
    (embeddings) and elementwise operations have no multiply-adds. Matrices that are made one before a product, such as
    three that are concatenated, share its multiply-adds by their sizes. A matrix that is multiplied by an argument
    before, such as a mask, is itself an activation here: multiply params by masks outside of ``apply``.

    Args:
      apply: a function of params and further arguments, such as ``lambda p, x: model.apply({"params": p}, x)``.
      params: the params or their shapes (``jax.eval_shape``).
      *args: the further arguments, or their shapes. The counts are for these, so for all examples of a batch;
        :meth:`MultiplyAdds.positions` divides by their number.

    Returns:
      A :class:`MultiplyAdds`. Print it for a table.

    Raises:
      ValueError: if ``apply`` uses none of the params, or cannot be traced. A warning names what is not counted.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"fc1": jnp.ones((20, 32)), "fc2": jnp.ones((32, 6))}
      >>> counts = multiply_adds(lambda p, x: jax.nn.relu(x @ p["fc1"]) @ p["fc2"], params, jnp.ones((8, 20)))
      >>> print(counts)
      leaf  weights  uses  multiply-adds   share  bytes moved
      ----  -------  ----  -------------  ------  -----------
      fc1       640     8          5,120   76.9%        4,224
      fc2       192     8          1,536   23.1%        1,984
      ----  -------  ----  -------------  ------  -----------
      all       832                6,656  100.0%        6,208
      >>> counts.positions(batch=8)
      {'fc1': 1, 'fc2': 1}
      >>> counts.under({"fc1": jnp.arange(640).reshape(20, 32) < 64, "fc2": jnp.array(True)})
      {'fc1': 512, 'fc2': 1536}
    """
    traced = trace(apply, params, *args)
    sites = tuple(Analysis(traced).sites)
    shapes = {path: tuple(leaf.shape) for path, leaf in by_path(params).items() if is_array(leaf)}
    macs: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    activations = activation_bytes = 0
    for site in sites:
        if site.leaves:
            for path, part in _parts({path: shapes[path] for path in sorted(site.leaves)}).items():
                macs[path] += round(int(site.macs) * part)
                moved[path] += round(_bytes(site) * part)
        else:
            activations += int(site.macs)
            activation_bytes += _bytes(site)
    leaves = {
        path: LeafProducts(macs[path], _ratio(macs[path], math.prod(shapes[path])), moved[path])
        for path in sorted(macs, key=natural_order)
    }
    bounded = all(site.bounded and not _in_a_branch(site.where) for site in sites)
    uncounted = tuple(dict.fromkeys(_uncounted(traced.closed, {id(site.where.eqn) for site in sites})))
    if uncounted:
        warn(f"not counted: {listed([*map(str, uncounted)])}")
    return MultiplyAdds(leaves, sites, activations, activation_bytes, bounded, uncounted, shapes)


def _parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, Fraction]:
    """The parts of the leaves in a product: by their sizes where they are made one, else all of it for the largest.

    Leaves are made one with the largest if they differ from it in one axis at most, and have half of its weights or
    more. The others only scale or update it.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    main = max(sizes, key=lambda path: sizes[path])

    def joins(path):
        shape, other = shapes[path], shapes[main]
        return len(shape) == len(other) and sum(map(operator.ne, shape, other)) < 2 and 2 * sizes[path] >= sizes[main]

    together = {path: n for path, n in sizes.items() if joins(path)} if sizes[main] else {main: 1}
    return {path: Fraction(n, sum(together.values())) for path, n in together.items()}


def _ratio(number: int | float, by: int) -> int | float:
    """A quotient, as an int if it is one; 0 for a leaf that has no weights."""
    if not by:
        return 0
    return number / by if number % by else int(number // by)


def _bytes(site: Site) -> int:
    """The bytes of the operands and of the result of a product, as often as it is computed."""
    eqn = site.where.eqn
    sizes = {id(v): v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars)}  # x @ x reads x once
    return int(site.times) * sum(sizes.values())


def _in_a_branch(place: Where) -> bool:
    return any(eqn.primitive.name == "cond" for eqn in place.outer)


def _uncounted(jaxpr: Any, counted: set[int]) -> Iterator[Where]:
    """Products of a program beyond those that were counted."""
    for eqn in live_eqns(opened(jaxpr)[0]):
        name = eqn.primitive.name
        if name in PRODUCTS or name in _OTHER_PRODUCTS:
            if id(eqn) not in counted:
                yield where(eqn)
        else:
            with within(eqn):
                for inner in jaxprs_in_params(eqn.params):
                    yield from _uncounted(inner, counted)
