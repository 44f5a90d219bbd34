"""Sparse training as Optax transformations: one more link in the chain, and the network that comes out is sparse."""

from jaxsparse import allocation, groups, inspect, masks, schedules, selection, structures
from jaxsparse._version import __version__
from jaxsparse.allocation import erdos_renyi
from jaxsparse.groups import Group, remaining
from jaxsparse.inspect import (
    SparsityError,
    check,
    closed_channels,
    eval_params,
    get_log_alpha,
    get_masks,
    sparsify,
    summary,
)
from jaxsparse.links import chain
from jaxsparse.masks import apply_masks, count, density, magnitude_masks, nonzero_masks, random_masks
from jaxsparse.methods.l0 import Penalty, dep_l0, dependent_logits, hard_concrete, hard_concrete_mean, l0, prob_open
from jaxsparse.methods.mask_updates import mask_updates
from jaxsparse.methods.reweighted_l1 import rda, reweighted_l1, velocity
from jaxsparse.methods.sparse_momentum import momentum_regrowth, sparse_momentum
from jaxsparse.schedules import cosine_prune_rate, linear_prune_rate, rda_cosine, rda_halving, rda_log_cosine
from jaxsparse.selection import global_top_k_masks, top_k_mask
from jaxsparse.structures import Prunable

__all__ = [
    "Group", "Penalty", "Prunable", "SparsityError", "__version__", "allocation", "apply_masks", "chain", "check",
    "closed_channels", "cosine_prune_rate", "count", "density", "dep_l0", "dependent_logits", "erdos_renyi",
    "eval_params", "get_log_alpha", "get_masks", "global_top_k_masks", "groups", "hard_concrete", "hard_concrete_mean",
    "inspect", "l0", "linear_prune_rate", "magnitude_masks", "mask_updates", "masks", "momentum_regrowth",
    "nonzero_masks", "prob_open", "random_masks", "rda", "rda_cosine", "rda_halving", "rda_log_cosine", "remaining",
    "reweighted_l1", "schedules", "selection", "sparse_momentum", "sparsify", "structures", "summary", "top_k_mask",
    "velocity",
]  # fmt: skip
