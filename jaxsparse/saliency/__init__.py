"""Saliency scores: the importance of every weight, as a tree like the params. The largest are kept.

:func:`jaxsparse.score_masks` makes masks of such a tree. :func:`jaxsparse.magnitude_pruning` takes one as ``score=``,
and the functions of params and gradients here too. Nothing is normalised, so layers can be ranked together where the
scores of the paper can.
"""

from jaxsparse.saliency.before_training import fisher_diagonal, grasp, snip
from jaxsparse.saliency.of_weights import (
    gradient_times_weight,
    lamp,
    lamp_scores,
    magnitude,
    movement,
    random,
    squared_gradient,
)
from jaxsparse.saliency.synflow import synflow, synflow_masks

__all__ = [
    "fisher_diagonal", "gradient_times_weight", "grasp", "lamp", "lamp_scores", "magnitude", "movement", "random",
    "snip", "squared_gradient", "synflow", "synflow_masks",
]  # fmt: skip
