"""The picture of a paper's table."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.results.paper import beside_paper
from experiments.results.published import PaperTable
from jaxsparse.inspect.plots import style as plots

if TYPE_CHECKING:
    import pandas as pd


def picture(table: PaperTable, found: "pd.DataFrame") -> Figure:
    """The test errors of a paper's table: ours, the paper's and those of other methods, in matplotlib's style.

    ``found`` is as for :func:`experiments.results.paper.beside_paper`.
    """
    ours: dict[str, dict[Any, tuple[float, float]]] = {}
    paper: dict[str, dict[Any, tuple[float, float]]] = {}
    baselines: dict[str, float] = {}
    for row in beside_paper(table, found).itertuples():
        error, label = (row.test_error, row.test_error_error), f"{row.series}, ours"
        x = round(row.kept, 2) if table.against_kept else row.x
        if table.footprint:  # of the file that is as large
            error, label, x = (row.error_int8, row.error_int8_error), row.series, round(row.bytes_int8 / 1000, 1)
        if row.x == "dense" and not math.isnan(error[0]):
            baselines[f"{row.series}, dense, ours"] = error[0]
        elif row.x != "dense" and not math.isnan(error[0]):
            ours.setdefault(label, {})[x] = error
        if not math.isnan(row.published) and row.x != "dense":
            paper.setdefault(f"{row.series}, paper", {})[row.x] = row.published, row.published_error
    others = {label: {x: (error, math.nan) for x, error in points.items()} for label, points in table.others.items()}
    xlabel = "weights kept (%)" if table.against_kept else table.x
    if table.footprint:
        xlabel = "kilobytes of the file, values in int8"
    return errors_against(xlabel, {**ours, **paper, **others}, baselines, table.name)


def errors_against(
    xlabel: str, series: Mapping[str, Mapping[Any, tuple[float, float]]], baselines: Mapping[str, float], title: str
) -> Figure:
    """Draws test error against another quantity, with error bars.

    Args:
      xlabel: name of the quantity. Numbers over a wide range get a logarithmic axis.
      series: label -> {x: (error in %, standard error)}; x is a number or a name, the standard error may be NaN.
      baselines: label -> error in %, drawn as horizontal lines.
      title: of the picture.
    """
    figure = plots.new_figure(10, 5.5)
    axes = figure.add_subplot()
    colours = (*mpl.rcParams["axes.prop_cycle"].by_key()["color"], plots.ink())
    axes.set(xlabel=xlabel, ylabel="test error (%)")
    axes.grid(alpha=0.3)
    names = list(dict.fromkeys(x for points in series.values() for x in points))
    named = any(isinstance(x, str) for x in names)
    position = {x: names.index(x) if named else x for x in names}
    for i, (label, points) in enumerate(series.items()):
        xs = list(points) if named else sorted(points)
        means, errors = zip(*(points[x] for x in xs), strict=True)
        style = {"label": label, "marker": plots.MARKERS[i % 7], "color": colours[i % len(colours)], "capsize": 3}
        places = [position[x] + (0.06 * i if named else 0) for x in xs]
        axes.errorbar(places, means, np.nan_to_num(errors), linestyle="" if named else "-", **style)
    for i, (label, error) in enumerate(baselines.items()):
        axes.axhline(error, label=label, color=colours[i % len(colours)], linestyle="--", linewidth=1)
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
    """Those of the increasing numbers whose labels have room beside the label before."""
    kept: list[float] = []
    for x in xs:
        if not kept or scale(x) - scale(kept[-1]) > 0.04 * (scale(xs[-1]) - scale(xs[0])):
            kept.append(x)
    return kept
