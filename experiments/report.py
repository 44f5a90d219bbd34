"""Compare runs on one page: curves, tables, masks and what differs between their configurations.

  python -m experiments.report runs/digits_dense runs/digits_sparse              # writes report.html
  python -m experiments.report runs/mnist --out=mnist.html --title="MNIST, 5%"   # all runs in the folder

The page stands alone, in one file: it loads nothing, and follows the light or dark scheme of the browser. Differences
in accuracy are from the first run on the same data. Runs need not be finished.
"""

import argparse
import dataclasses
import html
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.style
import numpy as np
from tqdm import tqdm

import jaxsparse
from experiments import workdir
from experiments.command_line import as_path
from experiments.compare import find_runs, mean_and_error, tested_on
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
MOST_TOLD = 3  # keys of a configuration in a picture's legend
NOT_COMPARED = (*workdir.NOT_COMPARED, "seed", "side_by_side")  # not what a configuration is about

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --page: #ffffff; --ink: #1b1b1b; --soft: #5c5c5c; --line: #c9c9c9; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #141414; --ink: #ececec; --soft: #a8a8a8; --line: #4a4a4a; }} }}
body {{ background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 75rem; padding: 1rem 1.5rem 4rem; }}
h1 {{ font-size: 1.6rem; margin: 0.5rem 0; }}
h2 {{ border-bottom: 1px solid var(--line); font-size: 1.2rem; margin: 2.2rem 0 0.8rem; padding-bottom: 0.2rem; }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 0.3rem; }}
p, figcaption {{ color: var(--soft); margin: 0.3rem 0; max-width: 60rem; }}
table {{ white-space: nowrap; }}
figure {{ margin: 0.8rem 0; }}
svg {{ height: auto; max-width: 100%; }}
details {{ border-top: 1px solid var(--line); padding: 0.5rem 0; }}
summary {{ cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the folder of a run holds.

    Attributes:
      name: what it is called on the page.
      path: of the folder.
      config: of the run, by key: "sparsity.method".
      history: what was logged so far.
      result: what came out; None while it is not finished.
      params: the params to evaluate, of a finished sparse run.
      masks: their masks; those of gates are of the weights that they leave.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    history: inspect.History
    result: Mapping[str, Any] | None
    params: Any = None
    masks: Any = None

    @property
    def method(self) -> str:
        """The method of the run, as its configuration calls it."""
        return "dense" if self.config.get("dense") else str(self.config.get("sparsity.method", ""))

    def last(self, name: str) -> float | None:
        """The last value that was logged or came out; None if there is none."""
        if self.result is not None and self.result.get(name) is not None:
            return float(self.result[name])
        return float(self.history.series(name)[1][-1]) if name in self.history.names else None


def read_run(path: Path, name: str) -> Run:
    """Reads the folder of a run.

    Raises:
      OSError, ValueError: if a file in it cannot be read; the message says which.
    """
    config = workdir.flat(workdir.read_json(path / "config.json") or {})
    result = workdir.read_json(path / "result.json")
    logged = (path / "metrics.jsonl").exists()
    history = inspect.read_history(path) if logged else inspect.History(())
    params = masks = None
    if (path / "sparse.safetensors").exists():
        params, masks = jaxsparse.load_sparse(path / "sparse.safetensors")
        if masks is None or not any(np.ndim(mask) for mask in jax.tree.leaves(masks)):  # of gates
            masks = jaxsparse.nonzero_masks(params)
    return Run(name, path, config, history, result, params, masks)


def report(runs: Sequence[Run], title: str, progress: Callable[[Any], Any] = iter) -> str:
    """The page.

    Args:
      runs: in the order of the tables.
      title: of the page.
      progress: is handed the runs while their pictures are drawn, such as ``tqdm``.
    """
    sets = by_test_set(runs)

    def of_each(part: Callable[[Sequence[Run]], str]) -> list[str]:
        """What ``part`` makes of the runs on each data set, under its name where there are several."""
        made = {images: part(of_set) for images, of_set in sets.items()}
        titles = {images: f"<h3>{html.escape(images)}</h3>" if len(sets) > 1 else "" for images in sets}
        return [titles[images] + text for images, text in made.items() if text]

    with matplotlib.style.context(STYLE):
        parts = ["<h2>Runs</h2>", *of_each(lambda runs: runs_table(runs).html())]
        if (seeds := seeds_table(runs)).rows:
            parts += ["<h2>Over seeds</h2>", "<p>Runs whose configurations differ by the seed alone: mean ± standard "
                      "error of what they ended with.</p>", seeds.html()]  # fmt: skip
        if pictures := of_each(_accuracy):
            parts += ["<h2>Accuracy against kept weights</h2>", *pictures]
        if pictures := of_each(_learning_curves):
            parts += ["<h2>Learning curves</h2>", *pictures]
        parts += ["<h2>Configurations</h2>", _configurations(runs)]
        if tables := of_each(lambda runs: table.html() if (table := overlap_table(runs)).rows else ""):
            about = "Jaccard: what both keep as a share of what either keeps; by chance: of random masks as dense."
            parts += ["<h2>Masks in common</h2>", f"<p>{about}</p>", *tables]
        parts.append("<h2>Each run</h2>")
        parts += [_details(run, opened=len(runs) <= 2) for run in progress(runs)]
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def by_test_set(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by the images that they are tested on: only those of one set are compared."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        sets.setdefault(tested_on(run.config), []).append(run)
    return sets


def runs_table(runs: Sequence[Run]) -> Table:
    """A line a run on one data set: what it is and what came out."""
    header = ("run", "method", "state", "kept", "test accuracy", "difference", "validation", "images/s", "seconds")
    first = runs[0].last("test_accuracy")
    rows = []
    for run in runs:
        accuracy, density = run.last("test_accuracy"), run.last("density")
        speed = np.median(run.history.series("speed/images_per_second")[1]) if _has_speed(run) else None
        compared = accuracy is not None and first is not None and run is not runs[0] and math.isfinite(accuracy - first)
        rows.append((
            run.name, run.method, _state(run), _share(density), _share(accuracy),
            f"{100 * (accuracy - first):+.2f} points" if compared else "", _share(run.last("validation_accuracy")),
            "" if speed is None else f"{speed:,.0f}", _seconds(run),
        ))  # fmt: skip
    return Table(header, tuple(rows), left=(0, 1, 2)).without_empty_columns()


def over_seeds(runs: Sequence[Run]) -> list[list[Run]]:
    """Finished runs, grouped by configuration (ignoring the seed)."""
    groups: dict[str, dict[Any, Run]] = {}
    for run in runs:
        if run.result is not None:
            same = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
            groups.setdefault(json.dumps(same, sort_keys=True), {}).setdefault(run.config.get("seed"), run)
    return [list(by_seed.values()) for by_seed in groups.values()]


def seeds_table(runs: Sequence[Run]) -> Table:
    """A line for all finished runs that differ by their seed alone, where there are several."""
    rows = []
    for group in over_seeds(runs):
        if len(group) > 1:
            means = [[100 * x for x in _mean(group, name)] for name in ("density", "test_accuracy")]
            cells = ["{:.2f} ± {:.3f}%".format(*mean) if mean else "" for mean in means]
            rows.append((_name(group), f"{len(group)}", *cells))
    return Table(("runs", "seeds", "kept", "test accuracy"), tuple(rows))


def overlap_table(runs: Sequence[Run]) -> Table:
    """What the masks of runs have in common with those of the first run that has any, where they are of one network."""
    sparse = [run for run in runs if run.masks is not None]
    rows = []
    for run in sparse[1:]:
        if _shapes(run.masks) == _shapes(sparse[0].masks):
            compared = inspect.compare_masks(sparse[0].masks, run.masks)
            total = compared.total
            chance = sum(row.first * row.second / row.weights for row in compared.layers)
            by_chance = chance / (total.first + total.second - chance) if total.first + total.second else 1.0
            rows.append((run.name, f"{total.both:,}", f"{total.flips:,}", f"{total.jaccard:.3f}", f"{by_chance:.3f}"))
    first = f"against {sparse[0].name}" if sparse else ""
    return Table((first, "kept by both", "flips", "Jaccard", "by chance"), tuple(rows))


def _learning_curves(runs: Sequence[Run]) -> str:
    logged = {run.name: run.history for run in runs if "train_loss" in run.history.names}
    return _figure(inspect.plot_history(logged), "Loss and error by epoch.") if logged else ""


def _accuracy(runs: Sequence[Run]) -> str:
    picture = accuracy_against_kept(runs)
    return _figure(picture, "Test accuracy of finished runs.") if picture else ""


def accuracy_against_kept(runs: Sequence[Run]) -> Any:
    """A point for the seeds of a configuration; a line for configurations that differ in one number of the method's."""
    series: dict[str, list[tuple[float, ...]]] = {}
    baselines: dict[str, float] = {}
    groups = [group for group in over_seeds(runs) if _mean(group, "density") and _mean(group, "test_accuracy")]
    for method in dict.fromkeys(group[0].method for group in groups):
        of_method = [group for group in groups if group[0].method == method]
        differing = _differing([group[0] for group in of_method])
        if method == "dense":
            differing = [key for key in differing if not key.startswith("sparsity.")]
        numbers = [key for key in differing if key.startswith("sparsity.") and _is_number(of_method[0][0].config, key)]
        told = [key for key in differing if numbers != [key]]
        for group in of_method:
            values = [f"{key.removeprefix('sparsity.')} {_value(group[0].config, key)}" for key in told]
            label = ", ".join([method, *(values if len(values) <= MOST_TOLD else [_name(group)])])
            accuracy, *error = _mean(group, "test_accuracy")
            if method == "dense":
                baselines[label] = accuracy
            else:
                series.setdefault(label, []).append((_mean(group, "density")[0], accuracy, *error))
    return inspect.plot_accuracy_against_kept(series, baselines=baselines) if series else None


def _mean(group: Sequence[Run], name: str) -> tuple[float, ...]:
    """Mean of what the runs ended with, and of several the standard error; nothing if one of them lacks it."""
    values = [value for value in (run.last(name) for run in group) if value is not None and math.isfinite(value)]
    if len(values) < len(group):
        return ()
    mean, error = mean_and_error(values)
    return (mean,) if error is None else (mean, error)


def _name(group: Sequence[Run]) -> str:
    """What runs that differ by the seed are called: the folder that they have in common, or the first."""
    folders = {run.path.resolve().parent.name for run in group}
    return folders.pop() if len(group) > 1 and len(folders) == 1 else group[0].name


def _differing(runs: Sequence[Run]) -> list[str]:
    keys = sorted({key for run in runs for key in run.config if key not in NOT_COMPARED}, key=natural_order)
    return [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]


def _is_number(config: Mapping[str, Any], key: str) -> bool:
    return isinstance(config.get(key), int | float) and not isinstance(config.get(key), bool)


def _configurations(runs: Sequence[Run]) -> str:
    differing = _differing(runs)
    same = sorted({key for run in runs for key in run.config} - {*differing, *NOT_COMPARED}, key=natural_order)
    parts = []
    if differing:
        cells = [(key, *(_value(run.config, key) for run in runs)) for key in differing]
        parts.append(Table(("key", *(run.name for run in runs)), tuple(cells), left=tuple(range(len(runs) + 1))).html())
    elif len(runs) > 1:
        parts.append("<p>They are the same, but for the seed.</p>")
    rows = tuple((key, _value(runs[0].config, key)) for key in same)
    name = "What all of them share" if len(runs) > 1 else "All keys"
    parts.append(f"<details><summary>{name}</summary>{Table(('key', 'value'), rows, left=(0, 1)).html()}</details>")
    return "\n".join(parts)


def _details(run: Run, opened: bool) -> str:
    parts = [f"<p>{html.escape(run.method)}, {html.escape(_state(run))}</p>"]
    if run.history.lines:
        parts += ["<h3>What was logged</h3>", run.history.table().html()]
    if "layer_density" in run.history.names:
        caption = "Density of each layer, and flips of its mask."
        parts.append(_figure(inspect.plot_layer_densities(run.history), caption))
    if run.masks is not None:
        parts += ["<h3>Layers</h3>", inspect.summary(run.masks, run.params).table().html()]
        sparse = {path: mask for path, mask in by_path(run.masks).items() if np.ndim(mask)}
        if len(sparse) > MOST_MASKS:
            parts.append(_figure(inspect.plot_densities(sparse), "Density of each layer at the end."))
        largest = sorted(sparse, key=lambda path: -sparse[path].size)[:MOST_MASKS]
        if largest:
            which = "" if len(largest) == len(sparse) else f" of the {MOST_MASKS} largest layers"
            shown = {path: mask for path, mask in sparse.items() if path in largest}
            parts.append(_figure(inspect.plot_masks(shown), f"Masks{which} at the end."))
    elif not run.config.get("dense"):
        parts.append("<p>No masks to show: a run leaves them, as sparse.safetensors, when it is finished.</p>")
    attribute = " open" if opened else ""
    return f"<details{attribute}><summary>{html.escape(run.name)}</summary>\n" + "\n".join(parts) + "\n</details>"


def _state(run: Run) -> str:
    if not run.history.lines:
        return "nothing logged yet"
    line = run.history.lines[-1]
    return ("finished" if run.result is not None else "not finished") + f", epoch {line.get('epoch', line['step']):g}"


def _seconds(run: Run) -> str:
    return f"{run.history.series('seconds')[1].sum():,.0f}" if "seconds" in run.history.names else ""


def _has_speed(run: Run) -> bool:
    return any("images_per_second" in line.get("speed", {}) for line in run.history.lines)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}" if math.isfinite(share) else str(share)


def _value(config: Mapping[str, Any], key: str) -> str:
    return "—" if config.get(key) is None else json.dumps(config[key])


def _shapes(masks: Any) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(mask) for path, mask in by_path(masks).items()}


def _figure(figure: Any, caption: str) -> str:
    """A picture as SVG in the page, in the colours of its text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
    return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without what all begin with; of a single one its last part."""
    if len(paths) == 1:
        return [paths[0].resolve().name]
    resolved = [path.resolve() for path in paths]
    common = Path(os.path.commonpath(resolved))
    return [str(path.relative_to(common)) if path != common else path.name for path in resolved]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=as_path, metavar="WORKDIR", help="folder of a run or of runs")
    parser.add_argument("--out", type=as_path, default=Path("report.html"), help="the file to write (%(default)s)")
    parser.add_argument("--title", default="Sparse training runs", help="of the page (%(default)s)")
    args = parser.parse_args(argv)
    try:
        paths = find_runs(args.workdirs)
        bar = {"disable": not sys.stderr.isatty(), "leave": False}
        named = list(zip(paths, short_names(paths), strict=True))
        runs = [read_run(path, name) for path, name in tqdm(named, "reading", **bar)]
        page = report(runs, args.title, lambda runs: tqdm(runs, "drawing", **bar))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}; see {args.out}")


if __name__ == "__main__":
    main()
