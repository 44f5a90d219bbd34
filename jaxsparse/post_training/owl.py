"""OWL: blocks of a network with more outliers among their scores keep more weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.allocation import check_sparsity
from jaxsparse.selection import count_true
from jaxsparse.trees import listed

__all__ = ["owl_densities"]


def owl_densities(
    scores_by_block: Mapping[str, Any] | Sequence[Any],
    sparsity: float,
    *,
    outlier_ratio: float = 5.0,
    max_shift: float = 0.08,
) -> Any:
    r"""Densities of the blocks of a network by their outliers, of OWL.

    With :math:`D_l` the share of the scores of block l that exceed M times their mean, all its matrices together,

    .. math:: r_l = 2 \lambda \, \frac{D_l - \min D}{\max D - \min D}, \qquad
              d_l = 1 - s + r_l - \frac{1}{L} \sum_k r_k

    Every matrix of block l gets the density :math:`d_l`. They average to :math:`1 - s` over blocks, and so over weights
    where all blocks are of one size. Where all blocks have the same share of outliers, all get :math:`1 - s`.

    Args:
      scores_by_block: for every block the scores of its weights, an array or a pytree of arrays, such as those of
        :func:`wanda_scores` of the dense network; a mapping from names, or a sequence. Not traced.
      sparsity: the fraction of zeros of the whole, s, in [0, 1).
      outlier_ratio: M: how many times the mean an outlier exceeds.
      max_shift: lambda: densities differ by twice as much at most.

    Returns:
      Floats: a dict by the names of the blocks, or a list.

    Raises:
      ValueError: for fewer than two blocks, a block without scores or with scores that are not finite, options out of
        range, and densities that are not above 0 and at most 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> flat, spiked = jnp.ones(10), jnp.ones(10).at[0].set(100.0)
      >>> {name: round(d, 2) for name, d in owl_densities({"first": flat, "second": spiked}, 0.7).items()}
      {'first': 0.22, 'second': 0.38}

    References:
      Yin et al., `Outlier Weighed Layerwise Sparsity (OWL) <https://arxiv.org/abs/2310.05175>`_, 2024;
      https://github.com/luuyin/OWL at dddb7a4.
    """
    check_sparsity(sparsity)
    if not outlier_ratio > 0:
        raise ValueError(f"outlier_ratio must be positive, got {outlier_ratio}")
    if not max_shift >= 0:
        raise ValueError(f"max_shift must be at least 0, got {max_shift}")
    named = isinstance(scores_by_block, Mapping)
    names = list(scores_by_block) if named else [str(i) for i in range(len(scores_by_block))]
    blocks = list(scores_by_block.values() if isinstance(scores_by_block, Mapping) else scores_by_block)
    if len(blocks) < 2:
        raise ValueError(f"OWL shares out density among blocks and needs at least two, got {len(blocks)}")
    outliers = np.array([_outliers(f"block {n}", b, outlier_ratio) for n, b in zip(names, blocks, strict=True)])
    spread = float(np.ptp(outliers))
    shifts = 2 * max_shift * (outliers - outliers.min()) / (spread if spread > 0 else 1.0)
    densities = 1 - float(sparsity) + shifts - shifts.mean()
    wrong = [f"{n}: {d:.3g}" for n, d in zip(names, densities, strict=True) if not 0 < d <= 1 + 1e-9]
    if wrong:
        raise ValueError(
            f"the densities of blocks must be above 0 and at most 1, got {listed(wrong)}: sparsity "
            f"{float(sparsity):.3g} leaves no room for max_shift={max_shift:.3g}, take a smaller one"
        )
    found = [min(float(d), 1.0) for d in densities]
    return dict(zip(names, found, strict=True)) if named else found


def _outliers(what: str, scores: Any, ratio: float) -> float:
    """The share of outliers among the scores of one block."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(scores)]
    size = sum(leaf.size for leaf in leaves)
    if not size:
        raise ValueError(f"{what} has no scores")
    mean = sum(float(jnp.sum(jnp.abs(leaf), dtype=jnp.float32)) for leaf in leaves) / size
    if not np.isfinite(mean):
        raise ValueError(f"{what} has scores that are not finite")
    limit = jnp.float32(ratio * mean)
    return sum(int(count_true(leaf.astype(jnp.float32) > limit)) for leaf in leaves) / size
