"""A multilayer perceptron whose layers can skip dead blocks of weights."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxsparse.models.layers import fan_in_uniform
from jaxsparse.nn import SparseDense

__all__ = ["MLP"]


class MLP(nn.Module):
    """A multilayer perceptron: dense layers fc1, fc2, ... with ReLU, sparse with masks in the collection "masks".

    Images of any shape are flattened. Kernels and biases start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Attributes:
      num_classes: number of logits, int >= 1.
      features: units of the hidden layers.
      blocks: (rows, columns) of the blocks of each layer's weights, including the last layer. None for a layer, or for
        all, means single weights.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters are float32.
      implementation: as for :func:`jaxsparse.kernels.block_sparse_matmul`.

    Raises:
      ValueError: if the input has no batch axis, or the numbers of blocks and layers differ.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxsparse
      >>> from jaxsparse import models
      >>> model = models.MLP(features=(64, 64), blocks=((16, 32), (32, 32), None))
      >>> images = jnp.ones((5, 8, 8, 1))
      >>> params = model.init(jax.random.key(0), images)["params"]
      >>> masks = {"fc2": {"kernel": jnp.zeros((64, 64), bool).at[:32, 32:].set(True)}}
      >>> model.apply({"params": params, "masks": masks}, images).shape
      (5, 10)
    """

    num_classes: int = 10
    features: Sequence[int] = (2048, 2048)
    blocks: Sequence[tuple[int, int] | None] | None = None
    dtype: Any = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, dense_weight_grad: bool | jax.Array = True) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, ...).

        Args:
          images: the batch.
          dense_weight_grad: whether pruned weights get gradients too; see :class:`jaxsparse.nn.SparseDense`.
        """
        widths = (*self.features, self.num_classes)
        blocks = [None] * len(widths) if self.blocks is None else list(self.blocks)
        if images.ndim < 2 or len(blocks) != len(widths):
            raise ValueError(
                f"MLP needs images (batch, ...) and blocks for each of its {len(widths)} layers, "
                f"got {images.shape} and {self.blocks}"
            )
        x = images.reshape(images.shape[0], -1)
        for i, (width, block) in enumerate(zip(widths, blocks, strict=True)):
            start = fan_in_uniform(x.shape[-1])
            layer = SparseDense(
                width, block=block, dtype=self.dtype, kernel_init=start, bias_init=start, name=f"fc{i + 1}",
                implementation=self.implementation,
            )  # fmt: skip
            x = layer(x, dense_weight_grad=dense_weight_grad)
            x = nn.relu(x) if i < len(self.features) else x
        return x
