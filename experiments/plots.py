"""The picture of a table of results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from jaxsparse.inspect import plots

COLOURS = (*plots.COLOURS, "#000000")  # these pictures have a white ground


def errors_against(
    xlabel: str,
    series: Mapping[str, Mapping[Any, tuple[float, float | None]]],
    baselines: Mapping[str, float],
    title: str,
) -> Figure:
    """Test error against something else, with error bars; ``savefig(path)`` writes it.

    Args:
      xlabel: what x is. Numbers over a wide range get a logarithmic axis.
      series: for each label, the points: x, a number or a name -> error in % and its standard error, None if not
        known.
      baselines: errors in %, by label, drawn as horizontal lines.
      title: of the picture.
    """
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3)
    names = list(dict.fromkeys(x for points in series.values() for x in points))
    named = any(isinstance(x, str) for x in names)
    position = {x: names.index(x) if named else x for x in names}
    for i, (label, points) in enumerate(series.items()):
        xs = list(points) if named else sorted(points)
        means, errors = zip(*(points[x] for x in xs), strict=True)
        style = {"label": label, "marker": plots.MARKERS[i % 7], "color": COLOURS[i % len(COLOURS)], "capsize": 3}
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
