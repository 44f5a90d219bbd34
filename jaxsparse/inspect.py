"""Look inside an optimizer state: its masks, what to evaluate, whether all is well.

The accessors walk any optimizer state, however deep, and merge what several sparse links hold.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.links import link_states
from jaxsparse.masks import apply_masks, validate_masks
from jaxsparse.structures import (
    align,
    by_path,
    by_plain_path,
    is_masked_node,
    leaf_paths,
    natural_order,
    prunable_leaves,
)

__all__ = [
    "SparsityError", "Summary", "check", "closed_channels", "eval_params", "get_log_alpha", "get_masks", "plot_masks",
    "sparsify", "summary",
]  # fmt: skip


class SparsityError(ValueError):
    """A broken invariant of a sparse optimizer state, found by :func:`check`."""


def get_masks(opt_state: Any, params: Any = None) -> Any:
    """The masks that an optimizer state holds.

    Args:
      opt_state: any optimizer state with one or more sparse links in it. Of a vmapped or replicated one, look
        at one replica.
      params: the params, to get exactly their tree. Without them, a subtree that no link sees (inside
        ``optax.masked``, or ``optax.partition`` with a coarse label tree) is one scalar True, and the masks of a
        ``flax.nnx.Optimizer`` come wrapped in its own variables.

    Returns:
      A pytree like the params: bool arrays of the leaves' shapes, the scalar True for dense leaves.

    Raises:
      ValueError: if there is no sparse link in the state, or two of them mask the same leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
      >>> tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.5, 100))
      >>> masks = get_masks(tx.init(params))
      >>> jax.tree.map(lambda m: float(jnp.mean(m)), masks)
      {'bias': 1.0, 'kernel': 0.5}
    """
    if params is not None:
        return jax.tree.structure(params).unflatten(_masks_of_leaves(opt_state, params))
    masks = functools.reduce(_merge, [link.sparse_masks() for link in _links(opt_state)])
    return jax.tree.map(lambda m: jnp.ones((), bool) if is_masked_node(m) else m, masks, is_leaf=is_masked_node)


def sparsify(params: Any, opt_state: Any) -> Any:
    """Puts params on the masks of an optimizer state: call it once, before the first step.

    Args:
      params: the params.
      opt_state: the optimizer state that ``tx.init(params)`` returned.

    Returns:
      The params with exact zeros where the masks are False.

    Raises:
      ValueError: if there is no sparse link in the state.
    """
    return apply_masks(params, get_masks(opt_state, params))


def eval_params(opt_state: Any, params: Any) -> Any:
    """The params to evaluate and ship.

    Of methods that only hold masks these are the params on their masks; of gates (:func:`jaxsparse.l0`) the weights
    behind them times their test-time values.

    Args:
      opt_state: the optimizer state.
      params: the params that training handed out.

    Raises:
      ValueError: if there is no sparse link in the state.
    """
    better: dict[str, Any] = {}
    for link in _links(opt_state):
        if hasattr(link, "eval_weights"):
            better |= by_plain_path(link.eval_weights())
    params = sparsify(params, opt_state)
    leaves = [better.get(path, leaf) for path, leaf in by_plain_path(params).items()]
    return jax.tree.structure(params).unflatten(leaves)


def get_log_alpha(opt_state: Any) -> dict[str, jax.Array]:
    """The locations of the gates in an optimizer state, by the name of their group.

    ``hard_concrete_mean`` of them are the gates to evaluate with, ``prob_open`` the probabilities that they are open.

    Args:
      opt_state: the optimizer state.

    Returns:
      name of the group -> (size,), float32.

    Raises:
      ValueError: if there are no gates in the state.
    """
    gated = [link.log_alpha for link in link_states(opt_state) if hasattr(link, "log_alpha")]
    if not gated:
        raise ValueError("there are no gates in this optimizer state: wrap the optimizer in jaxsparse.l0 or dep_l0")
    return {name: log_alpha for each in gated for name, log_alpha in each.items()}


def check(opt_state: Any, params: Any = None) -> None:
    """Raises if an invariant is broken. For the training loop, outside of jit, once in a while.

    Looked at are: masks that are off their budget, NaN among the scores that masks were chosen by and,
    given ``params``, pruned weights that are not zero (as when an outer wrapper moves the params).

    Args:
      opt_state: the optimizer state. Replicated and vmapped ones are checked in every replica.
      params: the params, for the zeros.

    Raises:
      SparsityError: naming every broken invariant.
      ValueError: if there is no sparse link in the state.
    """
    problems = [problem for link in _links(opt_state) for problem in link.problems(params)]
    if problems:
        raise SparsityError("; ".join(problems))


def closed_channels(params: Any, *, prunable: Any = None) -> dict[str, np.ndarray]:
    """Which channels of each layer have died: the outputs to which only weights of zero lead.

    Args:
      params: the params, layers' kernels with the outputs on the last axis, as Flax has them.
      prunable: which leaves are looked at, see :func:`jaxsparse.structures.prunable_leaves`; default: kernels.

    Returns:
      For the path of every such leaf the closed outputs in increasing order, int, (closed,); empty for none.

    Raises:
      ValueError: as :func:`jaxsparse.structures.prunable_leaves`.

    Examples:
      >>> import jax.numpy as jnp
      >>> closed_channels({"conv": jnp.ones((3, 3, 2, 4)).at[..., 1].set(0.0), "bias": jnp.zeros(4)})
      {'conv': array([1])}
    """
    chosen = by_path(prunable_leaves(params, prunable))
    return {
        path: np.flatnonzero(~np.asarray(jnp.any(leaf != 0, axis=tuple(range(leaf.ndim - 1)))))
        for path, leaf in by_path(params).items()
        if chosen[path]
    }


class LayerSummary(NamedTuple):
    """One line of a summary: a leaf's path, shape, number of weights and how many are kept."""

    path: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    sparse: bool


class Summary(NamedTuple):
    """What :func:`summary` returns; printed, it is a table.

    Attributes:
      layers: one :class:`LayerSummary` a leaf, dense ones too.
    """

    layers: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        header = ("layer", "shape", "weights", "kept", "density")
        lines = [self._line(row.path, row.shape, row.weights, row.kept, row.sparse) for row in self.layers]
        sparse = [row for row in self.layers if row.sparse]
        for name, rows in (("sparse layers", sparse), ("all", self.layers)):
            lines.append(self._line(name, None, sum(r.weights for r in rows), sum(r.kept for r in rows), bool(sparse)))
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        rule = "  ".join("-" * width for width in widths)
        text = ["  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip() for line in [header, *lines]]  # fmt: skip
        return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])

    @staticmethod
    def _line(name, shape, weights, kept, sparse):
        size = "" if shape is None else "x".join(map(str, shape)) or "scalar"
        share = f"{kept / weights:.2%}" if weights and sparse else "dense" if weights else "-"
        return (name, size, f"{weights:,}", f"{kept:,}", share)


def summary(params: Any, opt_state_or_masks: Any) -> Summary:
    """Counts what every layer keeps. Print it for a table.

    Args:
      params: the params, or their shapes (``jax.eval_shape``).
      opt_state_or_masks: an optimizer state, or masks like the params.

    Returns:
      A :class:`Summary`.

    Raises:
      ValueError: if masks do not fit the params.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
      >>> print(summary(params, {"kernel": jnp.eye(2, 3, dtype=bool), "bias": jnp.array(True)}))
      layer          shape  weights  kept  density
      -------------  -----  -------  ----  -------
      bias           3            3     3    dense
      kernel         2x3          6     2   33.33%
      -------------  -----  -------  ----  -------
      sparse layers               6     2   33.33%
      all                         9     5   55.56%
    """
    if link_states(opt_state_or_masks):
        masks = get_masks(opt_state_or_masks, params)
    else:
        validate_masks(opt_state_or_masks, params)
        masks = opt_state_or_masks
    rows = []
    for (path, leaf), mask in zip(by_path(params).items(), align(masks, params, "masks"), strict=True):
        size, dense = int(np.prod(leaf.shape)), np.ndim(mask) == 0
        rows.append(LayerSummary(path, tuple(leaf.shape), size, size if dense else int(mask.sum()), not dense))
    return Summary(tuple(sorted(rows, key=lambda row: natural_order(row.path))))


def plot_masks(masks: Any, *, max_side: int = 512):
    """Draws the mask of every sparse leaf: kept weights dark, one panel a layer.

    Leaves with more than two dimensions are drawn as matrices, outputs (the last axis) across. Layers larger than
    ``max_side`` are averaged over tiles, so a pixel's shade is its tile's density.

    Args:
      masks: a pytree of bool arrays; scalars (dense leaves) are left out, and vectors are drawn as stripes.
      max_side: the most pixels in each direction.

    Returns:
      A ``matplotlib.figure.Figure``; ``figure.savefig(path)`` writes it. (Needs matplotlib.)

    Raises:
      ValueError: if no leaf has a mask.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sparse = [
        (name, np.asarray(mask))
        for name, mask in sorted(by_path(masks).items(), key=lambda item: natural_order(item[0]))
        if np.ndim(mask) > 0
    ]
    if not sparse:
        raise ValueError("plot_masks: no leaf has a mask, all are dense")
    columns = min(len(sparse), 4)
    rows = -(-len(sparse) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, mask) in enumerate(sparse):
        axes = figure.add_subplot(rows, columns, i + 1)
        image = _tiled(mask.reshape(-1, mask.shape[-1]).astype(np.float32), max_side)
        extent = (0, mask.shape[-1], mask.size // mask.shape[-1], 0)
        axes.imshow(image, cmap="Greys", aspect="auto", interpolation="antialiased", vmin=0, extent=extent)
        axes.set_title(f"{name}\n{int(mask.sum()):,} of {mask.size:,} ({mask.mean():.1%})", fontsize=9)
        axes.set_xlabel("output" if mask.ndim > 1 else "channel")
        if mask.ndim > 1:
            axes.set_ylabel("input")
        else:
            axes.set_yticks([])
    return figure


def _tiled(image: np.ndarray, max_side: int) -> np.ndarray:
    for axis in (0, 1):
        size = image.shape[axis]
        if size > max_side:
            edges = np.linspace(0, size, max_side + 1).astype(int)[:-1]
            lengths = np.diff([*edges, size])
            sums = np.add.reduceat(image, edges, axis=axis)
            image = sums / (lengths[:, None] if axis == 0 else lengths[None, :])
    return image


def _links(opt_state: Any) -> list[Any]:
    links = link_states(opt_state)
    if not links:
        raise ValueError(
            "there is no sparse link in this optimizer state: put one, such as jaxsparse.sparse_momentum, last in "
            f"the chain. Got {type(opt_state).__name__}"
        )
    return links


def _masks_of_leaves(opt_state: Any, params: Any) -> list[jax.Array]:
    """For every leaf of the params its mask, the scalar True for dense leaves, matched by path."""
    found: dict[str, Any] = {}
    for link in _links(opt_state):
        masks = by_path(link.sparse_masks())
        if twice := sorted(set(found) & set(masks)):
            raise ValueError(f"two sparse links mask the same leaf: {', '.join(twice)}")
        found |= masks
    names = leaf_paths(params)
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"the optimizer state has masks of leaves that the params lack: {', '.join(unknown)}")
    return [found[name] if name in found else jnp.ones((), bool) for name in names]


def _merge(a: Any, b: Any) -> Any:
    """The union of two trees in which MaskedNode stands for a part, a leaf or a subtree, that the other may have."""
    if is_masked_node(a) or is_masked_node(b):
        return b if is_masked_node(a) else a
    parts, treedef = jax.tree.flatten(a, is_leaf=lambda node: node is not a)
    if treedef == jax.tree.structure(0):
        raise ValueError(f"two sparse links mask the same leaf, of shape {jnp.shape(a)}")
    others = jax.tree.flatten(b, is_leaf=lambda node: node is not b)[0]
    return treedef.unflatten([_merge(x, y) for x, y in zip(parts, others, strict=True)])
