"""Inspection of sparse networks: accessors of optimizer states, tables, and pictures.

All functions take plain pytrees. Tables print as text, in colour with ``rich.print``, and as HTML in a notebook.
Pictures need matplotlib; the extra "inspect" installs it, rich and treescope.
"""

from jaxsparse.inspect.attention import HeadSummary, LayerHeads, heads
from jaxsparse.inspect.features import class_activity, class_specialization
from jaxsparse.inspect.history import History, read_history
from jaxsparse.inspect.measure import Measured, current_masks, measure
from jaxsparse.inspect.plots import (
    plot_accuracy_against_kept,
    plot_class_specialization,
    plot_densities,
    plot_filters,
    plot_heads,
    plot_history,
    plot_layer_densities,
    plot_masks,
    plot_receptive_fields,
    plot_schedules,
    plot_weights,
)
from jaxsparse.inspect.states import (
    SparsityError,
    check,
    closed_channels,
    eval_params,
    explored,
    get_log_alpha,
    get_masks,
    open_channels,
    sparsify,
)
from jaxsparse.inspect.tables import (
    LayerComparison,
    LayerSummary,
    MaskComparison,
    Summary,
    compare_masks,
    show,
    summary,
)

__all__ = [
    "HeadSummary", "History", "LayerComparison", "LayerHeads", "LayerSummary", "MaskComparison", "Measured",
    "SparsityError", "Summary", "check", "class_activity", "class_specialization", "closed_channels", "compare_masks",
    "current_masks", "eval_params", "explored", "get_log_alpha", "get_masks", "heads", "measure", "open_channels",
    "plot_accuracy_against_kept", "plot_class_specialization", "plot_densities", "plot_filters", "plot_heads",
    "plot_history", "plot_layer_densities", "plot_masks", "plot_receptive_fields", "plot_schedules", "plot_weights",
    "read_history", "show", "sparsify", "summary",
]  # fmt: skip
