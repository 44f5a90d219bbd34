"""Post-training pruning: weights go by what arrives at them in calibration data, and the others may make up for them.

:func:`prune_once` prunes single weights of any function of params, :func:`prune_channels` whole heads and hidden units,
and :func:`drop_blocks` removes blocks. The rules take one matrix, (inputs, outputs), and the moments of its inputs,
:class:`jaxsparse.trace.Moments`.
"""

from jaxsparse.post_training.admm_update import admm_update
from jaxsparse.post_training.channels import channel_scores, lowest_channels, prune_channels
from jaxsparse.post_training.depth import block_influence, block_scores
from jaxsparse.post_training.dropping import drop_blocks
from jaxsparse.post_training.dsnot import dsnot
from jaxsparse.post_training.owl import owl_densities
from jaxsparse.post_training.prune_once import prune_once
from jaxsparse.post_training.reconstruct import reconstruct
from jaxsparse.post_training.rules import RULES, Rule, dsnot_rule, resolve
from jaxsparse.post_training.sparsegpt import sparsegpt, sparsegpt_with_damping
from jaxsparse.post_training.stacks import align_layers
from jaxsparse.post_training.wanda import ria_scores, wanda_scores

__all__ = [
    "RULES", "Rule", "admm_update", "align_layers", "block_influence", "block_scores", "channel_scores", "drop_blocks",
    "dsnot", "dsnot_rule", "lowest_channels", "owl_densities", "prune_channels", "prune_once", "reconstruct", "resolve",
    "ria_scores", "sparsegpt", "sparsegpt_with_damping", "wanda_scores",
]  # fmt: skip
