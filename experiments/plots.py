"""Pictures of runs and tables. Every function returns a ``matplotlib.figure.Figure``; ``savefig(path)`` writes it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from jaxsparse.structures import by_path, natural_order

# Okabe and Ito's colours, which colour-blind readers can tell apart; without their yellow, too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def learning_curve(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and error over the epochs, of train batches, validation and test.

    Args:
      lines: of metrics.jsonl.
    """
    figure, (losses, errors) = _panels(2, "epoch")
    for i, split in enumerate(("train", "validation", "test")):
        points = [line for line in lines if f"{split}_loss" in line]
        epochs = [line["epoch"] for line in points]
        style = {"label": split, "color": COLOURS[i], "marker": "." if len(points) < 3 else None}
        if points:
            losses.plot(epochs, [line[f"{split}_loss"] for line in points], **style)
            errors.plot(epochs, [100 * (1 - line[f"{split}_accuracy"]) for line in points], **style)
    losses.set(ylabel="loss (cross-entropy)", yscale="log")
    errors.set_yscale("symlog", linthresh=0.1)  # train errors do reach 0
    errors.set(ylabel="error (%)", ylim=(0, None))
    errors.yaxis.set_major_formatter("{x:g}")
    if lines:
        losses.legend()
    return figure


def layer_densities(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Density of each sparse layer (or group of channels) over the epochs, and how many entries of its mask flipped.

    Args:
      lines: of metrics.jsonl, of a run with masks.
    """
    figure, (densities, flips) = _panels(2, "epoch")
    lines = [line for line in lines if "layer_density" in line]
    updates = [line for line in lines if "flips" in line]
    paths = sorted(lines[0]["layer_density"] if lines else (), key=natural_order)
    figure.set_figheight(max(4, 0.18 * len(paths)))  # room for the legend
    deep = len(paths) > 3 * len(COLOURS)  # more layers than styles: their order as shades from dark to light
    for i, path in enumerate(paths):
        style = {
            "label": path,
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3],
        }
        if deep:
            style |= {"color": matplotlib.colormaps["viridis"](0.9 * i / len(paths)), "linestyle": "-"}
        densities.plot(
            [line["epoch"] for line in lines], [100 * line["layer_density"][path] for line in lines], **style
        )
        flips.plot([line["epoch"] for line in updates], [line["flips"][path] for line in updates], **style)
    shares = [share for line in lines for share in line["layer_density"].values() if share > 0]
    wide = max(shares, default=1) >= 10 * min(shares, default=1)
    densities.set(ylabel="kept (%)", yscale="log" if wide else "linear")
    densities.yaxis.set_major_formatter("{x:g}")
    flips.set_yscale("symlog", linthresh=1)
    flips.set(ylabel="mask entries flipped since the point before", ylim=(0, None))
    flips.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*densities.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def receptive_fields(mask: np.ndarray, image_shape: Sequence[int], most: int = 100) -> Figure:
    """What the units of a first layer see: one image a unit, kept weights dark, and how many units see each pixel.

    Args:
      mask: bool, of a dense kernel (height * width * channels, units), or of a convolution's (kernel height, kernel
        width, channels, filters).
      image_shape: (height, width, channels) of the images; not used for a convolution.
      most: the number of units drawn, the first of them.
    """
    mask = np.asarray(mask)
    fields = mask.reshape(*(image_shape if mask.ndim == 2 else mask.shape[:3]), mask.shape[-1]).mean(2)
    height, width, units = fields.shape
    drawn = min(units, most)
    columns = int(np.ceil(drawn**0.5))
    rows = -(-drawn // columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for i in range(drawn):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[top : top + height, left : left + width] = fields[..., i]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    units_axes, pixels_axes = figure.subplots(1, 2)
    greys = matplotlib.colormaps["Greys"].with_extremes(bad="#7aa6d8")  # the lines between the units
    units_axes.imshow(grid, cmap=greys, vmin=0, vmax=1, interpolation="nearest")
    of = "all" if drawn == units else f"the first {drawn} of"
    units_axes.set_title(f"weights kept of {of} {units} units" if units > 1 else "pixels kept")
    units_axes.set_axis_off()
    image = pixels_axes.imshow(fields.sum(-1), cmap="viridis", vmin=0, interpolation="nearest")
    pixels_axes.set_title("how many units see each pixel")
    for axis in (pixels_axes.xaxis, pixels_axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=pixels_axes, shrink=0.8)
    return figure


def weight_distributions(params: Any, masks: Any) -> Figure:
    """How the weights that each sparse layer keeps are distributed, with the means of either sign: ASNI's two numbers.

    Args:
      params: of a network.
      masks: like ``params``: bool arrays, the scalar True for dense leaves.
    """
    weights = {path: np.asarray(leaf, np.float32) for path, leaf in by_path(params).items()}
    layers = {
        path: weights[path][np.asarray(mask)] for path, mask in by_path(masks).items() if np.ndim(mask) and mask.any()
    }
    columns = min(4, max(1, len(layers)))
    rows = max(1, -(-len(layers) // columns))
    figure = Figure(figsize=(4 * columns, 2.8 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, path in enumerate(sorted(layers, key=natural_order)):
        axes, kept = figure.add_subplot(rows, columns, i + 1), layers[path]
        low, high = np.quantile(kept, [0.001, 0.999])  # a few far ones would leave no room for the rest
        edges = np.linspace(low, high, 61) if high > low else 11
        axes.hist(kept, edges, color="#56B4E9")
        for sign, colour, line, side in ((-1, "#D55E00", "--", "negative"), (1, "#000000", ":", "positive")):
            if (of_sign := kept[np.sign(kept) == sign]).size:
                axes.axvline(of_sign.mean(), color=colour, linestyle=line, label=f"mean of the {side}")
        axes.set_title(f"{path}, {kept.size:,} of {weights[path].size:,}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel="weight", ylabel="weights" if i % columns == 0 else "")
        if i == 0:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def sparsities(schedules: Mapping[str, Callable[[Any], Any]], stages: int) -> Figure:
    """Sparsity schedules over the stages 0, ..., stages - 1.

    Args:
      schedules: for each label a schedule, such as ``jaxsparse.sigmoid_sparsity(...)``.
      stages: how many stages.
    """
    figure, (axes,) = _panels(1, "stage")
    figure.set_size_inches(9, 4.5)
    for i, (label, schedule) in enumerate(schedules.items()):
        values = [100 * float(schedule(stage)) for stage in range(stages)]
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":", "-.")[i % 4]}
        axes.plot(range(stages), values, label=label, **style)
    axes.set(ylabel="zeros (%)", ylim=(0, 102), xlim=(0, stages - 1))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def errors_against(
    xlabel: str,
    series: Mapping[str, Mapping[Any, tuple[float, float | None]]],
    baselines: Mapping[str, float],
    title: str,
) -> Figure:
    """Test error against something else, with error bars.

    Args:
      xlabel: what x is. Numbers over a wide range get a logarithmic axis.
      series: for each label, the points: x, a number or a name -> error in % and its standard error, None if not
        known.
      baselines: errors in %, by label, drawn as horizontal lines.
      title: of the picture.
    """
    figure, (axes,) = _panels(1, xlabel)
    figure.set_size_inches(10, 5.5)
    names = list(dict.fromkeys(x for points in series.values() for x in points))
    named = any(isinstance(x, str) for x in names)
    position = {x: names.index(x) if named else x for x in names}
    for i, (label, points) in enumerate(series.items()):
        xs = list(points) if named else sorted(points)
        means, errors = zip(*(points[x] for x in xs), strict=True)
        style = {"label": label, "marker": "os^vDPX"[i % 7], "color": COLOURS[i % len(COLOURS)], "capsize": 3}
        places = [position[x] + (0.06 * i if named else 0) for x in xs]
        axes.errorbar(places, means, [error or 0 for error in errors], linestyle="" if named else "-", **style)
    for i, (label, error) in enumerate(baselines.items()):
        axes.axhline(error, label=label, color=COLOURS[i % len(COLOURS)], linestyle="--", linewidth=1)
    axes.set(ylabel="test error (%)")
    figure.suptitle(title)
    if not named and max(names, default=1) >= 10 * min(names, default=1):
        axes.set_xscale("log")
    if not named:
        scale = np.log if axes.get_xscale() == "log" else np.asarray
        position = {x: x for x in _apart(sorted(position), scale)}
    axes.xaxis.set_major_locator(FixedLocator(list(position.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{x}".replace(" + ", "\n+ ") for x in position])
    if series or baselines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _apart(xs: Sequence[float], scale: Callable[[Any], Any]) -> list[float]:
    """Those of the increasing numbers that are not too near to one before for two labels side by side."""
    kept: list[float] = []
    for x in xs:
        if not kept or scale(x) - scale(kept[-1]) > 0.04 * (scale(xs[-1]) - scale(xs[0])):
            kept.append(x)
    return kept


def _panels(count: int, xlabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6 * count, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
    return figure, panels
