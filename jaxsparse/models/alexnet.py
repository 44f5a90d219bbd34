"""AlexNet for CIFAR images, as used in papers on pruning at initialisation and on sparse training."""

from functools import partial
from typing import Any

import jax
from flax import linen as nn

from jaxsparse.models.blocks import BatchNorm, check_images, conv_bn_relu, dense, no_norm, scaled

__all__ = ["AlexNet"]

# Features, kernel size and padding of the convolutions, all with strides 2: 32 x 32 pixels become 13, 7, 4, 2, 1.
_CONVOLUTIONS = ((96, 11, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1))
_UNITS = {"s": 1024, "b": 2048}


class AlexNet(nn.Module):
    """Five convolutions with strides 2 and no pooling, two hidden dense layers: AlexNet-s and AlexNet-b of SNIP.

    Every hidden layer has a bias, batch normalisation and ReLU. 5,066,784 weights in the small variant and 8,484,896 in
    the big one. Kernels and biases start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      variant: "s" (1024 units in each hidden dense layer) or "b" (2048).
      num_classes: number of logits, int >= 1.
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.
      batch_norm: whether there is batch normalisation; without it the model is as :func:`fold_batch_norm` leaves it.

    Raises:
      ValueError: for an unknown variant, and if the input is not (batch, height, width, channels) or smaller than 7 x
        7.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> variables = jax.eval_shape(models.AlexNet("s").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> sum(layer["kernel"].size for layer in variables["params"].values() if "kernel" in layer)
      5066784

    References:
      Lee et al., *SNIP: Single-shot network pruning based on connection sensitivity*, 2019, Table 1; Dettmers and
      Zettlemoyer, *Sparse networks from scratch*, 2019, ``AlexNet`` in
      https://github.com/TimDettmers/sparse_learning at e19ff16.
    """

    variant: str = "s"
    num_classes: int = 10
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.variant not in _UNITS:
            raise ValueError(f"AlexNet's variant is one of {tuple(_UNITS)}, got {self.variant!r}")
        check_images(images, 7, "AlexNet")
        norm = partial(BatchNorm if self.batch_norm else no_norm, dtype=self.dtype, axis_name=self.axis_name)
        layer = partial(
            conv_bn_relu,
            strides=2,
            dtype=self.dtype,
            implementation=self.implementation,
            axis_name=self.axis_name,
            batch_norm=self.batch_norm,
        )
        x = images
        for number, (features, kernel_size, padding) in enumerate(_CONVOLUTIONS, 1):
            x = layer(x, scaled(features, self.width), kernel_size, number=number, padding=padding)
        x = x.reshape(x.shape[0], -1)
        units = scaled(_UNITS[self.variant], self.width)
        for name, bn in (("fc1", "bn6"), ("fc2", "bn7")):
            x = dense(x, units, name=name, dtype=self.dtype)
            x = nn.relu(norm(name=bn)(x))
        return dense(x, self.num_classes, name="fc3", dtype=self.dtype)
