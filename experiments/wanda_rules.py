"""Rules between magnitude and Wanda, which differ from each by one of the two things that Wanda changes.

  python -m experiments.prune_after --run=RUN --allocations=uniform --name=text_gpt_wanda \\
    --rules=magnitude,experiments.wanda_rules:wanda_of_matrix,experiments.wanda_rules:magnitude_of_outputs,wanda

  rule                  weights are ranked by               among those of
  magnitude             magnitude                           the matrix
  wanda_of_matrix       magnitude times size of the input   the matrix
  magnitude_of_outputs  magnitude                           one output
  wanda                 magnitude times size of the input   one output
"""

import dataclasses

import jax.numpy as jnp

from jaxsparse import post_training


def wanda_of_matrix(kernel, moments, sparsity, structure):
    """Wanda's scores, ranked among all weights of a matrix."""
    scores = post_training.wanda_scores(kernel, moments.squares)
    _, mask = post_training.RULES["magnitude"].prune(scores, None, sparsity, structure)
    return jnp.where(mask, kernel, 0), mask


def magnitude_of_outputs(kernel, moments, sparsity, structure):
    """Magnitudes, ranked among the weights of one output."""
    equal = dataclasses.replace(moments, second=jnp.ones_like(moments.squares))
    return post_training.RULES["wanda"].prune(kernel, equal, sparsity, structure)
