"""Colours, lines and figures that all pictures share."""

import io
from collections.abc import Sequence, Sized
from typing import Any

__all__ = [
    "COLOURS", "LINES", "MARKERS", "dark_to_light", "ink", "ink_map", "logarithmic", "marker", "new_figure",
    "new_panels", "plain", "whole_numbers",
]  # fmt: skip

# The palette of Okabe and Ito without its yellow, too light for lines, and its black, invisible on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^vDPX"
LINES = ("-", "--", ":")


def new_figure(width: float, height: float) -> Any:
    """A figure without a window system, which notebooks display and which need not be closed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int, xlabel: str) -> tuple[Any, Any]:
    """A figure and its panels side by side, with a grid and the same x label."""
    figure = new_figure(6 * count, 4)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
    return figure, panels


def plain(name: str) -> str:
    """Escape a name: matplotlib sets text between dollar signs as formulas, and hides names that begin with "_"."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def marker(points: Sized) -> dict[str, Any]:
    """The style of lines with so few points that only markers show them, even at the edge of a panel."""
    return {"marker": "o", "markersize": 4, "clip_on": False} if len(points) < 3 else {}


def dark_to_light(count: int) -> list[Any]:
    """A number of colours from dark to light, visible on light and on dark pages."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.1 + 0.8 * i / max(1, count - 1)) for i in range(count)]


def ink() -> Any:
    """The colour of text in matplotlib's style, visible on its background."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def ink_map() -> Any:
    """A colour map from the background of matplotlib's style to the colour of its text."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ground, text = to_rgba(matplotlib.rcParams["axes.facecolor"]), to_rgba(ink())
    return LinearSegmentedColormap.from_list("ink", [ground if ground[3] else (*text[:3], 0.0), text])


def logarithmic(axes: Any, shares: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks at 1, 2, 5, 10, ... in the range of the shares."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    ticks = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if min(shares) / 1.5 < tick < max(shares) * 1.5])


def whole_numbers(*axes: Any) -> None:
    """Put the ticks of axes at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
