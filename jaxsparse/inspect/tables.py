"""Tables of masks: the weights that each layer keeps, and the overlap of two masks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.inspect.attention import kept_by_head
from jaxsparse.inspect.states import masks_for
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.tables import Table, Tabular
from jaxsparse.trees import align, as_array, by_path, natural_order

__all__ = ["LayerComparison", "LayerSummary", "MaskComparison", "Summary", "compare_masks", "show", "summary"]


class LayerSummary(NamedTuple):
    """One line of a summary.

    Attributes:
      path: the path of the leaf.
      shape: the shape of the leaf.
      weights: the number of its weights.
      kept: the number of weights kept; all of them for a dense leaf.
      sparse: whether it has a mask.
      mean_abs: mean absolute value of the kept weights; None if only shapes were given, if nothing is kept, and for
        PRNG keys.
      dead_inputs: the number of inputs that keep no weight, see :mod:`jaxsparse.layouts`; None for dense leaves and
        vectors.
      dead_outputs: the number of outputs that keep no weight; None for dense leaves.
      positions: the number of output positions of an example at which the leaf is applied; None if unknown.
      heads: the number of heads of attention, all layers of a stack together; None where none are found, see
        :func:`heads`.
      dead_heads: the number of heads that keep no weight in this leaf; None where none are found.
    """

    path: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    sparse: bool
    mean_abs: float | None = None
    dead_inputs: int | None = None
    dead_outputs: int | None = None
    positions: float | None = None
    heads: int | None = None
    dead_heads: int | None = None

    @property
    def macs(self) -> float | None:
        """The multiply-accumulate operations of the kept weights for one example; None if unknown."""
        return None if self.positions is None else self.kept * self.positions


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Tabular):
    """The result of :func:`summary`; prints as a table, in colour with ``rich.print``, as HTML in a notebook.

    Attributes:
      layers: one :class:`LayerSummary` per leaf, including dense ones.
    """

    layers: tuple[LayerSummary, ...]

    def table(self) -> Table:
        """The cells of the table."""
        header = (
            "layer",
            "shape",
            "weights",
            "kept",
            "density",
            "mean |w|",
            "dead in",
            "dead out",
            "dead heads",
            "MACs",
        )
        sparse = [row for row in self.layers if row.sparse]
        rows = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                f"{row.weights:,}",
                f"{row.kept:,}",
                _density(row.kept, row.weights, row.sparse),
                "" if row.mean_abs is None else f"{row.mean_abs:.3g}",
                "" if row.dead_inputs is None else f"{row.dead_inputs:,}",
                "" if row.dead_outputs is None else f"{row.dead_outputs:,}",
                "" if row.heads is None else f"{row.dead_heads:,} of {row.heads:,}",
                "" if row.macs is None else f"{row.macs:,.0f}",
            )
            for row in self.layers
        ]
        totals = []
        for name, layers in (("sparse layers", sparse), ("all", self.layers)):
            weights, kept = sum(row.weights for row in layers), sum(row.kept for row in layers)
            of_kept = sum(row.macs or 0 for row in layers)
            of_all = sum(row.weights * (row.positions or 0) for row in layers)
            macs = f"{of_kept:,.0f} ({of_kept / of_all:.1%})" if of_all else ""
            density = _density(kept, weights, bool(sparse))
            totals.append((name, "", f"{weights:,}", f"{kept:,}", density, "", "", "", "", macs))
        return Table(header, tuple(rows), tuple(totals), left=(0, 1)).without_empty_columns(keep=5)


def summary(
    opt_state_or_masks: Any, params: Any, *, positions: Mapping[str, float] | None = None, layout: LayoutLike = None
) -> Summary:
    """Count the weights that every layer keeps, as a table.

    The table also has the mean absolute value of the kept weights, the number of dead inputs, outputs and heads of
    attention, which have no weight left (:func:`heads` tells which), and the multiply-accumulate operations (MACs).

    Args:
      opt_state_or_masks: an optimizer state, or masks like the params.
      params: the params, or their shapes (``jax.eval_shape``), which have no mean.
      positions: the number of output positions of an example at which each kernel is applied, by path: 1 for a dense
        layer, height times width of its output for a convolution. Adds a column with MACs, which are weights times
        positions. :func:`jaxsparse.trace.multiply_adds` counts them for any model.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes leave it open
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`. For a stack, the dead inputs and
        outputs of all its layers are counted.

    Returns:
      A :class:`Summary`.

    Raises:
      ValueError: if masks do not fit the params, or positions name leaves that the params lack.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
      >>> masks = {"kernel": jnp.eye(2, 3, dtype=bool), "bias": jnp.array(True)}
      >>> print(summary(masks, params, positions={"kernel": 1}))
      layer          shape  weights  kept  density  mean |w|  dead in  dead out       MACs
      -------------  -----  -------  ----  -------  --------  -------  --------  ---------
      bias           3            3     3    dense         0
      kernel         2x3          6     2   33.33%         1        0         1          2
      -------------  -----  -------  ----  -------  --------  -------  --------  ---------
      sparse layers               6     2   33.33%                               2 (33.3%)
      all                         9     5   55.56%                               2 (33.3%)
    """
    masks = masks_for(opt_state_or_masks, params)
    leaves = {path: as_array(path, leaf) for path, leaf in by_path(params).items()}
    positions = positions or {}
    if unknown := sorted(set(positions) - set(leaves)):
        raise ValueError(
            f"positions name leaves that the params lack: {', '.join(unknown)}; there are {', '.join(leaves)}"
        )
    layouts, rows = leaf_layouts(params, layout), []
    for (path, leaf), mask in zip(leaves.items(), align(masks, params, "masks"), strict=True):
        rows.append(_layer(path, leaf, np.asarray(mask), positions.get(path), layouts[path]))
    return Summary(tuple(sorted(rows, key=lambda row: natural_order(row.path))))


def _layer(path: str, leaf: Any, mask: np.ndarray, positions: float | None, layout: Layout) -> LayerSummary:
    weights, sparse = math.prod(leaf.shape), mask.ndim > 0
    kept = int(np.count_nonzero(mask)) if sparse else weights
    mean_abs = None
    if kept and not isinstance(leaf, jax.ShapeDtypeStruct) and _is_numeric(leaf):
        values = np.asarray(leaf)[mask] if sparse else np.asarray(leaf)
        mean_abs = float(_magnitude(values).sum(dtype=np.float64)) / kept
    dead_inputs = dead_outputs = None
    if sparse:
        dead_outputs = int(np.count_nonzero(~layout.any_by_output(mask)))
        if layout.is_matrix:
            dead_inputs = int(np.count_nonzero(~layout.any_by_input(mask)))
    of_heads = kept_by_head(mask, layout) if sparse else None
    heads, dead = (None, None) if of_heads is None else (of_heads.size, int(np.count_nonzero(of_heads == 0)))
    return LayerSummary(
        path, tuple(leaf.shape), weights, kept, sparse, mean_abs, dead_inputs, dead_outputs, positions, heads, dead
    )


def _is_numeric(leaf: Any) -> bool:
    """Whether a leaf has magnitudes; PRNG keys do not."""
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _magnitude(values: np.ndarray) -> np.ndarray:
    return np.abs(values if np.iscomplexobj(values) else values.astype(np.float32, copy=False))


class LayerComparison(NamedTuple):
    """One line of a comparison of two masks.

    Attributes:
      path: the path of the leaf.
      weights: the number of its weights.
      first: the number that the first mask keeps.
      second: the number that the second mask keeps.
      both: the number that both keep.
    """

    path: str
    weights: int
    first: int
    second: int
    both: int

    @property
    def flips(self) -> int:
        """The number of entries that differ."""
        return self.first + self.second - 2 * self.both

    @property
    def jaccard(self) -> float:
        """The Jaccard index, weights kept by both over weights kept by either; 1 if neither keeps any."""
        either = self.first + self.second - self.both
        return self.both / either if either else 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class MaskComparison(Tabular):
    """The result of :func:`compare_masks`; prints as a table, in colour with ``rich.print``, as HTML in a notebook.

    Attributes:
      layers: one :class:`LayerComparison` for each leaf that is sparse in either.
      names: the names of the two masks.
    """

    layers: tuple[LayerComparison, ...]
    names: tuple[str, str] = ("first", "second")

    @property
    def total(self) -> LayerComparison:
        """The sums over all layers."""
        rows = self.layers
        return LayerComparison(
            "all", sum(row.weights for row in rows), sum(row.first for row in rows), sum(row.second for row in rows),
            sum(row.both for row in rows),
        )  # fmt: skip

    def table(self) -> Table:
        """The cells of the table."""
        first, second = self.names
        header = ("layer", "weights", f"kept, {first}", f"kept, {second}", "in both", "flips", "Jaccard")

        def cells(row: LayerComparison) -> tuple[str, ...]:
            return (row.path, *(f"{number:,}" for number in (*row[1:], row.flips)), f"{row.jaccard:.3f}")

        return Table(header, tuple(map(cells, self.layers)), (cells(self.total),))


def compare_masks(first: Any, second: Any, *, names: tuple[str, str] = ("first", "second")) -> MaskComparison:
    """Compare two masks of one network, layer by layer.

    Args:
      first: masks: bool arrays, the scalar True for dense leaves.
      second: masks of the same network. A leaf that is dense in one of the two counts as fully kept there.
      names: the names of the two in the table.

    Returns:
      A :class:`MaskComparison`.

    Raises:
      ValueError: if their trees or shapes differ, or they are not masks.

    Examples:
      >>> import jax.numpy as jnp
      >>> before = {"kernel": jnp.array([[True, True, False, False]]), "bias": jnp.array(True)}
      >>> after = {"kernel": jnp.array([[True, False, True, False]]), "bias": jnp.array(True)}
      >>> print(compare_masks(before, after, names=("before", "after")))
      layer   weights  kept, before  kept, after  in both  flips  Jaccard
      ------  -------  ------------  -----------  -------  -----  -------
      kernel        4             2            2        1      2    0.333
      ------  -------  ------------  -----------  -------  -----  -------
      all           4             2            2        1      2    0.333
    """
    of_first, of_second = by_path(first), by_path(second)
    if odd := sorted(set(of_first) ^ set(of_second)):
        raise ValueError(f"{names[0]} and {names[1]} are masks of different trees: only one has {', '.join(odd)}")
    rows = []
    for path, a in of_first.items():
        a, b = np.asarray(a), np.asarray(of_second[path])
        for name, mask in zip(names, (a, b), strict=True):
            if mask.dtype != bool:
                raise ValueError(f"the {name} masks, {path}: expected bool, got {mask.dtype}")
        if a.ndim and b.ndim and a.shape != b.shape:
            raise ValueError(f"masks of {path}: {names[0]} has shape {a.shape}, {names[1]} {b.shape}")
        if a.ndim or b.ndim:
            a, b = np.broadcast_arrays(a, b)
            both = int(np.count_nonzero(a & b))
            rows.append(LayerComparison(path, a.size, int(np.count_nonzero(a)), int(np.count_nonzero(b)), both))
    return MaskComparison(tuple(sorted(rows, key=lambda row: natural_order(row.path))), names)


def show(opt_state_or_masks: Any, params: Any = None) -> Any:
    """Show a tree of params in a notebook by treescope, with each array as a picture and pruned weights greyed out.

    Args:
      opt_state_or_masks: an optimizer state, or masks like the params.
      params: the params. With None, the first tree is shown as it is, whatever it contains.

    Returns:
      An object that a notebook shows if it is the last expression of a cell. Its ``_repr_html_()`` is the HTML.

    Raises:
      ImportError: if treescope is not installed.
      ValueError: if masks do not fit the params.
    """
    try:
        import treescope  # noqa: F401
    except ImportError as error:
        raise ImportError("show needs treescope: pip install treescope") from error
    if params is None:
        return _Shown(opt_state_or_masks, {})
    masks = align(masks_for(opt_state_or_masks, params), params, "masks")
    pairs = zip(jax.tree.leaves(params), masks, strict=True)
    return _Shown(params, {id(leaf): np.asarray(mask) for leaf, mask in pairs if np.ndim(mask) > 0})


class _Shown:
    """A tree that treescope draws, even if it is not the notebook's default renderer."""

    def __init__(self, tree: Any, masks: Mapping[int, np.ndarray]):
        self.tree, self.masks = tree, masks

    def __repr__(self) -> str:
        import treescope

        return treescope.render_to_text(self.tree)

    def _repr_html_(self, compressed: bool = True) -> str:
        import treescope

        with treescope.active_autovisualizer.set_scoped(self._picture):
            return treescope.render_to_html(self.tree, compressed=compressed)

    def _picture(self, value: Any, path: str | None) -> Any:
        import treescope

        if np.ndim(value) == 0 or not isinstance(value, jax.Array | np.ndarray):
            return None
        if not value.size or not _is_numeric(value):
            return None
        shown = np.abs(value) if np.iscomplexobj(value) else np.asarray(value, np.float32)
        picture = treescope.render_array(shown, valid_mask=self.masks.get(id(value)))
        return treescope.IPythonVisualization(picture, replace=False)


def _density(kept: int, weights: int, sparse: bool) -> str:
    return f"{kept / weights:.2%}" if weights and sparse else "dense" if weights else "-"
