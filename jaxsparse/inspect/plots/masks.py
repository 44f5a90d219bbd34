"""Pictures of masks and of the weights that they keep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.inspect.attention import heads as heads_of
from jaxsparse.inspect.plots.style import COLOURS, ink, ink_map, logarithmic, new_figure, plain, whole_numbers
from jaxsparse.inspect.states import masks_for, sparse_masks
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.trees import align, by_path, natural_order

__all__ = ["plot_densities", "plot_filters", "plot_heads", "plot_masks", "plot_receptive_fields", "plot_weights"]


def plot_densities(masks: Any):
    """Draw the density of every sparse layer as a bar, with the number of weights kept, and the overall density.

    Args:
      masks: a pytree of bool arrays, or an optimizer state; scalars (dense leaves) are not drawn.

    Returns:
      A ``matplotlib.figure.Figure``. The axis is logarithmic if densities differ by a factor of ten or more.

    Raises:
      ValueError: if no leaf has a mask, or the leaves are not masks.
    """
    layers = {path: (int(mask.sum()), mask.size) for path, mask in sparse_masks(masks, "plot_densities").items()}
    shares = {path: 100 * kept / max(size, 1) for path, (kept, size) in layers.items()}
    overall = 100 * sum(kept for kept, _ in layers.values()) / max(1, sum(size for _, size in layers.values()))
    figure = new_figure(9, 1.1 + 0.28 * len(layers))
    axes = figure.add_subplot()
    axes.barh(range(len(layers)), list(shares.values()), color=COLOURS[0])
    axes.set_yticks(range(len(layers)), list(map(plain, layers)))
    seen = [share for share in shares.values() if share > 0]
    least = 0.0
    if seen and max(seen) >= 10 * min(seen):
        logarithmic(axes, seen)
        least = min(seen) / 2
    axes.set_xlim(least, max(seen, default=100))
    for i, (path, (kept, size)) in enumerate(layers.items()):
        axes.annotate(
            f"{kept:,} of {size:,}", (max(shares[path], least), i), (4, 0), textcoords="offset points", va="center",
            fontsize=8, annotation_clip=False, bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(overall, color=ink(), linestyle="--", linewidth=1, label=f"all of them: {overall:.3g}%")
    axes.invert_yaxis()
    axes.set(xlabel="kept (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", fontsize=8)
    return figure


def plot_masks(masks: Any, *, layout: LayoutLike = None, max_side: int = 256):
    """Draw the mask of every sparse leaf, one panel per layer, with ink for the kept weights.

    Leaves with more than two dimensions are drawn as matrices, with outputs across. Layers larger than ``max_side`` are
    averaged over tiles, so the shade of a pixel is the density of its tile.

    Args:
      masks: a pytree of bool arrays, or an optimizer state; scalars (dense leaves) are not drawn, and vectors are
        drawn as stripes.
      layout: which axes of leaves are inputs and outputs, where names and shapes leave it open: pattern ->
        :class:`jaxsparse.Layout`.
      max_side: the largest number of pixels in each direction. The default is about what a panel shows; raise it to
        save the figure with a higher dpi.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ValueError: if no leaf has a mask, or the leaves are not masks.
    """
    sparse = sparse_masks(masks, "plot_masks")
    layouts = leaf_layouts(sparse, layout)
    columns = min(len(sparse), 4)
    rows = -(-len(sparse) // columns)
    figure = new_figure(3.6 * columns, 3.6 * rows)
    for i, (name, mask) in enumerate(sparse.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        seen = layouts[name].to_matrices(mask)
        matrix = seen.reshape(math.prod(seen.shape[:-1]), seen.shape[-1]).astype(np.float32)
        if mask.size:
            extent = (0, matrix.shape[1], matrix.shape[0], 0)
            axes.imshow(
                _tiled(matrix, max_side), cmap=ink_map(), aspect="auto", interpolation="nearest", vmin=0, vmax=1,
                extent=extent,
            )  # fmt: skip
        axes.set_title(f"{plain(name)}\n{int(mask.sum()):,} of {mask.size:,} ({_share(mask):.1%})", fontsize=9)
        axes.set_xlabel("output" if mask.ndim > 1 else "channel")
        if mask.ndim > 1:
            axes.set_ylabel("input")
        else:
            axes.set_yticks([])
        whole_numbers(axes.xaxis, axes.yaxis)
    return figure


def plot_heads(masks: Any, *, heads: Mapping[str, int] | None = None, layout: LayoutLike = None):
    """Draw the density of every head of attention, a row for each leaf (or layer of a stack), dead heads crossed out.

    Args:
      masks: a pytree of bool arrays, or an optimizer state.
      heads: the number of heads of leaves whose heads have no axis of their own, see :func:`jaxsparse.inspect.heads`.
      layout: which axes of leaves are inputs, outputs and stacked layers, see :func:`jaxsparse.inspect.heads`.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ValueError: as :func:`jaxsparse.inspect.heads`.
    """
    layers = heads_of(masks, heads=heads, layout=layout).layers
    shares = np.full((len(layers), max(len(layer.kept) for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        shares[row, : len(layer.kept)] = 100 * layer.density
    figure = new_figure(3.6 + 0.4 * shares.shape[1], 1.2 + 0.28 * len(layers))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="viridis", aspect="auto", vmin=0, interpolation="nearest")
    dead = np.argwhere(shares == 0)
    axes.plot(dead[:, 1], dead[:, 0], "x", color="white")
    axes.set_yticks(range(len(layers)), [plain(layer.name) for layer in layers])
    axes.set(xlabel="head")
    whole_numbers(axes.xaxis)
    figure.colorbar(image, ax=axes, label="kept (%)")
    if len(dead):
        axes.set_title(f"{len(dead)} dead of {int(np.isfinite(shares).sum())} heads, crossed out", fontsize=9)
    return figure


def plot_filters(mask: Any, *, layout: Layout | None = None, max_side: int = 256):
    """Draw the mask of a convolution: the weights kept by each kernel, and at each position of the kernels.

    Args:
      mask: bool, (height, width, inputs, outputs), of a convolution's kernel.
      layout: which axes are inputs and outputs, if not the last two: ``jaxsparse.Layout(1, 0)`` for Equinox.
      max_side: the largest number of pixels in each direction; more inputs or outputs are averaged over tiles.

    Returns:
      A ``matplotlib.figure.Figure``. On the left each pixel is the kernel from an input to an output channel: a row
      without ink is an unused input channel, a column without ink a removed filter. On the right each pixel is a
      position of the kernels.

    Raises:
      ValueError: if the mask does not have four dimensions, or one of them is 0.
    """
    mask = np.asarray(mask) if layout is None else layout.to_matrices(np.asarray(mask))
    if mask.ndim != 4 or not mask.size:
        raise ValueError(
            f"plot_filters: expected (height, width, inputs, outputs), none of them 0, got shape {mask.shape}"
        )
    height, width, inputs, outputs = mask.shape
    figure = new_figure(11, 4.6)
    kernels, places = figure.subplots(1, 2)
    image = kernels.imshow(
        _tiled(mask.sum((0, 1)).astype(np.float32), max_side), cmap=ink_map(), aspect="auto", vmin=0,
        vmax=height * width, interpolation="nearest", extent=(0, outputs, inputs, 0),
    )  # fmt: skip
    kernels.set(xlabel="output channel", ylabel="input channel", title=f"weights kept of a kernel's {height * width}")
    figure.colorbar(image, ax=kernels, shrink=0.8)
    shares = 100 * mask.mean((2, 3))
    image = places.imshow(shares, cmap="viridis", vmin=0, interpolation="nearest")
    places.set(title="kept at each position of a kernel (%)")
    figure.colorbar(image, ax=places, shrink=0.8)
    whole_numbers(kernels.xaxis, kernels.yaxis, places.xaxis, places.yaxis)
    return figure


def plot_receptive_fields(
    mask: Any, image_shape: Sequence[int] | None = None, *, layout: Layout | None = None, most: int = 100
):
    """Draw the receptive fields of a first layer: one image per unit, and the number of units that read each pixel.

    Args:
      mask: bool, of a dense kernel (height * width * channels, units), or of a convolution's (kernel height, kernel
        width, channels, filters).
      image_shape: (height, width, channels) of the images; not used for a convolution.
      layout: which axes are inputs and outputs, if not the last two: ``jaxsparse.Layout(1, 0)`` for Equinox.
      most: draw at most this many units, the first ones.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ValueError: if the mask has any other shape, or does not fit the images.
    """
    import matplotlib

    mask = np.asarray(mask) if layout is None else layout.to_matrices(np.asarray(mask))
    if mask.ndim not in (2, 4) or not mask.size:
        raise ValueError(
            f"plot_receptive_fields: expected a mask of 2 or 4 dimensions, none of them 0, got shape {mask.shape}"
        )
    if mask.ndim == 2 and (image_shape is None or len(image_shape) != 3 or np.prod(image_shape) != len(mask)):
        raise ValueError(
            f"plot_receptive_fields: expected image_shape (height, width, channels) of {len(mask)} numbers, as the "
            f"units have inputs, got {image_shape}"
        )
    shape = image_shape if mask.ndim == 2 and image_shape is not None else mask.shape[:3]
    fields = mask.reshape(*shape, mask.shape[-1]).mean(2)
    height, width, units = fields.shape
    drawn = min(units, most)
    columns = int(np.ceil(drawn**0.5))
    rows = -(-drawn // columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for i in range(drawn):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[top : top + height, left : left + width] = fields[..., i]
    figure = new_figure(11, 5.5)
    units_axes, pixels_axes = figure.subplots(1, 2)
    inks = ink_map().with_extremes(bad=COLOURS[5])  # the lines between the units
    units_axes.imshow(grid, cmap=inks, vmin=0, vmax=1, interpolation="nearest")
    of = "all" if drawn == units else f"the first {drawn} of"
    units_axes.set_title(f"weights kept of {of} {units} units" if units > 1 else "pixels kept")
    units_axes.set_axis_off()
    image = pixels_axes.imshow(fields.sum(-1), cmap=matplotlib.colormaps["viridis"], vmin=0, interpolation="nearest")
    pixels_axes.set_title("units that see each pixel")
    whole_numbers(pixels_axes.xaxis, pixels_axes.yaxis)
    figure.colorbar(image, ax=pixels_axes, shrink=0.8)
    return figure


def plot_weights(opt_state_or_masks: Any, params: Any):
    """Draw a histogram of the kept weights of each sparse layer, with the means of the negative and positive ones.

    ASNI-II starts a layer from these two means, :func:`jaxsparse.centroids`.

    Args:
      opt_state_or_masks: an optimizer state, or masks like the params.
      params: the params of the network.

    Returns:
      A ``matplotlib.figure.Figure``. The outermost thousandth on either side is not drawn, and neither are weights that
      are not finite, which are counted in the title of their layer. Layers that keep nothing are left out.

    Raises:
      ValueError: if masks do not fit the params.
    """
    weights = by_path(params)
    masks = align(masks_for(opt_state_or_masks, params), params, "masks")
    masked = {path: np.asarray(mask) for path, mask in zip(weights, masks, strict=True)}
    layers = {
        path: np.asarray(weights[path], np.float32)[mask] for path, mask in masked.items() if mask.ndim and mask.any()
    }
    columns = min(4, max(1, len(layers)))
    rows = max(1, -(-len(layers) // columns))
    figure = new_figure(4 * columns, 2.8 * rows + 0.6)
    means: dict[str, Any] = {}
    for i, path in enumerate(sorted(layers, key=natural_order)):
        axes, kept = figure.add_subplot(rows, columns, i + 1), layers[path]
        finite = kept[np.isfinite(kept)]
        low, high = np.quantile(finite, [0.001, 0.999]) if finite.size else (0, 0)  # outliers would leave no room
        axes.hist(finite, np.linspace(low, high, 61) if high > low else 11, color=COLOURS[5])
        for sign, colour, line, side in ((-1, COLOURS[1], "--", "negative"), (1, ink(), ":", "positive")):
            if (of_sign := finite[np.sign(finite) == sign]).size:
                means[f"mean of the {side}"] = axes.axvline(of_sign.mean(), color=colour, linestyle=line)
        broken = f"\n{kept.size - finite.size:,} not finite" if finite.size < kept.size else ""
        axes.set_title(f"{plain(path)}, {kept.size:,} of {weights[path].size:,}{broken}", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel="weight", ylabel="weights" if i % columns == 0 else "")
    if means:
        figure.legend(means.values(), means, loc="outside lower center", ncols=2, fontsize=8)
    if not layers:
        figure.text(0.5, 0.5, "no layer with a mask keeps any weight", ha="center")
    return figure


def _share(mask: np.ndarray) -> float:
    return float(mask.mean()) if mask.size else 0.0


def _tiled(image: np.ndarray, max_side: int) -> np.ndarray:
    """The image, averaged over tiles if it has more than ``max_side`` rows or columns."""
    for axis in (0, 1):
        size = image.shape[axis]
        if size > max_side:
            edges = np.linspace(0, size, max_side + 1).astype(int)[:-1]
            lengths = np.diff([*edges, size])
            sums = np.add.reduceat(image, edges, axis=axis)
            image = sums / (lengths[:, None] if axis == 0 else lengths[None, :])
    return image
