"""Pictures of training runs: their logs, their schedules, and comparisons between runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.inspect.history import History
from jaxsparse.inspect.plots.style import (
    COLOURS,
    LINES,
    MARKERS,
    dark_to_light,
    ink,
    logarithmic,
    marker,
    new_panels,
    plain,
)

__all__ = ["plot_accuracy_against_kept", "plot_history", "plot_layer_densities", "plot_schedules"]


def plot_history(history: History | Mapping[str, History]):
    """Draw loss and error over the epochs, for train batches, validation and test.

    Args:
      history: from :func:`jaxsparse.inspect.read_history`, or several by label, each drawn in its own colour.

    Returns:
      A ``matplotlib.figure.Figure``. Quantities that were not logged are left out.
    """
    figure, (losses, errors) = new_panels(2, "epoch")
    runs = history if isinstance(history, Mapping) else {"": history}
    colours = COLOURS if len(runs) <= len(COLOURS) else dark_to_light(len(runs))
    for i, (label, run) in enumerate(runs.items()):
        for j, split in enumerate(("train", "validation", "test")):
            style = {"label": f"{plain(label)}, {split}" if label else split, "color": colours[i if label else j]}
            style["linestyle"] = {"train": ":", "validation": "--", "test": "-"}[split] if label else "-"
            for axes, name, form in ((losses, "loss", lambda x: x), (errors, "accuracy", lambda x: 100 * (1 - x))):
                if f"{split}_{name}" in run.names:
                    epochs, values = run.series(f"{split}_{name}")
                    axes.plot(epochs, form(values), **marker(epochs), **style)
    losses.set(ylabel="loss (cross-entropy)")
    if losses.lines:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter("{x:g}")
    if errors.lines:
        errors.set_yscale("symlog", linthresh=0.1)  # train errors can reach 0
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
    """Draw the density of each sparse layer (or group of channels) over the epochs, and the flips of its mask, if any.

    Args:
      history: from :func:`jaxsparse.inspect.read_history`, of a run with masks.

    Returns:
      A ``matplotlib.figure.Figure``, empty if no densities were logged.
    """
    nothing: tuple[Any, dict[str, Any]] = ([], {})
    epochs, of_layer = history.layers("layer_density") if "layer_density" in history.names else nothing
    updates, flipped = history.layers("flips") if "flips" in history.names else nothing
    figure, (densities, *flips) = new_panels(2 if flipped else 1, "epoch")
    figure.set_size_inches(12 if flipped else 8, max(4, 0.18 * len(of_layer)))  # room for the legend
    deep = len(of_layer) > len(LINES) * len(COLOURS)  # more layers than styles: shades show their order
    shades = dark_to_light(len(of_layer))
    for i, (path, shares) in enumerate(of_layer.items()):
        style: dict[str, Any] = {"label": plain(path), "color": COLOURS[i % len(COLOURS)]}
        style["linestyle"] = LINES[i // len(COLOURS) % len(LINES)]
        if deep:
            style |= {"color": shades[i], "linestyle": "-"}
        densities.plot(epochs, 100 * shares, **marker(epochs), **style)
        if path in flipped:
            flips[0].plot(updates, flipped[path], **marker(updates), **style)
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
    """Draw accuracy against the share of weights kept, one line per series of runs.

    Args:
      runs: for each label its runs, each (kept, accuracy) or (kept, accuracy, standard error), shares in [0, 1].
      baselines: accuracies by label, such as that of the dense network, drawn as horizontal lines.

    Returns:
      A ``matplotlib.figure.Figure``. Shares over a wide range get a logarithmic axis.

    Raises:
      ValueError: if a run does not have two or three numbers, or its share or accuracy is not in [0, 1].
    """
    baselines = baselines or {}
    figure, (axes,) = new_panels(1, "weights kept (%)")
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
            [p[0] for p in ordered], [p[1] for p in ordered], errors, label=plain(label),
            marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
            linestyle=LINES[i // len(COLOURS) % len(LINES)], capsize=3,
        )  # fmt: skip
    for i, (label, accuracy) in enumerate(baselines.items()):
        axes.axhline(100 * accuracy, label=plain(label), color=ink(), linestyle=("--", ":", "-.")[i % 3], linewidth=1)
    seen = [kept for kept in every if kept > 0]
    if len(seen) == len(every) and max(seen, default=1) >= 5 * min(seen, default=1):
        logarithmic(axes, seen)
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set(ylabel="accuracy (%)", ylim=(max(low, 0), min(high, 100)))
    if runs or baselines:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_schedules(schedules: Mapping[str, Callable[[Any], Any]], steps: int):
    """Draw sparsity schedules over the steps 0, ..., steps - 1.

    Args:
      schedules: for each label a schedule, such as ``jaxsparse.sigmoid_sparsity(...)``: step -> share of zeros.
      steps: the number of steps. Of more than 500, 500 are evaluated, evenly spread.

    Returns:
      A ``matplotlib.figure.Figure``.
    """
    figure, (axes,) = new_panels(1, "step")
    figure.set_size_inches(9, 4.5)
    evaluated = sorted({round(step) for step in np.linspace(0, max(steps - 1, 0), min(max(steps, 1), 500))})
    for i, (label, schedule) in enumerate(schedules.items()):
        values = [100 * float(schedule(step)) for step in evaluated]
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": (*LINES, "-.")[i % 4]}
        axes.plot(evaluated, values, label=plain(label), **style)
    axes.set(ylabel="sparsity (%)", ylim=(0, 102), xlim=(0, max(1, steps - 1)))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
