"""Pictures of masks, weights and runs.

Every function returns a ``matplotlib.figure.Figure``: as the last expression of a notebook's cell it is shown, and
``figure.savefig(path)`` writes it. They follow matplotlib's style, so that dark ones are made by
``with matplotlib.style.context("dark_background"):``. Colours are those of Okabe and Ito, which colour-blind readers
can tell apart. Matplotlib is imported by the first call.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from jaxsparse.inspect.history import History
from jaxsparse.inspect.states import get_masks, masks_for
from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.links import link_states
from jaxsparse.trees import align, by_path, natural_order

__all__ = [
    "plot_accuracy_against_kept", "plot_class_specialization", "plot_densities", "plot_filters", "plot_history",
    "plot_layer_densities", "plot_masks", "plot_receptive_fields", "plot_schedules", "plot_weights",
]  # fmt: skip

# Okabe and Ito's, but for their yellow, too light for lines, and their black, which is not seen on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^vDPX"
_STYLES = ("-", "--", ":")


def plot_densities(masks: Any):
    """Draws the density of every sparse layer as a bar, with how many weights it keeps, and that of all of them.

    Args:
      masks: a pytree of bool arrays, or an optimizer state; scalars (dense leaves) are left out.

    Returns:
      A ``matplotlib.figure.Figure``. The axis is logarithmic if densities differ by a factor of ten or more.

    Raises:
      ValueError: if no leaf has a mask, or these are no masks.
    """
    layers = {path: (int(mask.sum()), mask.size) for path, mask in _sparse(masks, "plot_densities").items()}
    shares = {path: 100 * kept / max(size, 1) for path, (kept, size) in layers.items()}
    overall = 100 * sum(kept for kept, _ in layers.values()) / max(1, sum(size for _, size in layers.values()))
    figure = _figure(9, 1.1 + 0.28 * len(layers))
    axes = figure.add_subplot()
    axes.barh(range(len(layers)), list(shares.values()), color=COLOURS[0])
    axes.set_yticks(range(len(layers)), list(map(_plain, layers)))
    seen = [share for share in shares.values() if share > 0]
    least = 0.0
    if seen and max(seen) >= 10 * min(seen):
        _logarithmic(axes, seen)
        least = min(seen) / 2
    axes.set_xlim(least, max(seen, default=100))
    for i, (path, (kept, size)) in enumerate(layers.items()):
        axes.annotate(
            f"{kept:,} of {size:,}", (max(shares[path], least), i), (4, 0), textcoords="offset points", va="center",
            fontsize=8, annotation_clip=False, bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(overall, color=_ink(), linestyle="--", linewidth=1, label=f"all of them: {overall:.3g}%")
    axes.invert_yaxis()
    axes.set(xlabel="kept (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", fontsize=8)
    return figure


def plot_masks(masks: Any, *, layout: LayoutLike = None, max_side: int = 256):
    """Draws the mask of every sparse leaf: kept weights as ink, one panel a layer.

    Leaves with more than two dimensions are drawn as matrices, outputs across. Layers larger than ``max_side`` are
    averaged over tiles, so a pixel's shade is its tile's density.

    Args:
      masks: a pytree of bool arrays, or an optimizer state; scalars (dense leaves) are left out, and vectors are drawn
        as stripes.
      layout: which axes of leaves are inputs and outputs, where names and shapes do not tell: pattern ->
        :class:`jaxsparse.Layout`.
      max_side: the most pixels in each direction: about as many as a panel has, unless it is saved with a higher dpi.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ValueError: if no leaf has a mask, or these are no masks.
    """
    sparse = _sparse(masks, "plot_masks")
    layouts = leaf_layouts(sparse, layout)
    columns = min(len(sparse), 4)
    rows = -(-len(sparse) // columns)
    figure = _figure(3.6 * columns, 3.6 * rows)
    for i, (name, mask) in enumerate(sparse.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        seen = layouts[name].to_matrices(mask)
        matrix = seen.reshape(math.prod(seen.shape[:-1]), seen.shape[-1]).astype(np.float32)
        if mask.size:
            extent = (0, matrix.shape[1], matrix.shape[0], 0)
            axes.imshow(
                _tiled(matrix, max_side), cmap=_inks(), aspect="auto", interpolation="nearest", vmin=0, vmax=1,
                extent=extent,
            )  # fmt: skip
        axes.set_title(f"{_plain(name)}\n{int(mask.sum()):,} of {mask.size:,} ({_share(mask):.1%})", fontsize=9)
        axes.set_xlabel("output" if mask.ndim > 1 else "channel")
        if mask.ndim > 1:
            axes.set_ylabel("input")
        else:
            axes.set_yticks([])
        _whole_numbers(axes.xaxis, axes.yaxis)
    return figure


def plot_filters(mask: Any, *, layout: Layout | None = None, max_side: int = 256):
    """Draws the mask of a convolution: how many weights each of its kernels keeps, and how many are kept at each place.

    Args:
      mask: bool, (height, width, inputs, outputs), of a convolution's kernel.
      layout: which axes are inputs and outputs, if others than the last two: ``jaxsparse.Layout(1, 0)`` for Equinox.
      max_side: the most pixels in each direction; more inputs or outputs are averaged over tiles.

    Returns:
      A ``matplotlib.figure.Figure``. On the left a pixel is the kernel from an input to an output channel: a row
      without ink is a channel that nobody reads, a column a filter that is gone. On the right the places of a kernel.

    Raises:
      ValueError: if the mask has not four dimensions, or one of them is 0.
    """
    mask = np.asarray(mask) if layout is None else layout.to_matrices(np.asarray(mask))
    if mask.ndim != 4 or not mask.size:
        raise ValueError(
            f"plot_filters: expected (height, width, inputs, outputs), none of them 0, got shape {mask.shape}"
        )
    height, width, inputs, outputs = mask.shape
    figure = _figure(11, 4.6)
    kernels, places = figure.subplots(1, 2)
    image = kernels.imshow(
        _tiled(mask.sum((0, 1)).astype(np.float32), max_side), cmap=_inks(), aspect="auto", vmin=0, vmax=height * width,
        interpolation="nearest", extent=(0, outputs, inputs, 0),
    )  # fmt: skip
    kernels.set(xlabel="output channel", ylabel="input channel", title=f"weights kept of a kernel's {height * width}")
    figure.colorbar(image, ax=kernels, shrink=0.8)
    shares = 100 * mask.mean((2, 3))
    image = places.imshow(shares, cmap="viridis", vmin=0, interpolation="nearest")
    places.set(title="kept at each place of a kernel (%)")
    figure.colorbar(image, ax=places, shrink=0.8)
    _whole_numbers(kernels.xaxis, kernels.yaxis, places.xaxis, places.yaxis)
    return figure


def plot_receptive_fields(
    mask: Any, image_shape: Sequence[int] | None = None, *, layout: Layout | None = None, most: int = 100
):
    """Draws what the units of a first layer see: one image a unit, kept weights as ink, and how many see each pixel.

    Args:
      mask: bool, of a dense kernel (height * width * channels, units), or of a convolution's (kernel height, kernel
        width, channels, filters).
      image_shape: (height, width, channels) of the images; not used for a convolution.
      layout: which axes are inputs and outputs, if others than the last two: ``jaxsparse.Layout(1, 0)`` for Equinox.
      most: the number of units drawn, the first of them.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ValueError: if the mask is of another shape, or does not fit the images.
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
    figure = _figure(11, 5.5)
    units_axes, pixels_axes = figure.subplots(1, 2)
    inks = _inks().with_extremes(bad=COLOURS[5])  # the lines between the units
    units_axes.imshow(grid, cmap=inks, vmin=0, vmax=1, interpolation="nearest")
    of = "all" if drawn == units else f"the first {drawn} of"
    units_axes.set_title(f"weights kept of {of} {units} units" if units > 1 else "pixels kept")
    units_axes.set_axis_off()
    image = pixels_axes.imshow(fields.sum(-1), cmap=matplotlib.colormaps["viridis"], vmin=0, interpolation="nearest")
    pixels_axes.set_title("how many units see each pixel")
    _whole_numbers(pixels_axes.xaxis, pixels_axes.yaxis)
    figure.colorbar(image, ax=pixels_axes, shrink=0.8)
    return figure


def plot_weights(opt_state_or_masks: Any, params: Any):
    """Draws how the weights that each sparse layer keeps are distributed, with the means of either sign.

    These means are the two numbers from which ASNI-II starts a layer, :func:`jaxsparse.centroids`.

    Args:
      opt_state_or_masks: an optimizer state, or masks like the params.
      params: of a network.

    Returns:
      A ``matplotlib.figure.Figure``. The outermost thousandth on either side is not drawn, nor what is not finite, of
      which a layer's title says how much there is; layers that keep nothing are left out.

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
    figure = _figure(4 * columns, 2.8 * rows + 0.6)
    means: dict[str, Any] = {}
    for i, path in enumerate(sorted(layers, key=natural_order)):
        axes, kept = figure.add_subplot(rows, columns, i + 1), layers[path]
        finite = kept[np.isfinite(kept)]
        low, high = np.quantile(finite, [0.001, 0.999]) if finite.size else (0, 0)  # far ones would leave no room
        axes.hist(finite, np.linspace(low, high, 61) if high > low else 11, color=COLOURS[5])
        for sign, colour, line, side in ((-1, COLOURS[1], "--", "negative"), (1, _ink(), ":", "positive")):
            if (of_sign := finite[np.sign(finite) == sign]).size:
                means[f"mean of the {side}"] = axes.axvline(of_sign.mean(), color=colour, linestyle=line)
        broken = f"\n{kept.size - finite.size:,} not finite" if finite.size < kept.size else ""
        axes.set_title(f"{_plain(path)}, {kept.size:,} of {weights[path].size:,}{broken}", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel="weight", ylabel="weights" if i % columns == 0 else "")
    if means:
        figure.legend(means.values(), means, loc="outside lower center", ncols=2, fontsize=8)
    if not layers:
        figure.text(0.5, 0.5, "no layer with a mask keeps any weight", ha="center")
    return figure


def plot_history(history: History | Mapping[str, History]):
    """Draws loss and error over the epochs, of train batches, validation and test.

    Args:
      history: of :func:`jaxsparse.inspect.read_history`, or several by label: a colour for each.

    Returns:
      A ``matplotlib.figure.Figure``. What was not logged is left out.
    """
    figure, (losses, errors) = _panels(2, "epoch")
    runs = history if isinstance(history, Mapping) else {"": history}
    colours = COLOURS if len(runs) <= len(COLOURS) else _shades(len(runs))
    for i, (label, run) in enumerate(runs.items()):
        for j, split in enumerate(("train", "validation", "test")):
            style = {"label": f"{_plain(label)}, {split}" if label else split, "color": colours[i if label else j]}
            style["linestyle"] = {"train": ":", "validation": "--", "test": "-"}[split] if label else "-"
            for axes, name, form in ((losses, "loss", lambda x: x), (errors, "accuracy", lambda x: 100 * (1 - x))):
                if f"{split}_{name}" in run.names:
                    epochs, values = run.series(f"{split}_{name}")
                    axes.plot(epochs, form(values), **_marker(epochs), **style)
    losses.set(ylabel="loss (cross-entropy)")
    if losses.lines:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter("{x:g}")
    if errors.lines:
        errors.set_yscale("symlog", linthresh=0.1)  # train errors do reach 0
        errors.yaxis.set_major_formatter("{x:g}")
    errors.set(ylabel="error (%)", ylim=(0, None))
    for axes in (losses, errors):
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing logged yet", ha="center", transform=axes.transAxes)
    handles = {line.get_label(): line for line in (*losses.lines, *errors.lines)}
    if len(runs) > 1 and handles:
        figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    elif handles:
        (losses if losses.lines else errors).legend(handles.values(), handles)
    return figure


def plot_layer_densities(history: History):
    """Draws the density of each sparse layer (or group of channels) over the epochs, and the flips of its mask, if any.

    Args:
      history: of :func:`jaxsparse.inspect.read_history`, of a run with masks.

    Returns:
      A ``matplotlib.figure.Figure``, empty if no densities were logged.
    """
    nothing: tuple[Any, dict[str, Any]] = ([], {})
    epochs, of_layer = history.layers("layer_density") if "layer_density" in history.names else nothing
    updates, flipped = history.layers("flips") if "flips" in history.names else nothing
    figure, (densities, *flips) = _panels(2 if flipped else 1, "epoch")
    figure.set_size_inches(12 if flipped else 8, max(4, 0.18 * len(of_layer)))  # room for the legend
    deep = len(of_layer) > len(_STYLES) * len(COLOURS)  # more layers than styles: their order as shades
    shades = _shades(len(of_layer))
    for i, (path, shares) in enumerate(of_layer.items()):
        style: dict[str, Any] = {"label": _plain(path), "color": COLOURS[i % len(COLOURS)]}
        style["linestyle"] = _STYLES[i // len(COLOURS) % len(_STYLES)]
        if deep:
            style |= {"color": shades[i], "linestyle": "-"}
        densities.plot(epochs, 100 * shares, **_marker(epochs), **style)
        if path in flipped:
            flips[0].plot(updates, flipped[path], **_marker(updates), **style)
    seen = [share for shares in of_layer.values() for share in shares if share > 0]
    wide = max(seen, default=1) >= 10 * min(seen, default=1)
    densities.set(ylabel="kept (%)", yscale="log" if wide else "linear")
    densities.yaxis.set_major_formatter("{x:g}")
    for axes in flips:
        axes.set_yscale("symlog", linthresh=1)
        axes.set(ylabel="mask entries flipped since the point before", ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:,.0f}")
    if not of_layer:
        densities.text(0.5, 0.5, "no densities logged", ha="center", transform=densities.transAxes)
    else:
        figure.legend(*densities.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def plot_accuracy_against_kept(
    runs: Mapping[str, Sequence[Sequence[float]]], *, baselines: Mapping[str, float] | None = None
):
    """Draws accuracy against the share of weights that is kept, a line for each series of runs.

    Args:
      runs: for each label its runs, each (kept, accuracy) or (kept, accuracy, standard error), shares in [0, 1].
      baselines: accuracies by label, such as that of the dense network: horizontal lines.

    Returns:
      A ``matplotlib.figure.Figure``. Shares over a wide range get a logarithmic axis.

    Raises:
      ValueError: if a run is not of two or three numbers, or its share or accuracy is not in [0, 1].
    """
    baselines = baselines or {}
    figure, (axes,) = _panels(1, "weights kept (%)")
    figure.set_size_inches(9, 4.8)
    every = []
    for i, (label, points) in enumerate(runs.items()):
        for point in points:
            if len(point) not in (2, 3) or not all(0 <= share <= 1 for share in point[:2]):
                raise ValueError(
                    f"{label}: expected (kept, accuracy) or (kept, accuracy, standard error), shares in [0, 1], "
                    f"got {tuple(point)}"
                )
        if not points:
            continue
        ordered = sorted((100 * kept, 100 * accuracy, *(100 * e for e in rest)) for kept, accuracy, *rest in points)
        every += [point[0] for point in ordered]
        errors = [point[2] if len(point) == 3 else 0.0 for point in ordered]
        axes.errorbar(
            [p[0] for p in ordered], [p[1] for p in ordered], errors, label=_plain(label),
            marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
            linestyle=_STYLES[i // len(COLOURS) % len(_STYLES)], capsize=3,
        )  # fmt: skip
    for i, (label, accuracy) in enumerate(baselines.items()):
        axes.axhline(100 * accuracy, label=_plain(label), color=_ink(), linestyle=("--", ":", "-.")[i % 3], linewidth=1)
    seen = [kept for kept in every if kept > 0]
    if len(seen) == len(every) and max(seen, default=1) >= 5 * min(seen, default=1):
        _logarithmic(axes, seen)
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set(ylabel="accuracy (%)", ylim=(max(low, 0), min(high, 100)))
    if runs or baselines:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_schedules(schedules: Mapping[str, Callable[[Any], Any]], stages: int):
    """Draws sparsity schedules over the stages 0, ..., stages - 1.

    Args:
      schedules: for each label a schedule, such as ``jaxsparse.sigmoid_sparsity(...)``: stage -> share of zeros.
      stages: how many stages.

    Returns:
      A ``matplotlib.figure.Figure``.
    """
    figure, (axes,) = _panels(1, "stage")
    figure.set_size_inches(9, 4.5)
    for i, (label, schedule) in enumerate(schedules.items()):
        values = [100 * float(schedule(stage)) for stage in range(stages)]
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": (*_STYLES, "-.")[i % 4]}
        axes.plot(range(stages), values, label=_plain(label), **style)
    axes.set(ylabel="zeros (%)", ylim=(0, 102), xlim=(0, max(1, stages - 1)))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_class_specialization(networks: Mapping[str, Mapping[str, Any]]):
    """Draws how specialised the channels of two networks are, back to back, a panel for each layer that both have.

    Args:
      networks: for two labels, such as "dense" and "sparse", what :func:`jaxsparse.inspect.class_specialization`
        returns.

    Returns:
      A ``matplotlib.figure.Figure``: upwards the share of a channel's activity that is due to its top class, to the
      left and to the right how many channels have it; dashed the means. As Figure 3 of the sparse momentum paper.

    Raises:
      ValueError: if there are not two networks, or no layer is in both.
    """
    if len(networks) != 2:
        raise ValueError(f"plot_class_specialization: expected two networks by label, got {list(networks)}")
    (left, of_left), (right, of_right) = networks.items()
    layers = sorted(set(of_left) & set(of_right), key=natural_order)
    if not layers:
        raise ValueError(f"no layer is in both: {left} has {', '.join(of_left)}, {right} has {', '.join(of_right)}")
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = _figure(max(5, 3.4 * columns), 3.4 * rows + 0.5)
    values = np.concatenate([np.asarray(of[layer], float) for of in (of_left, of_right) for layer in layers])
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    bins = np.linspace(low, high if high > low else low + 0.01, 31)
    for i, layer in enumerate(layers):
        axes = figure.add_subplot(rows, columns, i + 1)
        most = 1
        for j, (label, of) in enumerate(((left, of_left), (right, of_right))):
            side, shares = (-1, 1)[j], np.asarray(of[layer], float)
            counts = np.histogram(shares, bins)[0]
            most = max(most, counts.max())
            axes.barh(bins[:-1], side * counts, np.diff(bins), align="edge", color=COLOURS[j], label=_plain(label))
            if shares.size:
                start, end = (0, 0.5) if side < 0 else (0.5, 1)
                axes.axhline(shares.mean(), start, end, color=_ink(), linestyle="--", linewidth=1)
        axes.axvline(0, color=_ink(), linewidth=0.8)
        axes.set(xlim=(-1.1 * most, 1.1 * most), ylim=(bins[0], bins[-1]), title=_plain(layer))
        axes.title.set_fontsize(9)
        axes.set_xlabel("channels")
        axes.set_ylabel("share of the top class" if i % columns == 0 else "")
        _whole_numbers(axes.xaxis)
        axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Any:
    """A figure that stands for itself: no window system, nothing to close, shown by a notebook."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "jaxsparse[inspect]", or matplotlib') from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int, xlabel: str) -> tuple[Any, Any]:
    figure = _figure(6 * count, 4)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
    return figure, panels


def _plain(name: str) -> str:
    """A name as it is: Matplotlib sets what stands between dollars as formulas, and hides what begins with "_"."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _marker(points: Sized) -> dict[str, Any]:
    """A line of one point is seen by its marker alone, which is drawn whole at the edge of a panel too."""
    return {"marker": "o", "markersize": 4, "clip_on": False} if len(points) < 3 else {}


def _shades(count: int) -> list[Any]:
    """So many colours, from dark to light, that are seen on light and on dark pages."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.1 + 0.8 * i / max(1, count - 1)) for i in range(count)]


def _ink() -> Any:
    """The colour of text in matplotlib's style, which is seen on its background."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def _inks() -> Any:
    """From the background of matplotlib's style to the colour of its text."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ground, ink = to_rgba(matplotlib.rcParams["axes.facecolor"]), to_rgba(_ink())
    return LinearSegmentedColormap.from_list("ink", [ground if ground[3] else (*ink[:3], 0.0), ink])


def _sparse(masks: Any, function: str) -> dict[str, np.ndarray]:
    """The masks that are no scalars, by path, in natural order; of an optimizer state those that it holds."""
    if link_states(masks):
        masks = get_masks(masks)
    found = {path: np.asarray(mask) for path, mask in by_path(masks).items() if np.ndim(mask) > 0}
    for path, mask in found.items():
        if mask.dtype != bool:
            raise ValueError(f"{function}: expected masks, or an optimizer state, got {mask.dtype} for {path}")
    if not found:
        raise ValueError(f"{function}: no leaf has a mask, all are dense")
    return {path: found[path] for path in sorted(found, key=natural_order)}


def _logarithmic(axes: Any, shares: Sequence[float]) -> None:
    """A logarithmic x axis, marked at 1, 2, 5, 10, ... in the range of the shares."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    ticks = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if min(shares) / 1.5 < tick < max(shares) * 1.5])


def _share(mask: np.ndarray) -> float:
    return float(mask.mean()) if mask.size else 0.0


def _tiled(image: np.ndarray, max_side: int) -> np.ndarray:
    """The image, averaged over tiles where it has more than ``max_side`` rows or columns."""
    for axis in (0, 1):
        size = image.shape[axis]
        if size > max_side:
            edges = np.linspace(0, size, max_side + 1).astype(int)[:-1]
            lengths = np.diff([*edges, size])
            sums = np.add.reduceat(image, edges, axis=axis)
            image = sums / (lengths[:, None] if axis == 0 else lengths[None, :])
    return image


def _whole_numbers(*axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
