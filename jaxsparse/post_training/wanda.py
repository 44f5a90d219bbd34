"""Wanda and RIA: scores of weights by their magnitude and that of their inputs."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.post_training.matrix import as_inputs, as_kernel

__all__ = ["ria_scores", "wanda_scores"]


def wanda_scores(kernel: ArrayLike, mean_square: ArrayLike) -> jax.Array:
    r"""The scores of Wanda: the magnitude of a weight times the norm of its input.

    .. math:: S_{ij} = |W_{ij}| \sqrt{r_i}

    with :math:`r_i` the mean, or the sum, of the squares of input i over calibration data: a common factor changes no
    ranking. The authors rank the weights of every output by themselves, remove the smallest, and change no weight.

    Args:
      kernel: floats, (inputs, outputs).
      mean_square: floats >= 0, (inputs,), such as :attr:`jaxsparse.trace.Moments.squares` over the number of rows.

    Returns:
      float32 (float64 for a float64 kernel), (inputs, outputs).

    Raises:
      ValueError: for shapes that do not fit, or no floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> wanda_scores(jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([16.0, 1.0])).tolist()
      [[4.0, 8.0], [3.0, 0.5]]

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2024, eq. (1); https://github.com/locuslab/wanda.
    """
    kernel = as_kernel(kernel)
    return jnp.abs(kernel) * jnp.sqrt(as_inputs(mean_square, kernel, "mean_square"))[:, None]


def ria_scores(kernel: ArrayLike, mean_square: ArrayLike, power: float = 0.5) -> jax.Array:
    r"""The scores of RIA: the relative importance of a weight among those of its output and of its input.

    .. math:: S_{ij} = \left( \frac{|W_{ij}|}{\sum_k |W_{kj}|} + \frac{|W_{ij}|}{\sum_k |W_{ik}|} \right)
              \left( \sqrt{r_i} \right)^a

    with :math:`r_i` as in :func:`wanda_scores`. The authors rank all weights of a matrix together, and change none.

    Args:
      kernel: floats, (inputs, outputs).
      mean_square: floats >= 0, (inputs,).
      power: the exponent a.

    Returns:
      float32 (float64 for a float64 kernel), (inputs, outputs).

    Raises:
      ValueError: for shapes that do not fit, or no floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> ria_scores(jnp.array([[1.0, 1.0], [3.0, 0.0]]), jnp.array([16.0, 1.0])).tolist()
      [[1.5, 3.0], [1.75, 0.0]]

    References:
      Zhang et al., *Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models*, 2024;
      https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning.
    """
    kernel = as_kernel(kernel)
    size = jnp.abs(kernel)
    of_output, of_input = (jnp.sum(size, axis, keepdims=True) for axis in (0, 1))
    relative = size / jnp.where(of_output > 0, of_output, 1) + size / jnp.where(of_input > 0, of_input, 1)
    return relative * jnp.power(jnp.sqrt(as_inputs(mean_square, kernel, "mean_square")), power)[:, None]
