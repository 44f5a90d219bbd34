"""Pictures of how specialised the channels of a network are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsparse.inspect.plots.style import COLOURS, ink, new_figure, plain, whole_numbers
from jaxsparse.trees import natural_order

__all__ = ["plot_class_specialization"]


def plot_class_specialization(networks: Mapping[str, Mapping[str, Any]]):
    """Draw how specialised the channels of two networks are, back to back, one panel per layer that both have.

    Args:
      networks: for two labels, such as "dense" and "sparse", the result of
        :func:`jaxsparse.inspect.class_specialization`.

    Returns:
      A ``matplotlib.figure.Figure``, as Figure 3 of the sparse momentum paper: the vertical axis is the share of a
      channel's activity that is due to its top class, bars to the left and right count the channels of the two
      networks, and dashed lines are their means.

    Raises:
      ValueError: if there are not exactly two networks, or no layer is in both.
    """
    if len(networks) != 2:
        raise ValueError(f"plot_class_specialization: expected two networks by label, got {list(networks)}")
    (left, of_left), (right, of_right) = networks.items()
    layers = sorted(set(of_left) & set(of_right), key=natural_order)
    if not layers:
        raise ValueError(f"no layer is in both: {left} has {', '.join(of_left)}, {right} has {', '.join(of_right)}")
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(max(5, 3.4 * columns), 3.4 * rows + 0.5)
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
            axes.barh(bins[:-1], side * counts, np.diff(bins), align="edge", color=COLOURS[j], label=plain(label))
            if shares.size:
                start, end = (0, 0.5) if side < 0 else (0.5, 1)
                axes.axhline(shares.mean(), start, end, color=ink(), linestyle="--", linewidth=1)
        axes.axvline(0, color=ink(), linewidth=0.8)
        axes.set(xlim=(-1.1 * most, 1.1 * most), ylim=(bins[0], bins[-1]), title=plain(layer))
        axes.title.set_fontsize(9)
        axes.set_xlabel("channels")
        axes.set_ylabel("share of the top class" if i % columns == 0 else "")
        whole_numbers(axes.xaxis)
        axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure
