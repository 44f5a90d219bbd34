"""Sparse training as Optax transformations: one more link in the chain, and the network that comes out is sparse."""

import importlib

from jaxsparse import (
    allocation,
    artifacts,
    groups,
    inspect,
    kernels,
    masks,
    parallel,
    saliency,
    schedules,
    selection,
    structures,
    transforms,
)
from jaxsparse._version import __version__
from jaxsparse.allocation import erdos_renyi
from jaxsparse.artifacts import ArtifactError, formats, load_sparse, save_sparse
from jaxsparse.counts import remaining
from jaxsparse.gates import Penalty, dependent_logits, hard_concrete, hard_concrete_mean, prob_open
from jaxsparse.groups import Group
from jaxsparse.inspect import (
    SparsityError,
    check,
    closed_channels,
    eval_params,
    get_log_alpha,
    get_masks,
    open_channels,
    sparsify,
    summary,
)
from jaxsparse.layouts import Layout
from jaxsparse.masks import apply_masks, count, density, magnitude_masks, nonzero_masks, random_masks, score_masks
from jaxsparse.methods.ac_dc import ac_dc, ac_dc_phases
from jaxsparse.methods.admm import admm
from jaxsparse.methods.amenable import amenable_init, centroids
from jaxsparse.methods.asni import asni, asni_counts
from jaxsparse.methods.dep_l0 import dep_l0
from jaxsparse.methods.granet import granet
from jaxsparse.methods.iterative_hard_thresholding import iterative_hard_thresholding
from jaxsparse.methods.l0 import l0
from jaxsparse.methods.magnitude_pruning import magnitude_pruning
from jaxsparse.methods.mask_updates import mask_updates
from jaxsparse.methods.momentum_regrowth import momentum_regrowth
from jaxsparse.methods.powerpropagation import powerpropagation
from jaxsparse.methods.rda import rda
from jaxsparse.methods.reweighted_l1 import reweighted_l1
from jaxsparse.methods.rigl import rigl, rigl_update
from jaxsparse.methods.s_ste import s_ste
from jaxsparse.methods.soft_threshold import soft_threshold
from jaxsparse.methods.sparse_evolutionary import sparse_evolutionary
from jaxsparse.methods.sparse_init import sparse_init
from jaxsparse.methods.sparse_momentum import sparse_momentum
from jaxsparse.methods.spartan import spartan
from jaxsparse.methods.sr_ste import sr_ste
from jaxsparse.methods.srigl import srigl
from jaxsparse.methods.straight_through import straight_through
from jaxsparse.methods.top_kast import top_kast
from jaxsparse.prunable import Prunable, all_but
from jaxsparse.schedules import (
    cosine_prune_rate,
    rda_cosine,
    rda_halving,
    rda_log_cosine,
    rising_cosine,
    sigmoid_sparsity,
)
from jaxsparse.selection import global_top_k_masks, top_k_mask
from jaxsparse.structures import block, n_of_m
from jaxsparse.transforms import chain, velocity

__all__ = [
    "ArtifactError", "Group", "Layout", "Penalty", "Prunable", "SparsityError", "__version__", "ac_dc",
    "ac_dc_phases", "admm", "all_but", "allocation", "amenable_init", "apply_masks", "artifacts", "asni",
    "asni_counts", "block", "centroids", "chain", "check", "closed_channels", "cosine_prune_rate", "count",
    "density", "dep_l0", "dependent_logits", "erdos_renyi", "eval_params", "formats", "get_log_alpha", "get_masks",
    "global_top_k_masks", "granet", "groups", "hard_concrete", "hard_concrete_mean", "inspect",
    "iterative_hard_thresholding", "kernels", "l0", "load_sparse", "magnitude_masks", "magnitude_pruning",
    "mask_updates", "masks", "momentum_regrowth", "n_of_m", "nonzero_masks", "open_channels", "parallel",
    "powerpropagation", "prob_open", "random_masks", "rda", "rda_cosine", "rda_halving", "rda_log_cosine",
    "remaining", "reweighted_l1", "rigl", "rigl_update", "rising_cosine", "s_ste", "saliency", "save_sparse",
    "schedules", "score_masks", "selection", "sigmoid_sparsity", "soft_threshold", "sparse_evolutionary",
    "sparse_init", "sparse_momentum", "sparsify", "spartan", "sr_ste", "srigl", "straight_through", "structures",
    "summary", "top_k_mask", "top_kast", "transforms", "velocity",
]  # fmt: skip


def __getattr__(name: str):
    if name in ("models", "nn"):  # they need Flax, which ``import jaxsparse`` does without
        try:
            return importlib.import_module(f"jaxsparse.{name}")
        except ImportError as error:
            raise AttributeError(f"jaxsparse.{name} needs Flax: pip install flax") from error
    if name in ("post_training", "trace"):  # which not every program needs
        return importlib.import_module(f"jaxsparse.{name}")
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")
