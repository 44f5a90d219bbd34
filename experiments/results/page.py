"""The page of a report: tables, curves and masks of runs, in one HTML file that loads nothing."""

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np

from experiments.results import compare
from experiments.results.collect import NOT_COMPARED, Run
from jaxsparse import inspect
from jaxsparse.tables import Table
from jaxsparse.trees import by_path, natural_order

# In place of this colour lines and letters take that of the page's text; images keep it, and it is seen on either.
INK = "#0b73b3"
STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "legend.edgecolor": INK,
    "legend.framealpha": 0.2,
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxsparse",
}
MOST_MASKS = 8  # layers of a run that are drawn


def report(runs: Sequence[Run], title: str, progress: Callable[[Any], Any] = iter, refresh: int | None = None) -> str:
    """The page of some runs, as HTML.

    Args:
      runs: in the order of the tables.
      title: of the page.
      progress: wraps the runs while their pictures are drawn, such as ``tqdm``.
      refresh: the seconds after which the page asks where it came from for a new one; None: never.
    """
    differing, shared = _configurations(runs)
    with matplotlib.style.context(STYLE):
        return _render(
            title=title,
            sets=[_of_set(name, of_set) for name, of_set in compare.by_data(runs).items()],
            seeds=compare.seeds_table(runs),
            differing=differing,
            shared=shared,
            details=map(_details, progress(runs)),
            count=len(runs),
            refresh=refresh,
            message=None,
        )


def notice(message: str, title: str, refresh: int) -> str:
    """A page that says why there are no runs to show; ``refresh`` is that of :func:`report`."""
    return _render(title=title, message=message, refresh=refresh)


def _render(**values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["svg"] = _svg
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(values)


def _of_set(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The parts of the page that compare runs on one data set; None where there is nothing to compare."""
    curves = {run.name: run.history for run in runs if "train_loss" in run.history.names}
    overlap = compare.overlap_table(runs)
    return {
        "name": name,
        "runs": compare.runs_table(runs),
        "accuracy": compare.accuracy_against_kept(runs),
        "curves": inspect.plot_history(curves) if curves else None,
        "overlap": overlap if overlap.rows else None,
    }


def _configurations(runs: Sequence[Run]) -> tuple[Table, Table]:
    """A table of the keys that differ, with a column for each run, and one of the others."""
    keys = compare.differing_keys(runs)
    others = sorted({key for run in runs for key in run.config} - {*keys, *NOT_COMPARED}, key=natural_order)
    cells = tuple((key, *(compare.value_of(run.config, key) for run in runs)) for key in keys)
    differing = Table(("key", *(run.name for run in runs)), cells, left=tuple(range(len(runs) + 1)))
    return differing, Table(
        ("key", "value"), tuple((key, compare.value_of(runs[0].config, key)) for key in others), left=(0, 1)
    )


def _details(run: Run) -> dict[str, Any]:
    """The part of the page about one run; None where there is nothing to show."""
    found = dict.fromkeys(("logged", "layer_densities", "layers", "densities", "masks", "masks_caption"))
    found |= {"name": run.name, "method": run.method, "state": run.state}
    if run.history.lines:
        found["logged"] = run.history.table()
    densities = run.history.layers("layer_density")[1] if "layer_density" in run.history.names else {}
    if any(np.ptp(of_layer) for of_layer in densities.values()) or _flips(run.history):
        found["layer_densities"] = inspect.plot_layer_densities(run.history)
    if run.masks is not None:
        found["layers"] = inspect.summary(run.masks, run.params).table()
        sparse = {path: mask for path, mask in by_path(run.masks).items() if np.ndim(mask)}
        if len(sparse) > MOST_MASKS:
            found["densities"] = inspect.plot_densities(sparse)
        largest = sorted(sparse, key=lambda path: -sparse[path].size)[:MOST_MASKS]
        if largest:
            which = "" if len(largest) == len(sparse) else f" of the {MOST_MASKS} largest layers"
            found["masks_caption"] = f"Masks{which} at the end."
            found["masks"] = inspect.plot_masks({path: mask for path, mask in sparse.items() if path in largest})
    return found


def _flips(history: inspect.History) -> bool:
    """Whether any mask changed."""
    return any(flips for line in history.lines for flips in line.get("flips", {}).values())


def _svg(figure: Any, caption: str) -> Any:
    """A picture as SVG, in the colours of the page's text."""
    import markupsafe

    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    return markupsafe.Markup(drawing.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1))
