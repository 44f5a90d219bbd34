"""DSnoT: a mask refined without training, so that the mean outputs of a matrix stay what they were."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsparse.post_training.matrix import as_inputs, as_kernel, of_matrix
from jaxsparse.post_training.wanda import wanda_scores
from jaxsparse.structures import Structure, n_of_m
from jaxsparse.transforms.checks import check_range

__all__ = ["dsnot"]


def dsnot(
    kernel: ArrayLike,
    mask: ArrayLike,
    mean: ArrayLike,
    mean_square: ArrayLike,
    *,
    variance: ArrayLike | None = None,
    structure: str | Structure = "weight",
    cycles: int = 50,
    threshold: ArrayLike = 0.1 / 2048,
    power: ArrayLike = 1.0,
    monotone: bool = False,
) -> jax.Array:
    r"""Swap weights of a mask, in each output, until its mean is nearly that of the dense matrix.

    A weight contributes :math:`c_{ij} = W_{ij} \mu_i` to the mean of output j, with :math:`\mu_i` the mean of input i.
    What the mask m takes from it is the error

    .. math:: e_j = \sum_i (1 - m_{ij}) \, c_{ij}

    In every cycle each output with :math:`|e_j|` above ``threshold`` gets one weight back and loses another, which
    changes :math:`e_j` by :math:`c_\text{lost} - c_\text{grown}`:

    * what grows is, of the pruned weights whose contribution has the sign of :math:`e_j`, that with the largest
      :math:`|c_{ij}| / v_i^p`, for a variance :math:`v_i` of the input and p the ``power``;
    * what is lost is, of the kept weights whose contribution has the other sign, that with the smallest score of Wanda,
      :math:`|W_{ij}| \sqrt{r_i}`, for a mean square :math:`r_i` of the input. Where n of every m inputs are kept, it is
      the smallest in the group of the one that grows, of either sign, and the swap must leave :math:`e_j` its sign.

    An output in which one of these is not to be found is done. No weight is swapped twice, and no value changes: every
    output keeps as many weights as it had, and every group n of m.

    Args:
      kernel: floats, (inputs, outputs): the dense weights.
      mask: bools, (inputs, outputs), of any rule: with the rule "dsnot" of :func:`prune_once`, that of Wanda.
      mean: floats, (inputs,): of the inputs over calibration data, such as :attr:`jaxsparse.trace.Moments.mean`.
      mean_square: floats >= 0, (inputs,), such as :attr:`jaxsparse.trace.Moments.squares` over the number of rows.
      variance: floats >= 0, (inputs,); default: ``mean_square - mean ** 2``. (The authors: the mean of the variances
        within sequences.)
      structure: "weight", or :class:`jaxsparse.n_of_m` along the inputs, which the mask must keep.
      cycles: how many weights of each output may be swapped, at least 0.
      threshold: of the error of a mean output. The authors ask for 0.1 of the sum over a sequence of 2,048 tokens.
      power: p, at least 0.
      monotone: whether a swap must lessen :math:`|e_j|`; an output in which it would not is done. (The authors: no.)
        With few inputs or many zeros the weights that help run out, and swaps without this do harm.

    Returns:
      The mask, bool, (inputs, outputs).

    Raises:
      ValueError: for shapes and dtypes that do not fit, and options out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[3.0], [2.0], [-2.0], [4.0]])
      >>> mask = jnp.array([[False], [False], [True], [True]])  # the mean output is 2 instead of 7
      >>> dsnot(kernel, mask, jnp.ones(4), jnp.full(4, 2.0))[:, 0].tolist()  # 3 comes, -2 goes
      [True, False, False, True]

    References:
      Zhang et al., `Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs
      <https://arxiv.org/abs/2310.08915>`_, 2024; https://github.com/zyxxmu/DSnoT, whose script leaves the layers of
      MLPs at the mask that they have, unless it is told otherwise.
    """
    kernel = as_kernel(kernel)
    unit = of_matrix(structure, kernel)
    mask = jnp.asarray(mask)
    if mask.shape != kernel.shape or mask.dtype != bool:
        raise ValueError(f"mask must be bools of the kernel's shape {kernel.shape}, got {mask.dtype} of {mask.shape}")
    if isinstance(unit, n_of_m) and not isinstance(mask, jax.core.Tracer) and not unit.holds(mask):
        kept = unit.counts(mask)
        raise ValueError(
            f"mask must keep {unit.n} of every {unit.m} inputs, got groups of {kept.min()} to {kept.max()}"
        )
    if cycles < 0:
        raise ValueError(f"cycles must be at least 0, got {cycles}")
    check_range("threshold", threshold, 0)
    check_range("power", power, 0)
    mean, mean_square = as_inputs(mean, kernel, "mean"), as_inputs(mean_square, kernel, "mean_square")
    if variance is None:
        variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    variance = as_inputs(variance, kernel, "variance")
    threshold, power = (jnp.asarray(value, kernel.dtype) for value in (threshold, power))
    return _swapped(
        kernel, mask, wanda_scores(kernel, mean_square), mean, variance, threshold, power, unit, cycles, monotone
    )


@functools.partial(jax.jit, static_argnames=("unit", "cycles", "monotone"))
def _swapped(kernel, start, scores, mean, variance, threshold, power, unit, cycles, monotone):
    """:func:`dsnot`, with the scores of Wanda; ``start`` is the mask before."""
    inputs = jnp.arange(len(kernel))

    def of_output(kernel, scores, start):
        contribution = kernel * mean
        gain = jnp.abs(contribution) / jnp.power(variance, power)
        first = jnp.sum(jnp.where(start, 0, contribution))

        def swap(state):
            cycle, mask, error, _ = state
            helps = jnp.sign(contribution) * jnp.sign(error)  # 1 where growing lessens the error, -1 where pruning does
            grows = ~(start | mask) & (helps > 0)
            grown = jnp.argmax(jnp.where(grows, gain, -1))
            goes = start & mask
            goes &= inputs // unit.m == grown // unit.m if isinstance(unit, n_of_m) else helps < 0
            lost = jnp.argmin(jnp.where(goes, scores, jnp.inf))
            after = error + contribution[lost] - contribution[grown]
            swaps = (jnp.abs(error) > threshold) & grows[grown] & goes[lost]
            if isinstance(unit, n_of_m):
                swaps &= jnp.sign(after) == jnp.sign(first)
            if monotone:
                swaps &= jnp.abs(after) < jnp.abs(error)
            mask = mask.at[grown].set(mask[grown] | swaps)
            mask = mask.at[lost].set(mask[lost] & ~swaps)
            return cycle + 1, mask, jnp.where(swaps, after, error), swaps

        def goes_on(state):
            cycle, _, _, swapped = state
            return (cycle < cycles) & swapped

        return lax.while_loop(goes_on, swap, (0, start, first, jnp.array(True)))[1]

    return jax.vmap(of_output, in_axes=1, out_axes=1)(kernel, scores, start)
