"""Pictures for light and for dark pages."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsparse.inspect.plots import style as plots

# Text, ground and lines, and colours that colour-blind people tell apart on this ground.
THEMES = {
    "light": ("#1f2328", "#ffffff", "#c4c9cf", plots.COLOURS),
    "dark": ("#d8dce2", "#131416", "#4a4f57", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")),
}


@contextlib.contextmanager
def style(theme: str) -> Iterator[None]:
    """Matplotlib's style for one of :data:`THEMES`."""
    import matplotlib as mpl

    ink, ground, line, colours = THEMES[theme]
    options: dict[Any, Any] = {
        "axes.prop_cycle": mpl.rcsetup.cycler(color=colours), "axes.edgecolor": line, "axes.labelcolor": ink,
        "axes.facecolor": ground, "figure.facecolor": ground, "savefig.facecolor": ground, "grid.color": line,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3,
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
    }  # fmt: skip
    with mpl.rc_context(options):
        yield


def save(picture: Callable[[], Any], folder: Path, name: str) -> None:
    """Draws a picture for each of :data:`THEMES` and writes NAME_light.png and NAME_dark.png into a folder."""
    for theme in THEMES:
        with style(theme):
            picture().savefig(folder / f"{name}_{theme}.png", dpi=130)


def in_markdown(name: str, title: str) -> str:
    """The line of a page that shows the picture which suits it."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{name}_dark.png">'
    return f'<picture>{source}<img src="{name}_light.png" alt="{title}"></picture>'
