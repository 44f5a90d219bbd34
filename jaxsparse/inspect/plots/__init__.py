"""Pictures of masks, weights and runs.

Every function returns a ``matplotlib.figure.Figure``. As the last expression of a notebook's cell it is displayed, and
``figure.savefig(path)`` writes it. Pictures follow matplotlib's style, so ``with
matplotlib.style.context("dark_background"):`` makes dark ones. Colours are those of Okabe and Ito, which colour-blind
readers can tell apart. Matplotlib is imported by the first call.
"""

from jaxsparse.inspect.plots.features import plot_class_specialization
from jaxsparse.inspect.plots.masks import (
    plot_densities,
    plot_filters,
    plot_heads,
    plot_masks,
    plot_receptive_fields,
    plot_weights,
)
from jaxsparse.inspect.plots.runs import (
    plot_accuracy_against_kept,
    plot_history,
    plot_layer_densities,
    plot_schedules,
)
from jaxsparse.inspect.plots.style import COLOURS, MARKERS

__all__ = [
    "COLOURS", "MARKERS", "plot_accuracy_against_kept", "plot_class_specialization", "plot_densities", "plot_filters",
    "plot_heads", "plot_history", "plot_layer_densities", "plot_masks", "plot_receptive_fields", "plot_schedules",
    "plot_weights",
]  # fmt: skip
